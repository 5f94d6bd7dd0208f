"""Volitional against non-volitional cues: find the object you want, not the one that stands out.

On a desk lie eight objects in any order with four numbers on each, and a cue names one. Mean, max and gated pooling
sum the desk up without the cue, and then do no better than to guess its mean (an error of 7/8). Attention asks with it.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import trange

import regard
from regard.look import heatmap
from regard.pooling import GatedPooling, MaxPooling, MeanPooling

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("cues.png"))
out = parser.parse_args().out

torch.set_num_threads(1)
torch.manual_seed(0)
OBJECTS = ["newspaper", "paper", "coffee", "notebook", "book", "pen", "lamp", "phone"]
poolings = nn.ModuleList([MeanPooling(), MaxPooling(), GatedPooling(8 + 4)])
attention = regard.Additive(query_dim=8, key_dim=8 + 4, hidden_dim=32)
answers = nn.ModuleList([nn.Sequential(nn.Linear(12 + 8, 64), nn.ReLU(), nn.Linear(64, 4)) for _ in range(4)])


def errors(count: int) -> tuple[Tensor, Tensor]:
    """Mean squared error on new desks, by pooling, and last by attention; and the desks (count, 8, 8 + 4)."""
    order, asked = torch.rand(count, 8).argsort(dim=1), torch.randint(8, (count, 1))
    contents = 3**0.5 * (2 * torch.rand(count, 8, 4) - 1)  # of variance 1
    items, cue = torch.cat([torch.eye(8)[order], contents], dim=-1), torch.eye(8)[asked]
    seen = [pooling(items) for pooling in poolings] + [regard.attend(cue, items, items, attention).squeeze(1)]
    given = [answer(torch.cat([each, cue.squeeze(1)], dim=-1)) for answer, each in zip(answers, seen, strict=True)]
    return (torch.stack(given) - contents[order == asked]).square().mean(dim=(1, 2)), items


optimizer = torch.optim.Adam(nn.ModuleList([poolings, attention, answers]).parameters(), lr=5e-3)
for _ in trange(800, disable=None):
    optimizer.zero_grad()
    errors(128)[0].sum().backward()
    optimizer.step()
with torch.no_grad():
    error, items = errors(10_000)
print("error: mean {:.4f}, max {:.4f}, gated {:.4f}, attention {:.4f}".format(*error.tolist()))
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.5), layout="compressed")
left.bar_label(left.bar(["mean", "max", "gated", "attention"], error.numpy()), fmt="%.3f")
left.axhline(7 / 8, color="black", linestyle=":")
left.set(ylabel="error", ylim=(0, 1.1), title="Reading the numbers asked for\n(dotted: guessing the mean of the desk)")
desk = [OBJECTS[i] for i in items[0, :, :8].argmax(dim=-1)]
heatmap(regard.weights(torch.eye(8), items[0], attention), OBJECTS, desk, right, colorbar=False)
right.set(xlabel="on the desk", ylabel="asked for", title="What each cue looks at")
part = out.with_name(f"part-{out.name}")
figure.savefig(part, dpi=150)
part.replace(out)  # nobody finds half a picture
if error[3] > 0.02 or error[:3].min() < 0.8:
    raise SystemExit("attention should find the object, and the poolings should not")
