"""Volitional against non-volitional cues: find the object you want, not the one that stands out.

On a desk lie eight objects in any order, each with four numbers on it, and the task is to read the numbers of the one
that a cue names. Mean, max and gated pooling make one summary of the desk before the cue is known, and do no better
than to guess the mean (7/8 of the variance); attention takes the cue as its query, and reads the right object.
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


def desks(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Items (count, 8, 8 + 4) of an identity and a content, cues (count, 8), and the contents asked for (count, 4)."""
    order = torch.rand(count, 8).argsort(dim=-1)
    contents, asked = 2 * torch.rand(count, 8, 4) - 1, torch.randint(8, (count, 1))
    wanted = contents[order == asked]
    return torch.cat([torch.eye(8)[order], contents], dim=-1), torch.eye(8)[asked[:, 0]], wanted


def see(look: nn.Module, items: Tensor, cue: Tensor) -> Tensor:
    """One vector for each desk, (count, 12). Only attention asks with the cue."""
    if isinstance(look, regard.Additive):
        return regard.attend(cue.unsqueeze(1), items, items, look).squeeze(1)
    return look(items)


def error(look: nn.Module, answer: nn.Module, count: int) -> Tensor:
    """Mean squared error, 1 for answers that are always 0."""
    items, cue, wanted = desks(count)
    given = answer(torch.cat([see(look, items, cue), cue], dim=-1))
    return (given - wanted).square().mean() / wanted.square().mean()


attention = regard.Additive(query_dim=8, key_dim=12, hidden_dim=32)
looks = {"mean": MeanPooling(), "max": MaxPooling(), "gated": GatedPooling(12), "attention": attention}
errors = {}
for name, look in looks.items():
    answer = nn.Sequential(nn.Linear(12 + 8, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam([*look.parameters(), *answer.parameters()], lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=800)
    for _ in trange(800, desc=name, disable=None):
        optimizer.zero_grad()
        error(look, answer, 128).backward()
        optimizer.step()
        schedule.step()
    errors[name] = error(look, answer, 10_000).item()
    print(f"{name}: error {errors[name]:.4f}")

items, _, _ = desks(1)
on_the_desk = [OBJECTS[i] for i in items[0, :, :8].argmax(dim=-1)]
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.5), layout="compressed")
left.bar_label(left.bar(list(errors), list(errors.values()), color="tab:blue"), fmt="%.3f")
left.axhline(7 / 8, color="black", linestyle=":", label="guessing the mean of the desk")
left.set(ylabel="error", ylim=(0, 1.2), title="Reading the numbers asked for")
left.legend(loc="upper left")
heatmap(regard.weights(torch.eye(8), items[0], attention), OBJECTS, on_the_desk, right, colorbar=False)
right.set(xlabel="on the desk", ylabel="asked for", title="What each cue looks at")

part = out.with_name(f"part-{out.name}")
figure.savefig(part, dpi=150)
part.replace(out)  # nobody finds half a picture
if errors.pop("attention") > 0.02 or min(errors.values()) < 0.8:
    raise SystemExit("attention should solve the task, and the poolings should not")
