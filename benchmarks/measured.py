"""What was measured, whether it is right, and whether what must hold does: for every device alike."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

import regard
from benchmarks.contestants import BACKWARD, FORWARD, Call, Given, Variation
from regard.files import replacing


class Run(NamedTuple):
    case: str
    entry: str
    what: str
    threads: int = 1

    def __str__(self) -> str:
        return f"{self.case}: {self.entry}, {self.what}" + f", threads: {self.threads}" * (self.threads > 1)


class Result(NamedTuple):
    """Median seconds, or what else a run is of; and the largest error of what was computed."""

    run: Run
    value: float
    error: float = 0.0


# --- Checking.


class Wrong(SystemExit):
    """Says which result is off; where nothing catches it, it ends the benchmark."""


class Allowed(NamedTuple):
    """Errors: the largest of the output, of its largest value, and the norm of each gradient's, of its norm."""

    output: float
    gradient: float


def compute(what: str, call: Call, leaves: dict[str, Tensor], upstream: Tensor) -> list[Tensor]:
    """What one pass makes: the output, and after a backward the gradients of the leaves."""
    with torch.set_grad_enabled(what != FORWARD):
        out = call()
    if what != BACKWARD:
        return [out]
    return [out, *torch.autograd.grad(out, tuple(leaves.values()), upstream, materialize_grads=True)]


def exact(given: Given, kind: str, variation: Variation, rows: Tensor) -> list[Tensor]:
    """The output of rows and the gradients through them, in float64 and with a dense mask."""
    mask, dropout_p = variation.allowed(given, rows), variation.dropout_p
    given = given.to(torch.float64)
    query, key, value, score = given.query, given.key, given.value, given.score
    if kind == "dot products":
        query, key, score = score.project_query(query), score.project_key(key), regard.ScaledDot()
        value = value.unsqueeze(1) if given.case.heads > 1 else value
    torch.manual_seed(0)
    out = regard.attend(query[..., rows, :], key, value, score, mask, dropout_p=dropout_p, impl="chunked")
    return [x.detach() for x in compute(BACKWARD, lambda: out, given.leaves, direction(out))]


def direction(out: Tensor) -> Tensor:
    """What is sent backward through the rows that are checked: numbers that every dtype holds."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(out)


def check(
    run: Run, call: Call, given: Given, rows: Tensor, truth: Sequence[Tensor], allowed: Allowed
) -> tuple[Tensor, float]:
    """The output, and the largest error of it and of what gradients there are; Wrong where one is too large."""
    upstream = given.value.new_zeros(*truth[0].shape[:-2], given.case.queries, truth[0].shape[-1])
    upstream[..., rows, :] = direction(truth[0]).to(upstream)
    torch.manual_seed(0)
    out, *gradients = compute(run.what, call, given.leaves, upstream)
    worst = 0.0
    for name, right, found in zip(("output", *given.leaves), truth, (out[..., rows, :], *gradients), strict=False):
        order, most = (math.inf, allowed.output) if name == "output" else (2, allowed.gradient)
        error = (vector_norm(found - right, order) / vector_norm(right, order).clamp(min=1e-30)).item()
        if not error <= most:  # NaN is not
            what = name if name == "output" else f"gradient of {name}"
            raise Wrong(f"{run}: {what} is off by {error:.1e}, more than {most:.0e}; so it is not timed")
        worst = max(worst, error)
    return out.detach(), worst


# --- What must hold.


class Bar(NamedTuple):
    """One entry's time over another's, or what else was measured of it; without a limit it is only shown."""

    case: str
    what: str
    over: str  # "compiled *" is the fastest of those
    under: str | None = None
    at_most: float | None = None
    at_least: float | None = None
    threads: tuple[int, int] = (1, 1)
    unit: str = ""


def least(results: Iterable[Result], case: str, entry: str, what: str, threads: int = 1) -> float:
    """The least value of the entries that fit; NaN where there is none."""
    fitting = (each for each in results if (each.run.case, *each.run[2:]) == (case, what, threads))
    return min((each.value for each in fitting if fnmatchcase(each.run.entry, entry)), default=math.nan)


def judged(bar: Bar, results: Sequence[Result]) -> tuple[float | None, bool | None]:
    """What was measured (None: not all of it), and whether the bar holds (None: it has no limit)."""
    measured = least(results, bar.case, bar.over, bar.what, bar.threads[0])
    if bar.under:
        measured /= least(results, bar.case, bar.under, bar.what, bar.threads[1])
    held = (bar.at_least or 0.0) <= measured <= (bar.at_most or math.inf) if bar.at_least or bar.at_most else None
    return None if math.isnan(measured) else measured, held


def verdict(bar: Bar, measured: float | None, held: bool | None) -> str:
    name = f"{bar.over} / {bar.under}" if bar.under else ", ".join(filter(None, (bar.over, bar.unit)))
    threads = "" if bar.threads == (1, 1) else ", threads {} / {}".format(*bar.threads)
    number = "not measured" if measured is None else f"{measured:.3g}"
    limit = f"at most {bar.at_most:g}" if bar.at_most else f"at least {bar.at_least:g}" if bar.at_least else ""
    said = {None: "", True: "held", False: "MISSED"}[held]
    return f"  {bar.case:10}{bar.what:20}{name + threads:40}{number:>13}  {limit:15}{said}".rstrip()


Judgements = dict[Bar, tuple[float | None, bool | None]]


def keep(path: Path, judgements: Judgements, **parts: Any) -> None:
    """All of it, as JSON."""
    bars = [{**bar._asdict(), "measured": measured, "held": held} for bar, (measured, held) in judgements.items()]
    with replacing(path) as part:
        text = json.dumps({**parts, "bars": bars}, indent=1, ensure_ascii=False, allow_nan=False)
        part.write_text(text + "\n", encoding="utf-8")
