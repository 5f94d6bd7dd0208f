"""Additive attention on toy data, in the textbook's words.

All keys are equal, so all scores are, and each query shares its weight evenly among the keys it may see: the first
2 and the first 6 of ten. The outputs are the means of those values, [[2, 3, 4, 5]] and [[10, 11, 12, 13]].
"""

import argparse
from pathlib import Path

import torch

from regard import d2l

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("additive_toy.png"))
out = parser.parse_args().out

torch.manual_seed(0)
queries, keys = torch.normal(0, 1, (2, 1, 20)), torch.ones((2, 10, 2))
values = torch.arange(40, dtype=torch.float32).reshape(1, 10, 4).repeat(2, 1, 1)
valid_lens = torch.tensor([2, 6])

attention = d2l.AdditiveAttention(key_size=2, query_size=20, num_hiddens=8, dropout=0.1)
attention.eval()
for each in attention(queries, keys, values, valid_lens):
    print(each.round(decimals=4).tolist())

d2l.show_heatmaps(attention.attention_weights.reshape((1, 1, 2, 10)), "Keys", "Queries", figsize=(4, 1.4))

part = out.with_name(f"part-{out.name}")
d2l.plt.savefig(part, dpi=200)
part.replace(out)  # nobody finds half a picture
