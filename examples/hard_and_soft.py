"""Look at all keys a little, or at one of them: soft attention, and hard attention that learns in two ways.

Eight cards show a pattern and a number each; a blurred copy of one pattern asks for its number. Soft attention answers
with the mean by its weights, hard attention with one card that it draws. REINFORCE learns from what the draws bring,
and is right on average; straight-through Gumbel takes the gradient of a soft choice, which is not (first line).
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import trange

from regard import Bilinear, HardAttention, Memory, Reinforce
from regard.look import heatmap

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("hard_and_soft.png"))
out = parser.parse_args().out
torch.set_num_threads(1)
torch.manual_seed(0)
hard, reinforce = {"REINFORCE": HardAttention(), "Gumbel": HardAttention(straight_through=1.0)}, Reinforce()
scores = {way: Bilinear(16, 16) for way in ("soft", *hard)}


def draw(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cues (count, 1, 16), patterns (count, 8, 16), numbers (count, 8, 1), and the card asked for (count, 1, 1)."""
    patterns, asked = torch.randn(count, 8, 16), torch.randint(8, (count, 1, 1))
    return patterns.take_along_dim(asked, 1) + torch.randn(count, 1, 16), patterns, torch.randn(count, 8, 1), asked


def loss(way: str, cue: Tensor, memory: Memory, answer: Tensor) -> Tensor:
    """The mean squared error, or what has its gradient on average."""
    if way == "soft":
        return (memory.attend(cue) - answer).square().mean()
    seen = hard[way](cue, memory)
    error = (seen.context - answer).square().squeeze(-1)
    return reinforce(-error, seen.log_prob) if way == "REINFORCE" else error.mean()


cue, patterns, numbers, asked = draw(1)
memory, answer = Memory(scores["soft"], patterns, numbers), numbers.take_along_dim(asked, 1)
(exact,) = torch.autograd.grad((memory.weights(cue.requires_grad_()) @ (numbers - answer).square()).sum(), cue)
for way in hard:
    cues = cue.detach().repeat(1, 20_000, 1).requires_grad_()
    (each,) = torch.autograd.grad(20_000 * loss(way, cues, memory, answer), cues)
    off = (each.mean(1) - exact[0]) / (each.std(1) / 20_000**0.5)
    print(f"{way}: the mean of 20,000 gradients is {off.abs().max():.1f} standard errors from the exact one")

optimizer = torch.optim.Adam(nn.ModuleDict(scores).parameters(), lr=3e-3)
for _ in trange(2000, disable=None):
    cue, patterns, numbers, asked = draw(128)
    answer = numbers.take_along_dim(asked, 1)
    optimizer.zero_grad()
    for way, score in scores.items():
        loss(way, cue, Memory(score, patterns, numbers), answer).backward()
    optimizer.step()
torch.set_grad_enabled(False)
cue, patterns, numbers, asked = draw(4000)
figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="compressed")
for ax, (way, score) in zip(axes, scores.items(), strict=True):
    weights = Memory(score, patterns, numbers).weights(cue)
    accuracy = (weights.argmax(-1, keepdim=True) == asked).double().mean()
    right = weights.take_along_dim(asked, -1).mean()
    print(f"{way}: the right card first {accuracy:.4f}, weight on it {right:.4f}")
    heatmap(weights[:8, 0], ax=ax, colorbar=False).plot(asked[:8].flatten(), range(8), "r.")
    ax.set(xlabel="cards", ylabel="cues", title=way)
    if accuracy < 0.85:
        raise SystemExit("85 % were expected")
part = out.with_name(f"part-{out.name}")
figure.savefig(part, dpi=150)
part.replace(out)  # nobody finds half a picture
