"""Look attributes up among 20 keys (Brody, Alon & Yahav 2022, "How Attentive are Graph Attention Networks?").

A key holds an attribute and a value, a query asks for the value of an attribute, and all that is learnt is where to
look: a linear layer on either side, and a score of one head. That of the first graph attention networks is static,
LeakyReLU(a·q + b·k): it ranks the keys alike for all queries, and is right about one of them at most.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import trange

import regard
from regard.look import heatmap

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("dictionary_lookup.png"))
out = parser.parse_args().out

torch.set_num_threads(1)
torch.manual_seed(0)
SIZE, one_hot, a, b = 32, torch.eye(20), nn.Linear(32, 1), nn.Linear(32, 1)
static = regard.FunctionScore(lambda query, key: nn.functional.leaky_relu(a(query) + b(key).mT, negative_slope=0.2))
scores = [regard.Dot(), regard.ScaledDot(), regard.Bilinear(SIZE, SIZE), regard.Cosine(0.1), regard.Gaussian()]
scores += [regard.Laplace(), regard.Additive(SIZE, SIZE, SIZE), regard.GATv2(SIZE, SIZE, SIZE), static]


def look_up(values: Tensor, ask: nn.Module, hold: nn.Module, score: regard.Score) -> regard.Attended:
    """How likely each value is, for a query of each attribute, where key j holds attribute j and values[:, j]."""
    keys = torch.cat([one_hot.expand(len(values), -1, -1), one_hot[values]], dim=-1)
    return regard.attention(ask(one_hot), hold(keys), one_hot[values], score)


accuracy, weights = {}, {}
for score in scores:
    name = "static GAT" if score is static else type(score).__name__
    layers = nn.Linear(20, SIZE), nn.Linear(40, SIZE), score
    optimizer = torch.optim.Adam(nn.ModuleList([*layers, a, b]).parameters(), lr=0.01)
    for _ in trange(200, desc=name, disable=None):
        values = torch.rand(32, 20).argsort(dim=1)
        optimizer.zero_grad()
        nn.functional.nll_loss((look_up(values, *layers).out + 1e-9).log().mT, values).backward()
        optimizer.step()
    values = torch.rand(1000, 20).argsort(dim=1)
    with torch.no_grad():
        seen = look_up(values, *layers)
    accuracy[name], weights[name] = (seen.out.argmax(dim=-1) == values).float().mean().item(), seen.weights()[0]
    print(f"{name:10} {accuracy[name]:.4f}")
figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="compressed")
for name, ax in zip(("static GAT", "GATv2", "Additive"), axes, strict=True):
    heatmap(weights[name], ax=ax, vmax=1.0, colorbar=ax is axes[-1])
    ax.set(title=f"{name}: {accuracy[name]:.0%} right", xlabel="keys", ylabel="queries")
part = out.with_name(f"part-{out.name}")
figure.savefig(part, dpi=150)
part.replace(out)  # nobody finds half a picture
if accuracy.pop("static GAT") > 0.1 or min(accuracy.values()) < 1:
    raise SystemExit("all were expected to find every value, but for the static one, which cannot")
