"""Nadaraya–Watson kernel regression is attention: places are queries and keys, observations are values.

With a Gaussian score each prediction is a mean of the observations near it, where mean pooling is one flat line. The
bandwidth says how near; one learnt by leaving each point out in turn gives sharper weights and follows the curve.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import regard
from regard.look import heatmap

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("kernel_regression.png"))
out = parser.parse_args().out

torch.set_num_threads(1)
torch.manual_seed(0)


def curve(x: Tensor) -> Tensor:
    return 2 * torch.sin(x) + x**0.8


x = torch.rand(50, 1).mul(5).sort(dim=0).values
y = curve(x) + 0.5 * torch.randn(50, 1)
query = torch.linspace(0, 5, 50).unsqueeze(1)

fixed, learnt = regard.Gaussian(bandwidth=1.0), regard.Gaussian(bandwidth=1.0, learnable=True)
others = ~torch.eye(50, dtype=torch.bool)  # each point is predicted from the others, or the bandwidth would go to 0
optimizer = torch.optim.Adam(learnt.parameters(), lr=0.05)
for _ in range(200):
    optimizer.zero_grad()
    (regard.attend(x, x, y, learnt, others) - y).square().mean().backward()
    optimizer.step()

figure, (left, *maps) = plt.subplots(1, 3, figsize=(13, 3.4), layout="compressed", width_ratios=(4, 3, 3))
left.plot(x, y, "o", color="0.7", label="observations")
left.plot(query, curve(query), "k--", label="truth")
left.plot(query, y.mean().expand(50), color="0.5", label="mean pooling")
for name, score, ax in (("fixed", fixed, maps[0]), ("learnt", learnt, maps[1])):
    name = f"{name} bandwidth, {score.bandwidth.item():.2f}"
    with torch.no_grad():
        seen = regard.attention(query, x, y, score)
    error = (seen.out - curve(query)).square().mean()
    print(f"{name}: error {error:.3f}")
    left.plot(query, seen.out, label=name)
    heatmap(seen.weights().detach(), ax=ax).set(xlabel="observations", ylabel="queries", title=name)
left.set(xlabel="x", ylabel="y", ylim=(-0.2, 7))
left.legend(ncols=2, loc="upper center", fontsize="small")

part = out.with_name(f"part-{out.name}")
figure.savefig(part, dpi=150)
part.replace(out)  # nobody finds half a picture
