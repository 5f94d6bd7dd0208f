"""Which of these points does a rubber band around them touch? A pointer network answers by pointing at them.

It starts at the lowest, goes around, and ends by pointing at the first again; at no other does it point twice.
(Vinyals, Fortunato & Jaitly 2015, whose network found 92.0 % of the hulls of 5 points and 87.0 % of those of 10.)
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from regard import Additive, Memory, pointer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("pointer_network.png"))
out = parser.parse_args().out
torch.set_num_threads(1)
torch.manual_seed(0)


def hulls(count: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points (count, n, 2), the way around them (count, n + 1), and which of its steps come before it repeats."""
    points = torch.rand(count, n, 2)
    x, y = (points.unsqueeze(1) - points.unsqueeze(2)).unbind(-1)  # from each to each
    left = (x.unsqueeze(3) * y.unsqueeze(2) >= y.unsqueeze(3) * x.unsqueeze(2)).all(3)  # all others, seen on that way
    after, way = (left & ~torch.eye(n, dtype=torch.bool)).int().argmax(2), points[:, :, 1].argmin(1, keepdim=True)
    for _ in range(n):
        way = torch.cat([way, after.gather(1, way[:, -1:])], 1)
    return points, way, F.pad((way == way[:, :1]).cumsum(1)[:, :-1] < 2, (1, 0), value=True)


layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True, norm_first=True)
encoder = nn.Sequential(nn.Linear(2, 48), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
score = Additive(query_dim=2 * 48, key_dim=48, hidden_dim=64, activation="relu", bias=True)


def point(encoded: Tensor, way: Tensor) -> Tensor:
    """Log-probabilities (B, T + 1, n) of each step of a way (B, T), and of the next, asked with the two before it."""
    before = F.pad(encoded.take_along_dim(way.unsqueeze(2), 1), (0, 0, 2, 0))
    free = F.pad(F.one_hot(way, encoded.shape[1])[:, 1:].cumsum(1) == 0, (0, 0, 2, 0), value=True)
    query = torch.cat([before[:, :-1], before[:, 1:]], 2)
    return pointer(query, Memory(score, encoded, encoded), free[:, : query.shape[1]])


optimizer = torch.optim.Adam(nn.ModuleList([encoder, score]).parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=1200, pct_start=0.1)
for _ in trange(1200, disable=None):
    points, way, steps = hulls(128, int(torch.randint(5, 11, ())))
    optimizer.zero_grad()
    F.nll_loss(point(encoder(points), way[:, :-1])[steps], way[steps]).backward()
    optimizer.step()
    schedule.step()
torch.set_grad_enabled(False)
for n, expected in ((5, 0.9), (10, 0.8)):
    points, way, steps = hulls(2000, n)
    encoded, found = encoder(points), way[:, :0]
    for _ in range(n + 1):
        found = torch.cat([found, point(encoded, found)[:, -1:].argmax(2)], 1)
    exact = ((found == way) | ~steps).all(1).double().mean()
    print(f"hulls of {n} points found: {exact:.4f}")
    if exact < expected:
        raise SystemExit(f"{expected:.0%} were expected")
p = point(encoded, found[:, :-1])[:, 1:].exp()
i = int(p.amax(2).masked_fill(~steps[:, 1:], 1).amin(1).argmin())  # where it was the least sure
plt.plot(*points[i].T, "k.")
for here, to in zip(points[i, found[i, :-1]], p[i] * steps[i, 1:, None], strict=True):
    for there, weight in zip(points[i], to.tolist(), strict=True):
        plt.plot(*torch.stack([here, there]).T, "k", alpha=weight)  # the surer, the darker
part = out.with_name(f"part-{out.name}")
plt.savefig(part, dpi=150)
part.replace(out)  # nobody finds half a picture
