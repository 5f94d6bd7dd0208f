"""Where a memory keeps its rows: in a buffer with room for more, which memories grown of one another share."""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

Rows = tuple[Tensor, ...]  # (..., Lk, size): projected keys, values and, unless all may be attended, bool, of size 1


class Room:
    """Rows that are filled up to a point, and from there on free for the first who takes them."""

    def __init__(self, rows: Rows, filled: int) -> None:
        self.rows, self.filled = rows, filled

    @classmethod
    def copied(cls, rows: Rows, leading: list[torch.Size], keys: int, filled: int) -> Room:
        """A copy of the rows, with room for so many keys."""
        each = zip(rows, leading, strict=True)
        room = cls(tuple(x.new_empty(*to, keys, x.shape[-1]) for x, to in each), filled)
        room.write(rows, 0)
        return room

    @property
    def keys(self) -> int:
        """How many fit."""
        return self.rows[0].shape[-2]

    def take(self, leading: list[torch.Size], first: int, keys: int) -> bool:
        """Whether the rows first .. keys were free and are of these leading dimensions; they are the caller's now."""
        if keys > self.keys or [x.shape[:-2] for x in self.rows] != leading:
            return False
        if self.rows[0].is_inference() and not torch.is_inference_mode_enabled():  # then it cannot be written to
            return False
        with _TAKING:
            free = self.filled == first
            if free:
                self.filled = keys
        return free

    def write(self, rows: Rows, first: int) -> None:
        for ours, x in zip(self.rows, rows, strict=True):
            ours.narrow(-2, first, x.shape[-2]).copy_(x)

    def read(self, keys: int) -> Rows:
        """The first rows, which are not said to have changed when others are written."""
        return self.rows if keys == self.keys else tuple(x.data.narrow(-2, 0, keys) for x in self.rows)


_TAKING = Lock()
