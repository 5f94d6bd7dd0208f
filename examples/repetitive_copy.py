"""Where was I? Copying a long row of three letters, attention to content loses its place, and location keeps it.

Both decoders learn with 8 to 20 letters, where neighbours tell most places apart, and are then asked for 60.
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
parser.add_argument("--out", type=Path, default=Path("repetitive_copy.png"))
out = parser.parse_args().out
torch.set_num_threads(1)


class Copier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.letter, self.beside = nn.Embedding(4, 32), nn.Conv1d(32, 64, kernel_size=3, padding=1)
        self.score, self.attention = regard.Additive(64, 64, 32), regard.LocationSensitive(32, filters=8, kernel_size=5)
        self.cell, self.answer = nn.GRUCell(32 + 64, 64), nn.Linear(64 + 64, 4)

    def forward(self, row: Tensor) -> list[Tensor]:
        """Of letters (B, n): logits (B, n, 4) of each, given those before, and weights (B, n, 1 + n)."""
        written = self.letter(nn.functional.pad(row, (1, 0)))  # 0 marks the start
        key = torch.tanh(self.beside(written.mT).mT)
        memory, hidden = regard.Memory(self.score, key, key), torch.zeros(len(row), 64)
        context, state, steps = hidden, self.attention.start(memory), []
        for last in written[:, :-1].unbind(1):
            hidden = self.cell(torch.cat([last, context], 1), hidden)
            context, weights, state = self.attention.step(hidden, memory, state)
            steps.append((self.answer(torch.cat([hidden, context], 1)), weights))
        return [torch.stack(each, 1) for each in zip(*steps, strict=True)]


figure, axes = plt.subplots(1, 2, figsize=(11, 5.5), layout="compressed")
wrong = {}
for ax, name in zip(axes, ("content", "location"), strict=True):
    torch.manual_seed(0)
    copier = Copier()
    if name == "content":  # where it looked last says nothing
        nn.init.zeros_(copier.attention.U.weight).requires_grad_(False)
    optimizer = torch.optim.Adam(copier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=400)
    for _ in trange(400, desc=name, disable=None):
        row = torch.randint(1, 4, (32, int(torch.randint(8, 21, ()))))
        optimizer.zero_grad()
        nn.functional.cross_entropy(copier(row)[0].mT, row).backward()
        optimizer.step()
        schedule.step()
    row = torch.randint(1, 4, (200, 60))
    with torch.no_grad():
        logits, seen = copier(row)
    wrong[name] = (logits.argmax(-1) != row).float().mean().item()
    heatmap(seen[0], ax=ax, colorbar=False)
    ax.set(xlabel="letter of the row", ylabel="letter written", title=f"{name}: {wrong[name]:.1%} wrong")
print("wrong letters: content {content:.4f}, location {location:.4f}".format(**wrong))
part = out.with_name(f"part-{out.name}")
figure.savefig(part, dpi=150)
part.replace(out)  # nobody finds half a picture
if wrong["content"] < 0.3 or wrong["location"] > 0.03:
    raise SystemExit("content should lose its place, and location should keep it")
