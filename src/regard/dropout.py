"""Dropout of attention weights as a function of (seed, batch, head, row, key).

The same in every path, device and pass, forward and backward, and independent of how the work is cut up.
"""

from __future__ import annotations

from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


class Dropout(NamedTuple):
    """Probability and 64-bit seed; `first_row` is the place of row 0 in the whole problem."""

    p: float
    seed: Tensor
    first_row: int = 0

    @classmethod
    def drawn(cls, p: float) -> Dropout | None:
        """With a seed of torch's generator; None where nothing is dropped."""
        return cls(p, torch.randint(-(2**63), 2**63 - 1, ())) if p > 0 else None

    def kept(self, leading: tuple[int, ...], rows: int, keys: int, device: torch.device) -> Tensor:
        """(*leading, rows, keys): 0 where a weight is dropped, 1 / (1 − p) where it is kept."""
        maps = torch.arange(prod(leading), device=device).reshape(*leading, 1, 1)
        row = torch.arange(self.first_row, self.first_row + rows, device=device)[:, None]
        block = torch.arange((keys + 3) // 4, device=device)
        seed = self.seed.to(device)
        lanes = torch.stack(philox(block, row, maps, torch.zeros_like(block), seed & _WORD, seed >> 32 & _WORD), -1)
        kept = lanes.flatten(-2)[..., :keys] >= ceil(self.p * 2**32)
        return kept * (1 / (1 - self.p) if self.p < 1 else 0.0)


def philox(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random 32-bit words (as int64) from a counter and a key, which broadcast.

    Salmon, Moraes, Dror & Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
    """
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = second >> 32 & _WORD ^ c1 ^ k0, first >> 32 & _WORD ^ c3 ^ k1
        c1, c3 = second & _WORD, first & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    return c0, c1, c2, c3
