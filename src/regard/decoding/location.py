"""Location-sensitive attention: where a step looks depends on where the steps before it looked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from regard.decoding.memory import Memory
from regard.decoding.step import Step, Stepwise, checked, of_keys, zeros
from regard.problem import Shift


class Looked(NamedTuple):
    """Where earlier steps looked."""

    weights: Tensor  # (..., Lk), of the last step
    total: Tensor  # (..., Lk), of all steps


class LocationSensitive(Stepwise[Looked]):
    """Attention that sees, around each key, where the last step looked: s_j = pair(W_q q, W_k k_j + U f_j), where
    f = filters * previous weights, a convolution along the keys.

    With an additive score this is v · tanh(W_q q + W_k k_j + U f_j): Chorowski et al. 2015, "Attention-Based Models
    for Speech Recognition". Weights are what the memory's normalizer makes of the scores; `Sigmoid()` is their
    smoothing, but for the division by the sum. A hidden key is a place between those beside it, of weight 0.

    Args:
        key_dim: the size of the memory's projected keys: hidden_dim of `Additive`, the keys' own of `Dot`.
        filters: how many features of the previous weights each key has.
        kernel_size: how many keys each of them spans, odd.
        cumulative: whether they see the sum of all previous weights too, as in Tacotron 2 (Shen et al. 2018).

    Raises:
        ValueError: for a size that is not positive, or a kernel_size that is not odd; from a step, for keys of another
            size.

    >>> score, encoded = Additive(query_dim=6, key_dim=4, hidden_dim=8), torch.randn(2, 10, 4)
    >>> memory = Memory(score, encoded, encoded, Lengths(torch.tensor([3, 10])))
    >>> attention = LocationSensitive(key_dim=8)
    >>> state = attention.start(memory)
    >>> context, weights, state = attention.step(torch.randn(2, 6), memory, state)
    >>> context.shape, weights.shape
    (torch.Size([2, 4]), torch.Size([2, 10]))
    """

    def __init__(self, key_dim: int, filters: int = 32, kernel_size: int = 31, *, cumulative: bool = False) -> None:
        super().__init__()
        for name, size in (("key_dim", key_dim), ("filters", filters), ("kernel_size", kernel_size)):
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be 1 or more")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; it must be odd, to have a middle")
        self.cumulative = cumulative
        self.filters = nn.Conv1d(2 if cumulative else 1, filters, kernel_size, padding=kernel_size // 2, bias=False)
        self.U = nn.Linear(filters, key_dim, bias=False)

    def start(self, memory: Memory) -> Looked:
        """Nothing has been looked at."""
        return Looked(zeros(memory), zeros(memory))

    def step(self, query: Tensor, memory: Memory, state: Looked) -> Step:
        """One query of each sample, (..., Dq)."""
        last, total = of_keys(memory, state.weights), of_keys(memory, state.total)
        seen = torch.stack([last, total] if self.cumulative else [last], -2).mT
        shift = Shift(seen, self.U.weight, self.filters.weight)
        weights = memory.normalizer(memory.scores(checked(query, memory, "Dq"), shift=shift))
        return Step(memory.read(weights), weights, Looked(weights, total + weights))
