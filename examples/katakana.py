"""English into katakana: each sound looks at the letters it comes from (e2k, a GRU with four heads of attention).

The package computes in NumPy. Here its weights stand in PyTorch's own modules, one of them an unchanged
nn.MultiheadAttention, and what is recorded is checked against the package's own numbers.
"""

import argparse
from importlib.resources import files
from pathlib import Path

import e2k
import matplotlib.pyplot as plt
import torch
from safetensors import safe_open
from torch import Tensor, nn

import regard
from regard.look import heatmap

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("katakana.png"))
out = parser.parse_args().out

WORDS = ["python", "computer", "chocolate", "hospital", "university", "elephant", "attention"]
with safe_open(str(files("e2k.models") / "model-c2k.safetensors"), "pt") as file:
    state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118, it is no dict
    letters, kana = (file.metadata()[name].split("\0") for name in ("in_table", "out_table"))
START, END = 1, 2


class Katakana(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e_emb, self.k_emb = nn.Embedding(len(letters), 256), nn.Embedding(len(kana), 256)
        self.encoder = nn.GRU(256, 256, batch_first=True, bidirectional=True)
        self.encoder_fc = nn.Sequential(nn.Linear(512, 256), nn.Tanh())
        self.pre_decoder, self.post_decoder = nn.GRU(256, 256, batch_first=True), nn.GRU(512, 256, batch_first=True)
        self.attn, self.fc = nn.MultiheadAttention(256, 4, batch_first=True), nn.Linear(256, len(kana))

    def forward(self, word: Tensor, so_far: Tensor) -> Tensor:
        memory = self.encoder_fc(self.encoder(self.e_emb(word))[0])
        state = self.pre_decoder(self.k_emb(so_far))[0]
        context = self.attn(state, memory, memory, need_weights=False)[0]
        return self.fc(self.post_decoder(torch.cat([state, context], -1))[0])


torch.set_grad_enabled(False)
model, package, same, source, said = Katakana().eval(), e2k.C2K(), 0, torch.empty(0), [START]
model.load_state_dict(state)
for word in WORDS:
    source, said = torch.tensor([[START, *map(letters.index, word), END]]), [START]
    while said[-1] != END and len(said) <= 16:
        said.append(int(model(source, torch.tensor([said]))[0, -1].argmax()))
    same += "".join(kana[n] for n in said[1:-1]) == package(word)

# The last word: its weights, and what the package makes them.
with regard.record(model) as seen:
    model(source, torch.tensor([said[:-1]]))
ours, sounds = seen["attn"].weights()[0], [kana[n] for n in said[1:]]
theirs, memory = package.s2s.attn, model.encoder_fc(model.encoder(model.e_emb(source))[0])[0].numpy()
state = model.pre_decoder(model.k_emb(torch.tensor(said[:-1])))[0].numpy()
scores = theirs.split_heads(theirs.q_proj.forward(state)) @ theirs.memory(memory)[0] / theirs.scale
apart = (ours - torch.from_numpy(scores).softmax(-1)).abs().max()
print(f"words that the package says alike: {same} of {len(WORDS)}; weights differ by {apart:.1e}")

figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
for head, ax in enumerate(axes.flat):
    heatmap(ours[head], sounds, ["^", *WORDS[-1], "$"], ax, vmax=1.0, colorbar=False).set_title(f"head {head}")
figure.colorbar(axes[0, 0].images[0], ax=axes, label="attention weight, of all heads")
part = out.with_name(f"part-{out.name}")
plt.savefig(part, dpi=150)
part.replace(out)  # nobody finds half a picture
if same < len(WORDS) or apart > 1e-5:
    raise SystemExit("the same words and weights were expected")
