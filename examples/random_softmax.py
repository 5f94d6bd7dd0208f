"""An exercise: make a random 10 × 10 matrix, turn each row into a probability distribution, and draw it.

Softmax makes every score positive and every row sum to 1. No row prefers the key that fits it, since these scores
know nothing of queries and keys; their largest weights lie anywhere.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from regard.look import heatmap

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("random_softmax.png"))
out = parser.parse_args().out

torch.manual_seed(0)
scores = torch.randn(10, 10)
weights = scores.softmax(dim=-1)
print("rows sum to", weights.sum(dim=-1))

ax = heatmap(weights, range(10), range(10))
ax.set_title("softmax of random scores")

part = out.with_name(f"part-{out.name}")
plt.savefig(part, dpi=150)
part.replace(out)  # nobody finds half a picture
