"""Weights as bytes: how a page holds the heads of a map, and how fine, in the room that there is.

A weight p is one byte. With a tolerance a, chosen for each head by the budget, codes are linear in steps of 2a up to
50a, and logarithmic in steps of 4 % from there:

    n = p / 2a                             for p ≤ 50a
    n = 25 + log(p / 50a) / log 1.04       above

rounded to whole numbers, so that every weight comes back within 2 % or a of what it was. Codes grow with the weight:
the largest of a block of weights is the largest of its codes. `page/cells.js` reads what is written here.
"""

from __future__ import annotations

import zlib
from base64 import b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil, inf, log
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regard.look.maps import AttentionMap

# --- What a byte says. In this order the largest code of a block is the one to show for it.

MASKED = 0  # may not be attended
ABSENT = 1  # not among the largest of its row, which alone are kept
ZERO = 2
NAN = 255
LINEAR = 25  # steps; 2 % of where they end is the tolerance
GROWTH = 1.04
STEPS = NAN - 1 - ZERO

# On all of these scales a weight of 1 is a code of its own. The coarsest, below 1e-3, is the last that is called exact.
TOLERANCES = [GROWTH ** -(77 + 12 * n) / (2 * LINEAR) for n in range(19)]
KEPT = [256, 64, 16]  # weights of each row
SIDES = [1024, 512, 256, 128]  # of a pooled head
LARGEST = 2**28  # cells of a head: what a browser can hold
SAMPLE_ROWS = 64  # from which the size of a head is estimated


class Plan(NamedTuple):
    """How one head is written."""

    tolerance: float
    kept: int | None = None  # weights of each row; None: all
    block: tuple[int, int] = (1, 1)  # queries and keys of a cell


class Encoded(NamedTuple):
    """One head as it stands in the file."""

    plan: Plan
    thumbnail: NDArray[np.uint8]
    data: bytes  # deflated codes, in base64


@dataclass
class Survey:
    """The ways to write a head, coarsest first, and the bytes that each takes, estimated from a sample of its rows."""

    plans: list[Plan]
    sizes: list[float]

    def corrected(self, n: int, size: int) -> bool:
        """Whether a plan took more than was estimated; then the others of the same cells will, too."""
        by = size / self.sizes[n]
        if by <= 1:
            return False
        block = self.plans[n].block
        self.sizes = [
            each * by if plan.block == block else each for plan, each in zip(self.plans, self.sizes, strict=True)
        ]
        return True


def survey(seen: AttentionMap) -> list[Survey]:
    """For each head of a map; ValueError for weights that the page cannot show."""
    queries, keys = grid_of(seen)
    every = ceil(queries / SAMPLE_ROWS)
    shape = (seen.shape[1], ceil(queries / every), keys)
    peaks, sample, allowed = torch.zeros(shape[0]), torch.empty(shape), torch.empty(shape, dtype=torch.bool)
    for start, cells, visible in _blocks(seen):
        finite = cells.nan_to_num(0.0, inf, -inf)
        low, high = (x.item() for x in finite.aminmax())
        if low < 0 or high > _highest(TOLERANCES[0]):
            raise ValueError(
                f"{seen.name!r} holds {low if low < 0 else high:.3g} in rows {start} .. {start + cells.shape[1] - 1}; "
                f"weights of 0 .. {_highest(TOLERANCES[0]):.0f} fit"
            )
        peaks = torch.maximum(peaks, finite.amax((1, 2)))
        first, at = -start % every, ceil(start / every)
        some = cells[:, first::every]
        sample[:, at : at + some.shape[1]] = some
        allowed[:, at : at + some.shape[1]] = visible[:, first::every]

    def surveyed(head: int) -> Survey:
        tolerances = [a for a in TOLERANCES if _highest(a) >= peaks[head]]
        plans: list[Plan] = []
        if queries * keys <= LARGEST:
            plans += [Plan(a) for a in tolerances[::-1]]
            plans += [Plan(tolerances[-1], kept) for kept in KEPT if kept < keys]
        codes = (_codes(sample[head], allowed[head], plan) for plan in plans)
        sizes = [queries / sample.shape[1] * len(deflated(each)) for each in codes]
        for side in (side for side in SIDES if side < max(queries, keys)):
            plans.append(Plan(tolerances[-1], None, (ceil(queries / side), ceil(keys / side))))
            sizes.append(1.01 * np.prod(pooled((queries, keys), plans[-1].block)) + 64)  # no less than it takes
        return Survey(plans[::-1], [4 / 3 * size for size in sizes[::-1]])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(surveyed, range(seen.shape[1])))


def choose(heads: Sequence[Survey], room: float) -> tuple[list[int], bool]:
    """Which plan for each head, equally fine for all, and one step finer for the first; and whether they fit.

    Where none fits, that which takes the least.
    """

    def at(step: int) -> list[int]:
        return [min(step, len(survey.plans) - 1) for survey in heads]

    def total(choice: list[int]) -> float:
        return sum(survey.sizes[n] for survey, n in zip(heads, choice, strict=True))

    steps = range(max(len(survey.plans) for survey in heads))
    fitting = [step for step in steps if total(at(step)) <= room]
    if not fitting:
        return [survey.sizes.index(min(survey.sizes)) for survey in heads], False
    choice, finer = at(fitting[-1]), at(fitting[-1] + 1)
    left = room - total(choice)
    for n, survey in enumerate(heads):
        more = survey.sizes[finer[n]] - survey.sizes[choice[n]]
        if more <= left:
            left, choice[n] = left - more, finer[n]
    return choice, True


def encode(seen: AttentionMap, plans: Sequence[Plan], small: tuple[int, int]) -> list[Encoded]:
    """The heads of a map, in one pass over blocks of its rows; thumbnails are of blocks of the size `small`."""
    grid = grid_of(seen)
    thumbnails = [Pool(grid, small) for _ in plans]
    pools = [Pool(grid, plan.block) if plan.block != (1, 1) else None for plan in plans]
    deflaters = [_deflater() for _ in plans]
    pieces: list[list[bytes]] = [[] for _ in plans]

    def add(head: int, start: int, cells: Tensor, visible: Tensor) -> None:
        codes, pool = _codes(cells, visible, plans[head]), pools[head]
        thumbnails[head].add(start, codes)
        if pool is None:
            pieces[head].append(deflaters[head].compress(codes))
        else:
            pool.add(start, codes)

    with ThreadPoolExecutor(torch.get_num_threads()) as workers:
        for start, cells, visible in _blocks(seen):
            list(workers.map(add, range(len(plans)), [start] * len(plans), cells, visible))
    encoded = []
    for plan, thumbnail, pool, deflater, written in zip(plans, thumbnails, pools, deflaters, pieces, strict=True):
        if pool is not None:
            written.append(deflater.compress(pool.codes))
        written.append(deflater.flush())
        encoded.append(Encoded(plan, thumbnail.codes, b64encode(b"".join(written))))
    return encoded


# --- Weights as codes.


def grid_of(seen: AttentionMap) -> tuple[int, int]:
    """Rows and columns of the cells that a map can give."""
    rows, columns = (seen if seen.exact else seen.pooled(max(seen.shape[2:]))).shape[2:]
    return rows, columns


def _blocks(seen: AttentionMap) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The first row of each block of rows, its cells (H, rows, columns), 0 where not visible, and which are visible."""
    if not seen.exact:
        cells = seen.pooled(max(seen.shape[2:]))[0].float().cpu()
        yield 0, cells.nan_to_num(0.0), ~cells.isnan()
        return
    for rows, p, visible in seen.blocks():
        yield rows.start, p[0].float().cpu(), visible.expand(p.shape)[0].cpu()


def _highest(tolerance: float) -> float:
    """The weight of the largest code."""
    return 2 * LINEAR * tolerance * GROWTH ** (STEPS - LINEAR)


def _codes(cells: Tensor, visible: Tensor, plan: Plan) -> NDArray[np.uint8]:
    """The codes of some rows of a head."""
    steps = cells / (2 * plan.tolerance)
    steps = torch.where(steps <= LINEAR, steps, LINEAR + (steps / LINEAR).log() / log(GROWTH))
    codes = (steps + (ZERO + 0.5)).nan_to_num(NAN).to(torch.uint8)
    if plan.kept is not None:
        least = cells.topk(min(plan.kept, cells.shape[-1]), -1).values[:, -1:]
        codes.masked_fill_(cells < least, ABSENT)
    return codes.masked_fill_(~visible, MASKED).numpy()


class Pool:
    """The largest code of each block, gathered from rows as they come."""

    def __init__(self, grid: tuple[int, int], block: tuple[int, int]) -> None:
        self.block = block
        self.codes = np.zeros(pooled(grid, block), np.uint8)

    def add(self, start: int, codes: NDArray[np.uint8]) -> None:
        high, wide = self.block
        firsts = np.r_[0, np.arange(-start % high or high, len(codes), high)]  # where blocks begin among these rows
        largest = np.maximum.reduceat(codes, np.arange(0, codes.shape[1], wide), axis=1)
        largest = np.maximum.reduceat(largest, firsts, axis=0)
        at = slice(start // high, start // high + len(firsts))
        self.codes[at] = np.maximum(self.codes[at], largest)


def pooled(grid: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return ceil(grid[0] / block[0]), ceil(grid[1] / block[1])


def _deflater() -> Any:
    """Runs and Huffman codes alone: near the entropy of weights, several times as fast as a search for repetitions."""
    return zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)


def deflated(codes: NDArray[np.uint8]) -> bytes:
    deflater = _deflater()
    return deflater.compress(np.ascontiguousarray(codes)) + deflater.flush()
