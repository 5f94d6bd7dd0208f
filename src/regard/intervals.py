"""Intervals of keys per query row: what a mask is to a kernel, and the grid they are laid over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor


class Diagonal(NamedTuple):
    """A bound that moves with the row: row i is bounded by i + offset."""

    offset: int


Bound = int | Diagonal | Tensor  # a tensor broadcasts to (*leading, Lq, 1)


class Interval(NamedTuple):
    """The keys low <= j < high of each row; `held` where it is known that every row has some."""

    low: Bound
    high: Bound
    held: bool = False


Intervals = tuple[Interval, ...]


class Grid(NamedTuple):
    """What a mask is laid over: leading dimensions (batch first), query rows and keys."""

    leading: tuple[int, ...]
    queries: int
    keys: int
    device: torch.device = torch.device("cpu")

    def rows(self, bound: Bound) -> int | Tensor:
        """The bound of each row: an int for all, or a tensor that broadcasts to (*leading, Lq, 1)."""
        if isinstance(bound, Diagonal):
            return torch.arange(bound.offset, bound.offset + self.queries, device=self.device).unsqueeze(-1)
        return bound

    def clamped(self, bound: Bound) -> int | Tensor:
        """The bound of each row, within 0 .. Lk."""
        return larger(smaller(self.rows(bound), self.keys), 0)

    def within(self, intervals: Iterable[Interval]) -> Tensor:
        """Bool, broadcasting to (*leading, Lq, Lk): the keys inside an interval of their row."""
        j = torch.arange(self.keys, device=self.device)
        inside = None
        for low, high, _ in intervals:
            here = j < self.rows(high)
            if not is_int(low) or low > 0:
                here = here & (j >= self.rows(low))
            inside = here if inside is None else inside | here
        return torch.zeros_like(j, dtype=torch.bool) if inside is None else inside


def constant(bound: Bound) -> bool:
    """Whether the bound is the same for every row."""
    return bound.dim() < 2 or bound.shape[-2] == 1 if isinstance(bound, Tensor) else is_int(bound)


def is_int(bound: Bound) -> TypeGuard[int]:
    """Whether the bound is one number for all rows, symbolic while torch traces or not."""
    return not isinstance(bound, (Tensor, Diagonal))


def smaller(a: int | Tensor, b: int | Tensor) -> int | Tensor:
    """The elementwise minimum of two bounds."""
    if isinstance(a, Tensor):
        return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)


def larger(a: int | Tensor, b: int | Tensor) -> int | Tensor:
    """The elementwise maximum of two bounds."""
    if isinstance(a, Tensor):
        return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)
    return b.clamp(min=a) if isinstance(b, Tensor) else max(a, b)


def nonempty(intervals: list[Interval]) -> Intervals:
    """Without those that can be seen to be empty before looking at any tensor."""
    return tuple(i for i in intervals if not (is_int(i.low) and is_int(i.high) and i.low >= i.high))


def everything(low: Bound, high: Bound, grid: Grid) -> bool:
    """Whether it is plain to see that the interval holds every key of every row."""
    return is_int(high) and is_int(low) and low <= 0 and high >= grid.keys
