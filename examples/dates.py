"""What are query, key and value of a decoder? Learn to write the dates of 26 languages as 2019-07-23, and look.

The query is what it has written so far; the keys are the characters, each with its neighbours; the values are the
characters alone. Each digit of year and day looks at its own (red dots), wherever the language has it.
"""

import argparse
import re
from datetime import date
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from babel.dates import format_date
from torch import Tensor, nn
from tqdm import tqdm

import regard
from regard.look import heatmap

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("dates.png"))
out = parser.parse_args().out
torch.set_num_threads(1)
torch.manual_seed(0)

LANGUAGES = "zh cs da nl en fi fr de el he hi hu id it ja ko nb pl pt ro ru sk es sv th tr".split()  # with digits 0-9
days = [date.fromordinal(365_000 + n) for n in torch.randperm(3_000_000)[:50_000].tolist()]  # of any year of 4 digits
dates = [format_date(day, ("medium", "long", "full")[i % 3], LANGUAGES[i % 26]) for i, day in enumerate(days)]
alphabet = "".join(sorted({"\0", *"-0123456789".join(dates)}))
texts = torch.tensor([[alphabet.index(sign) for sign in text.ljust(50, "\0")] for text in dates])
isos = torch.tensor([[alphabet.index(sign) for sign in f"-{day}"] for day in days])  # the first is given
lengths = torch.tensor([len(text) for text in dates])
held_out, batches = torch.arange(2028), (2028 + lengths[2028:].argsort()).split(32)  # each of dates of one length

symbol, neighbours = nn.Embedding(len(alphabet), 96, padding_idx=0), nn.Conv1d(96, 96, kernel_size=7, padding="same")
writer, score = nn.GRU(96, 96, batch_first=True), regard.Additive(96, 96, hidden_dim=48)
answer = nn.Sequential(nn.Linear(2 * 96, 96), nn.Tanh(), nn.Linear(96, len(alphabet)))
model = nn.ModuleList([symbol, neighbours, writer, score, answer])


def decode(batch: Tensor) -> tuple[Tensor, regard.Attended]:
    """Logits (B, 10, alphabet) of each sign, given those before it, and what it looked at."""
    query, _ = writer(symbol(isos[batch, :-1]))
    value = symbol(texts[batch, : lengths[batch].max()])
    key = torch.tanh(neighbours(value.mT).mT)
    seen = regard.attention(query, key, value, score, regard.Lengths(lengths[batch]))
    return answer(torch.cat([query, seen.out], dim=-1)), seen


optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=len(batches))
for i in tqdm(torch.randperm(len(batches)).tolist(), disable=None):
    logits, _ = decode(batches[i])
    optimizer.zero_grad()
    nn.functional.cross_entropy(logits.mT, isos[batches[i], 1:]).backward()
    optimizer.step()
    schedule.step()

with torch.no_grad():
    logits, seen = decode(held_out)
exact = (logits.argmax(dim=-1) == isos[held_out, 1:]).all(dim=1).float().mean()  # so also if written sign by sign
hits = []
for text, weights in zip(dates, seen.weights(), strict=False):
    first, *_, last = re.finditer(r"\d+", text)
    year, day = (first, last) if len(first[0]) == 4 else (last, first)  # one at either end
    own = [*range(*year.span()), *range(*day.span())], [0, 1, 2, 3, *range(10 - len(day[0]), 10)]
    hits += [weights[i].argmax() == j for j, i in zip(*own, strict=True)]
aligned = torch.tensor(hits).float().mean()
print(f"held-out dates exact: {exact:.4f}, largest weight on the right character: {aligned:.4f}")
assert exact >= 0.99 and aligned >= 0.9

heatmap(weights[:, : len(text)], days[len(held_out) - 1].isoformat(), text).plot(*own, "r.")
part = out.with_name(f"part-{out.name}")
plt.savefig(part, dpi=150)
part.replace(out)  # nobody finds half a picture
