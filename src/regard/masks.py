"""Masks: which keys each query row may attend. True = may attend.

A mask writes a predicate, `allow`, and where it can also its `intervals`: at most two [low, high) of keys per
row, disjoint, which lets a kernel skip what lies outside. Both say the same. Masks combine with `&`, `|`, `~`
(`~` cannot be traced: under torch.compile, negate outside). What is no intervals is laid densely, Lq × Lk bool.

>>> mask = Lengths(torch.tensor([3, 5])) & Causal()
>>> mask.lay(Grid((2,), 5, 5)).int()[0]
tensor([[1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0]], dtype=torch.int32)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from regard.intervals import (
    Bound,
    Diagonal,
    Grid,
    Interval,
    Intervals,
    everything,
    is_int,
    larger,
    nonempty,
    smaller,
)
from regard.transforms import may_look_at


class Mask(ABC):
    """Which keys each query row may attend."""

    @abstractmethod
    def allow(self, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        """Bool, broadcasting to (*leading, Lq, Lk), for rows i (Lq, 1) and keys j (Lk,)."""

    def intervals(self, grid: Grid) -> Intervals | None:
        """The same as at most two disjoint intervals of each row, or None where that cannot be written."""
        return None

    def lower(self, grid: Grid) -> tuple[Intervals | None, Tensor | None]:
        """Intervals and a dense bool, both of which must allow a key; None allows all."""
        intervals = self.intervals(grid)
        if intervals is None:
            return None, self.lay(grid)
        for low, high, _ in intervals:
            if everything(low, high, grid):
                return None, None
        return intervals, None

    def lay(self, grid: Grid) -> Tensor:
        """The predicate over a whole grid: bool, broadcasting to (*leading, Lq, Lk)."""
        i = torch.arange(grid.queries, device=grid.device).unsqueeze(-1)
        return self.allow(i, torch.arange(grid.keys, device=grid.device), grid)

    def __and__(self, other: Mask | Tensor) -> Mask:
        return And(self, as_mask(other))

    def __rand__(self, other: Tensor) -> Mask:
        return And(as_mask(other), self)

    def __or__(self, other: Mask | Tensor) -> Mask:
        return Or(self, as_mask(other))

    def __ror__(self, other: Tensor) -> Mask:
        return Or(as_mask(other), self)

    def __invert__(self) -> Mask:
        return Not(self)

    def __repr__(self) -> str:
        parts = (f"{name}={_shown(value)}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({', '.join(parts)})"


def as_mask(mask: Mask | Tensor) -> Mask:
    """A bool tensor as a mask, and a mask as it is; else TypeError."""
    if isinstance(mask, Tensor):
        return Keep(mask)
    if not hasattr(type(mask), "allow"):
        raise TypeError(f"mask is {mask!r}; it must be a Mask such as Causal(), a bool Tensor or None")
    return mask


class Lengths(Mask):
    """Keys start <= j < stop of each sample: `valid_lens` of right-padded batches, `start` for left padding.

    Each of `valid_lens` (= `stop`) and `start` is an int, or int64/int32 of shape (B,) or (B, Lq), bound to the
    FIRST leading dimension. Raises ValueError where a length is negative or above Lk (on CPU; on a GPU and under
    torch.compile or vmap it is clamped instead, since looking would stop the device).

    >>> Lengths(torch.tensor([2, 6]))
    Lengths(start=0, stop=[2, 6])
    """

    def __init__(
        self,
        valid_lens: int | Tensor | None = None,
        *,
        start: int | Tensor = 0,
        stop: int | Tensor | None = None,
    ) -> None:
        if valid_lens is not None and stop is not None:
            raise ValueError("valid_lens and stop are two names of the same bound; pass one of them")
        self.start = start
        self.stop = valid_lens if stop is None else stop
        self._stop_name = "valid_lens" if stop is None else "stop"

    def allow(self, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        ((start, stop, _),) = self.intervals(grid)
        return (j >= grid.rows(start)) & (j < grid.rows(stop))

    def intervals(self, grid: Grid) -> Intervals:
        start, _ = per_sample(self.start, "start", grid, limit=grid.keys)
        stop, shortest = grid.keys, grid.keys
        if self.stop is not None:
            stop, shortest = per_sample(self.stop, self._stop_name, grid, limit=grid.keys)
        return (Interval(start, stop, held=is_int(start) and start < shortest),)


Align = Literal["lower_right", "upper_left"]


class _Aligned(Mask):
    """Masks along a diagonal: row i stands at key i + offset.

    `align="lower_right"` (offset = Lk − Lq) puts the last row at the last key, so that a decode step of one
    query sees every key; "upper_left" is offset 0. `offset`, an int or a tensor (B,), says it outright: the
    number of keys that each sample's cache held before these queries.
    """

    def __init__(self, align: Align, offset: int | Tensor | None) -> None:
        if align not in ("lower_right", "upper_left"):
            raise ValueError(f"align is {align!r}; it must be 'lower_right' or 'upper_left'")
        self.align = align
        self.offset = offset

    def _offset(self, grid: Grid) -> int | Tensor:
        if self.offset is not None:
            return per_sample(self.offset, "offset", grid, rows=False)[0]
        return grid.keys - grid.queries if self.align == "lower_right" else 0

    def _diagonal(self, grid: Grid, shift: int) -> Bound:
        """Row i's key, plus shift."""
        offset = self._offset(grid)
        if not isinstance(offset, Tensor):
            return offset + shift if grid.queries == 1 else Diagonal(offset + shift)
        return grid.rows(Diagonal(shift)) + offset

    def _place(self, i: Tensor, grid: Grid) -> Tensor:
        return i + self._offset(grid)


class Causal(_Aligned):
    """Keys up to the row's own: j <= i + offset.

    >>> Causal().lay(Grid((), 2, 3)).int()
    tensor([[1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)
    """

    def __init__(self, *, align: Align = "lower_right", offset: int | Tensor | None = None) -> None:
        super().__init__(align, offset)

    def allow(self, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        return j <= self._place(i, grid)

    def intervals(self, grid: Grid) -> Intervals:
        return nonempty([Interval(0, self._diagonal(grid, 1))])


class Window(_Aligned):
    """Keys near the row's own: i + offset − left <= j <= i + offset + right; None is no limit on that side.

    >>> Window(1, 0).lay(Grid((), 3, 3)).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 1, 1]], dtype=torch.int32)
    """

    def __init__(
        self,
        left: int | None,
        right: int | None,
        *,
        align: Align = "lower_right",
        offset: int | Tensor | None = None,
    ) -> None:
        super().__init__(align, offset)
        for name, size in (("left", left), ("right", right)):
            if size is not None and (isinstance(size, float) or size < 0):
                raise ValueError(f"{name} is {size}; a window reaches 0 or more whole keys, or None for all")
        self.left, self.right = left, right

    def allow(self, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        place = self._place(i, grid)
        inside = torch.ones_like(j, dtype=torch.bool)
        if self.left is not None:
            inside = inside & (j >= place - self.left)
        if self.right is not None:
            inside = inside & (j <= place + self.right)
        return inside

    def intervals(self, grid: Grid) -> Intervals:
        low = 0 if self.left is None else self._diagonal(grid, -self.left)
        high = grid.keys if self.right is None else self._diagonal(grid, self.right + 1)
        return nonempty([Interval(low, high)])


class Prefix(_Aligned):
    """The first n keys, open to all rows, and causally the rest; n is an int or a tensor (B,).

    >>> Prefix(2).lay(Grid((), 3, 3)).int()
    tensor([[1, 1, 0],
            [1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)
    """

    def __init__(self, n: int | Tensor, *, align: Align = "lower_right", offset: int | Tensor | None = None) -> None:
        super().__init__(align, offset)
        self.n = n

    def allow(self, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        n, _ = per_sample(self.n, "n", grid, limit=grid.keys, rows=False)
        return (j <= self._place(i, grid)) | (j < n)

    def intervals(self, grid: Grid) -> Intervals:
        n, _ = per_sample(self.n, "n", grid, limit=grid.keys, rows=False)
        return nonempty([Interval(0, larger(n, grid.rows(self._diagonal(grid, 1))))])


class Documents(Mask):
    """Keys of the row's own document: key_ids[j] == query_ids[i]; ids are (L,) or (B, L), for packed samples.

    Where the key ids never fall, every document is an interval.

    >>> Documents(torch.tensor([0, 0, 1])).lay(Grid((), 3, 3)).int()
    tensor([[1, 1, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    """

    def __init__(self, query_ids: Tensor, key_ids: Tensor | None = None) -> None:
        self.query_ids = query_ids
        self.key_ids = query_ids if key_ids is None else key_ids
        _reject_non_integers(self.query_ids, "query_ids")
        _reject_non_integers(self.key_ids, "key_ids")

    def _ids(self, grid: Grid) -> tuple[Tensor, Tensor]:
        for name, ids, length in (("query_ids", self.query_ids, grid.queries), ("key_ids", self.key_ids, grid.keys)):
            _reject_other_device(ids, name, grid)
            batched = (*grid.leading[:1], length)
            if ids.shape not in ((length,), batched):
                raise ValueError(f"{name} has shape {tuple(ids.shape)}; here it must be {(length,)} or {batched}")
        return _column(self.query_ids, grid), _column(self.key_ids, grid)

    def allow(self, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        query_ids, key_ids = self._ids(grid)
        return query_ids == key_ids.mT

    def intervals(self, grid: Grid) -> Intervals | None:
        query_ids, key_ids = self._ids(grid)
        if not may_look_at(key_ids) or bool((key_ids[..., 1:, :] < key_ids[..., :-1, :]).any()):
            return None
        leading = torch.broadcast_shapes(query_ids.shape[:-2], key_ids.shape[:-2])
        key_ids = key_ids.squeeze(-1).expand(*leading, -1).contiguous()
        query_ids = query_ids.squeeze(-1).expand(*leading, -1).contiguous()
        low, high = (torch.searchsorted(key_ids, query_ids, right=right) for right in (False, True))
        return (Interval(low.unsqueeze(-1), high.unsqueeze(-1)),)


class Keep(Mask):
    """A bool tensor, True = may attend, aligned right as broadcasting does: 2-D is (Lq, Lk).

    >>> (Keep(torch.eye(3).bool()) | Lengths(1)).lay(Grid((), 3, 3)).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [1, 0, 1]], dtype=torch.int32)
    """

    def __init__(self, keep: Tensor) -> None:
        if not isinstance(keep, Tensor):
            raise TypeError(f"mask is {keep!r}; it must be a bool Tensor")
        if keep.dtype != torch.bool:
            raise TypeError(f"mask has dtype {keep.dtype}; it must be bool (True = may attend), or pass it as bias")
        self.keep = keep

    def allow(self, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        whole = (*grid.leading, grid.queries, grid.keys)
        _reject_other_device(self.keep, "mask", grid)
        if not broadcasts(self.keep.shape, whole):
            raise ValueError(f"mask has shape {tuple(self.keep.shape)}; it must broadcast to {whole}")
        return self.keep.expand(*self.keep.shape[:-1], grid.keys)


# --- The algebra.


class And(Mask):
    """What both masks allow."""

    def __init__(self, left: Mask, right: Mask) -> None:
        self.left, self.right = left, right

    def allow(self, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        return self.left.allow(i, j, grid) & self.right.allow(i, j, grid)

    def intervals(self, grid: Grid) -> Intervals | None:
        left, right = self.left.intervals(grid), self.right.intervals(grid)
        if left is None or right is None:
            return None
        both = nonempty([_overlap(a, b, grid) for a in left for b in right])
        return both if len(both) <= 2 else None

    def lower(self, grid: Grid) -> tuple[Intervals | None, Tensor | None]:
        if self.intervals(grid) is not None:
            return super().lower(grid)
        (left, keep_left), (right, keep_right) = self.left.lower(grid), self.right.lower(grid)
        if left is not None and right is not None:
            return None, self.lay(grid)
        keep = keep_right if keep_left is None else keep_left if keep_right is None else keep_left & keep_right
        return (right if left is None else left), keep


class Or(Mask):
    """What either mask allows."""

    def __init__(self, left: Mask, right: Mask) -> None:
        self.left, self.right = left, right

    def allow(self, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        return self.left.allow(i, j, grid) | self.right.allow(i, j, grid)

    def intervals(self, grid: Grid) -> Intervals | None:
        left, right = self.left.intervals(grid), self.right.intervals(grid)
        if left is None or right is None:
            return None
        if not left or not right:
            return left or right
        return _union(left[0], right[0], grid) if len(left) == len(right) == 1 else None


class Not(Mask):
    """What the mask does not allow."""

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    def allow(self, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        return ~self.mask.allow(i, j, grid)

    def intervals(self, grid: Grid) -> Intervals | None:
        inner = self.mask.intervals(grid)
        if inner is None or len(inner) > 1:
            return None
        if not inner:
            return (Interval(0, grid.keys),)
        low, high, _ = inner[0]
        above = larger(grid.rows(high), grid.rows(low))
        return nonempty([Interval(0, low), Interval(above, grid.keys)])

    def __invert__(self) -> Mask:
        return self.mask


def _overlap(a: Interval, b: Interval, grid: Grid) -> Interval:
    return Interval(
        larger(grid.rows(a.low), grid.rows(b.low)),
        smaller(grid.rows(a.high), grid.rows(b.high)),
    )


def _union(a: Interval, b: Interval, grid: Grid) -> Intervals:
    """Two intervals as two disjoint ones: the one that starts first, then what the other adds after it."""
    a_low, a_high, b_low, b_high = (grid.rows(bound) for bound in (a.low, a.high, b.low, b.high))
    a_first = torch.as_tensor(a_low, device=grid.device) <= b_low
    low, other_low = torch.where(a_first, a_low, b_low), torch.where(a_first, b_low, a_low)
    high, other_high = torch.where(a_first, a_high, b_high), torch.where(a_first, b_high, a_high)
    return Interval(low, high), Interval(torch.maximum(other_low, high), other_high)


# --- Arguments.


def per_sample(
    values: int | Tensor, name: str, grid: Grid, *, limit: int | None = None, rows: bool = True
) -> tuple[int | Tensor, int]:
    """An int, or a tensor (B,) or (B, Lq) laid out to broadcast to (*leading, Lq, 1); and the least value, or −1.

    With a limit, the values are checked to lie in 0 .. limit where looking at them costs nothing.
    """
    if not isinstance(values, Tensor):
        if not isinstance(values, (int, torch.SymInt)):
            raise TypeError(f"{name} is {values!r}; it must be an int or a Tensor of an integer type")
        _reject_outside(values, values, name, limit)
        return values, values
    _reject_non_integers(values, name)
    least = -1
    if limit is not None and may_look_at(values) and values.numel():
        found = (values if values.dim() == 1 else values.flatten()).tolist()
        least = min(found)
        _reject_outside(least, max(found), name, limit)
    batch = grid.leading[:1]
    if values.shape != batch and not (rows and values.dim() == 2 and values.shape == (*batch, grid.queries)):
        fits = f"{tuple(batch)} or {(*batch, grid.queries)}" if rows and batch else f"{tuple(batch)}"
        raise ValueError(f"{name} has shape {tuple(values.shape)}; here it must be an int or of shape {fits}")
    _reject_other_device(values, name, grid)
    of_rows = values.shape[1] if values.dim() == 2 else 1
    values = values if values.dtype == torch.int64 else values.long()
    return values.reshape(*batch, *[1] * len(grid.leading[1:]), of_rows, 1), least


def _column(ids: Tensor, grid: Grid) -> Tensor:
    """(L,) as (L, 1), and (B, L) as (B, ..., L, 1) with a dimension of 1 for each further leading one."""
    return ids.reshape(*ids.shape[:-1], *[1] * len(grid.leading[1:]) * (ids.dim() - 1), ids.shape[-1], 1)


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _reject_other_device(values: Tensor, name: str, grid: Grid) -> None:
    if values.device != grid.device:
        raise ValueError(f"{name} is on {values.device}; it must be on {grid.device}, as the query")


def _reject_non_integers(values: Tensor, name: str) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} is {values!r}; it must be a Tensor of an integer type")
    if values.dtype not in _INTEGERS:
        raise TypeError(f"{name} has dtype {values.dtype}; it must be an integer type")


def _reject_outside(least: int, most: int, name: str, limit: int | None) -> None:
    if limit is not None and (least < 0 or most > limit):
        raise ValueError(f"{name} spans {least} .. {most}; it must lie in 0 .. {limit}, the number of keys")


def broadcasts(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape broadcasts to just the whole."""
    return len(shape) <= len(whole) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(whole), strict=False))


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return str(value.tolist()) if value.numel() <= 8 and may_look_at(value) else f"{value.dtype} {tuple(value.shape)}"
