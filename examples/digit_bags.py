"""Does the bag hold a nine? Learnt from bags and answers, while no digit is ever named (Ilse et al. 2018).

Bags hold 4 to 13 handwritten digits. Gated attention pooling weighs each by its look alone, and its weights find the
nines (red), which nobody pointed at: their AUC is the chance that a nine outweighs another digit.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from tqdm import trange

from regard import Lengths
from regard.look import heatmap
from regard.pooling import GatedAttentionPooling

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("digit_bags.png"))
out = parser.parse_args().out

torch.set_num_threads(1)
torch.manual_seed(0)
images, digits = (torch.from_numpy(array).float() for array in load_digits(return_X_y=True))
held_out, learnt = torch.randperm(len(images)).split([500, len(images) - 500])


def bags(source: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (count, 13, 64), how many are in the bag (count,), and which of these are nines (count, 13)."""
    drawn, sizes = source[torch.randint(len(source), (count, 13))], torch.randint(4, 14, (count,))
    return images[drawn] / 16, sizes, (digits[drawn] == 9) & (torch.arange(13) < sizes.unsqueeze(1))


embed = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.5))
pool, answer = GatedAttentionPooling(256, hidden_dim=32), nn.Linear(256, 1)
optimizer = torch.optim.AdamW(nn.ModuleList([embed, pool, answer]).parameters(), lr=3e-3)
for _ in trange(300, disable=None):
    items, sizes, nines = bags(learnt, 64)
    logits = answer(pool(embed(items), Lengths(sizes))).squeeze(1)
    optimizer.zero_grad()
    nn.functional.binary_cross_entropy_with_logits(logits, nines.any(dim=1).float()).backward()
    optimizer.step()
torch.set_grad_enabled(False)
embed.eval()
items, sizes, nines = bags(held_out, 1000)
seen = pool.attention(embed(items), Lengths(sizes))
weights, logits = seen.weights().squeeze(1), answer(seen.out).flatten()
inside = torch.arange(13) < sizes.unsqueeze(1)
among = inside & nines.any(dim=1, keepdim=True)  # the digits of bags with a nine
bag_auc, instance_auc = roc_auc_score(nines.any(dim=1), logits), roc_auc_score(nines[among], weights[among])
print(f"bag AUC {bag_auc:.4f}, instance AUC {instance_auc:.4f}")
ax = heatmap(weights[:8], [f"{100 * p:.0f} %" for p in logits[:8].sigmoid()], mask=inside[:8], cmap="autumn_r")
drawn = (items * inside.unsqueeze(2))[:8].reshape(8, 13, 8, 8)
ink = nn.functional.pad(drawn, (1, 1, 1, 1)).transpose(1, 2).reshape(80, 130).numpy()
ax.imshow(0 * ink, "gray", alpha=ink, extent=(-0.5, 12.5, 7.5, -0.5))
ax.set(xlabel="digits of the bag", ylabel="holds a nine")
part = out.with_name(f"part-{out.name}")
plt.savefig(part, dpi=150)
part.replace(out)  # nobody finds half a picture
if bag_auc < 0.96 or instance_auc < 0.95:
    raise SystemExit("a bag AUC of 0.96 and an instance AUC of 0.95 were expected")
