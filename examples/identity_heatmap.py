"""The identity matrix as attention weights, drawn as a heatmap.

Each of ten queries gives its whole weight to the one key that equals it, and none to the others: a diagonal. What
such attention returns is the values themselves, each query its own.
"""

import argparse
from pathlib import Path

import torch

from regard import d2l

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("identity_heatmap.png"))
out = parser.parse_args().out

attention_weights = torch.eye(10).reshape(1, 1, 10, 10)  # rows and columns of panels, queries, keys
values = torch.arange(10.0).unsqueeze(1)
print("weights @ values =", (attention_weights[0, 0] @ values).flatten().tolist())

d2l.show_heatmaps(attention_weights, xlabel="Keys", ylabel="Queries")

part = out.with_name(f"part-{out.name}")
d2l.plt.savefig(part, dpi=200, bbox_inches="tight")
part.replace(out)  # nobody finds half a picture
