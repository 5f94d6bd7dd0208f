"""What are query, key and value of a decoder? Learn to write the dates of 26 languages as 2019-07-23, and look.

The query is what it has written so far, the keys are the characters, each with its neighbours, the values the
characters alone. Each digit of year and day looks at its own (dots), wherever a language has it.
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

LANGUAGES = "zh cs da nl en fi fr de el he hi hu id it ja ko nb pl pt ro ru sk es sv th tr"  # all with the digits 0-9
days = [date.fromordinal(365_000 + n) for n in torch.randperm(3_000_000)[:60_060].tolist()]  # years of four digits
texts = [format_date(day, ("medium", "long", "full")[i % 3], LANGUAGES.split()[i % 26]) for i, day in enumerate(days)]
alphabet = "".join(sorted({"\0", *"-0123456789", *"".join(texts)}))
lengths = torch.tensor([len(text) for text in texts])
sources = torch.tensor([[alphabet.index(sign) for sign in text.ljust(50, "\0")] for text in texts])
targets = torch.tensor([[alphabet.index(sign) for sign in f"-{day}"] for day in days])  # the first sign is given
held_out, batches = torch.arange(60_060)[-2028:], lengths[:-2028].argsort().split(32)  # each of dates of one length

symbol, neighbours = nn.Embedding(len(alphabet), 96, padding_idx=0), nn.Conv1d(96, 96, kernel_size=9, padding="same")
writer, score = nn.GRU(96, 96, batch_first=True), regard.Additive(96, 96, hidden_dim=48)
answer = nn.Sequential(nn.Linear(2 * 96, 96), nn.Tanh(), nn.Linear(96, len(alphabet)))


def decode(batch: Tensor) -> tuple[Tensor, regard.Attended]:
    """Logits (B, 10, alphabet) of each sign, given those before it, and what it looked at."""
    query, _ = writer(symbol(targets[batch, :-1]))
    value = symbol(sources[batch, : lengths[batch].max()])
    key = torch.tanh(neighbours(value.mT).mT)
    seen = regard.attention(query, key, value, score, regard.Lengths(lengths[batch]))
    return answer(torch.cat([query, seen.out], dim=-1)), seen


optimizer = torch.optim.Adam(nn.ModuleList([symbol, neighbours, writer, score, answer]).parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=7e-3, total_steps=len(batches))
for i in tqdm(torch.randperm(len(batches)).tolist(), disable=None):
    logits, _ = decode(batches[i])
    optimizer.zero_grad()
    nn.functional.cross_entropy(logits.mT, targets[batches[i], 1:]).backward()
    optimizer.step()
    schedule.step()
torch.set_grad_enabled(False)
logits, seen = decode(held_out)
exact = (logits.argmax(dim=-1) == targets[held_out, 1:]).all(dim=1).float().mean()  # so also if written sign by sign
own = []  # for each date: signs of the answer, and the characters that they are
for text in texts[-2028:]:
    first, *_, last = re.finditer(r"\d+", text)
    year, day = (first, last) if len(first[0]) == 4 else (last, first)  # the month's number, if any, stands between
    own.append(dict(enumerate(range(*year.span()))) | dict(enumerate(range(*day.span()), 10 - len(day[0]))))
hits = [at[i].argmax() == j for at, places in zip(seen.weights(), own, strict=True) for i, j in places.items()]
aligned = sum(hits) / len(hits)
print(f"held-out dates exact: {exact:.4f}, largest weight on the right character: {aligned:.4f}")
ax = heatmap(seen.weights()[-1, :, : lengths[-1]], str(days[-1]), texts[-1])
ax.plot(list(own[-1].values()), list(own[-1]), "r.")
part = out.with_name(f"part-{out.name}")
plt.savefig(part, dpi=150)
part.replace(out)  # nobody finds half a picture
if exact < 0.99 or aligned < 0.9:
    raise SystemExit("99 % of the dates and 90 % of the digits were expected")
