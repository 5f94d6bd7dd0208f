"""Does the bag hold a 9? Learnt from answers for whole bags, no digit of which is ever named (Ilse et al. 2018).

Bags hold 4 to 12 handwritten digits. Gated attention pooling weighs each digit by its look alone, and its weights
point out the nines, which nobody showed it: AUC is the chance that a nine outweighs another digit.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
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
images, digits = map(torch.from_numpy, load_digits(return_X_y=True))
images = images.float() / 16
held_out, learnt = torch.randperm(len(images)).split([500, len(images) - 500])


def bags(pool: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (count, 12, 64), how many of them are in the bag (count,), and which are nines (count, 12)."""
    sizes, drawn = torch.randint(4, 13, (count,)), pool[torch.randint(len(pool), (count, 12))]
    return images[drawn], sizes, (digits[drawn] == 9) & (torch.arange(12) < sizes.unsqueeze(1))


embed = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2))
pool, answer = GatedAttentionPooling(64, hidden_dim=32), nn.Linear(64, 1)
model = nn.ModuleList([embed, pool, answer])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-3)
for _ in trange(300, disable=None):
    items, sizes, nines = bags(learnt, 64)
    logits = answer(pool(embed(items), Lengths(sizes))).squeeze(1)
    optimizer.zero_grad()
    nn.functional.binary_cross_entropy_with_logits(logits, nines.any(1).float()).backward()
    optimizer.step()

model.eval()
items, sizes, nines = bags(held_out, 1000)
with torch.no_grad():
    seen = pool.attention(embed(items), Lengths(sizes))
    weights, logits = seen.weights().squeeze(1), answer(seen.out).flatten()
inside = (torch.arange(12) < sizes.unsqueeze(1)) & nines.any(1, keepdim=True)  # digits of the bags with a nine
bag_auc, digit_auc = roc_auc_score(nines.any(1), logits), roc_auc_score(nines[inside], weights[inside])
print(f"bag AUC {bag_auc:.4f}, instance AUC {digit_auc:.4f}")

shown = torch.arange(12) < sizes[:6].unsqueeze(1)
mosaic = (items[:6] * shown.unsqueeze(2)).reshape(6, 12, 8, 8).transpose(1, 2).reshape(6 * 8, 12 * 8)
belief = [f"holds a 9: {100 * chance:.0f} %" for chance in logits[:6].sigmoid()]
figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 8), layout="constrained")
top.imshow(mosaic.numpy(), cmap="gray_r", extent=(-0.5, 11.5, 5.5, -0.5))
top.set(yticks=range(6), yticklabels=belief, title="Six bags of digits it never saw")
heatmap(weights[:6], belief, ax=bottom, mask=shown, colorbar=False)
bottom.set(xlabel="", ylabel="", title="The weights of their digits (framed: nines)")
for ax in (top, bottom):
    for row, column in nines[:6].nonzero().tolist():
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="tab:red", linewidth=3))

part = out.with_name(f"part-{out.name}")
figure.savefig(part, dpi=150)
part.replace(out)  # nobody finds half a picture
if bag_auc < 0.96 or digit_auc < 0.95:
    raise SystemExit("a bag AUC of 0.96 and an instance AUC of 0.95 were expected")
