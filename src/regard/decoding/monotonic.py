"""Monotonic attention: each step goes on from the key where the last one stopped, and never back."""

from __future__ import annotations

from math import inf
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.decoding.memory import Memory
from regard.decoding.step import Step, Stepwise, checked, of_keys, zeros
from regard.kernels import monotonic
from regard.reference import softmax


class Aligned(NamedTuple):
    """Where the last step stopped."""

    weights: Tensor  # (..., Lk)
    ended: Tensor  # (...), how likely a step has gone past the last key: the two sum to 1


class InChunks(NamedTuple):
    """Where the last step stopped, and the same keys by the score that shares out what they get of a chunk."""

    weights: Tensor
    ended: Tensor
    chunks: Memory


S = TypeVar("S", bound="Aligned | InChunks")


class _Monotonic(Stepwise[S]):
    """What Monotonic and MonotonicChunkwise have in common."""

    def __init__(self, offset: float, noise: float, hard: bool) -> None:
        super().__init__()
        if not noise >= 0:
            raise ValueError(f"noise is {noise}; it must be a standard deviation, 0 or more")
        self.noise, self.hard = noise, hard
        self.r = nn.Parameter(torch.tensor(float(offset)))

    def step(self, query: Tensor, memory: Memory, state: S) -> Step:
        """One query of each sample, (..., Dq)."""
        context, weights, now = self.forward(checked(query, memory, "Dq").unsqueeze(-2), memory, state)
        return Step(context.squeeze(-2), weights.squeeze(-2), now)

    def align(self, query: Tensor, memory: Memory, state: S) -> tuple[Tensor, S]:
        """The weights (..., Lq, Lk) with which each of a row of queries stops at each key, and the last state."""
        logits = memory.scores(checked(query, memory, "Lq", "Dq")) + self.r
        if not logits.shape[-2]:
            raise ValueError(f"query has shape {tuple(query.shape)}; there must be one query or more")
        if self.training and self.noise:
            logits = logits + self.noise * torch.randn_like(logits)
        if self.hard and not self.training:
            logits = logits.masked_fill(logits > 0, inf).masked_fill(logits <= 0, -inf)
        weights, gone = monotonic.run(logits, of_keys(memory, state.weights))
        return weights, state._replace(weights=weights[..., -1, :], ended=state.ended + gone.sum(-1))

    def extra_repr(self) -> str:
        return f"noise={self.noise}, hard={self.hard}"


def _first(memory: Memory) -> Aligned:
    """All weight on the first key, or past the last where there is no key."""
    places = F.pad(zeros(memory), (0, 1))
    places[..., 0] = 1.0
    return Aligned(places[..., :-1], places[..., -1])


class Monotonic(_Monotonic[Aligned]):
    """Attention that goes through the keys from left to right, and stops at key j with probability p_j =
    sigmoid(s_j + r): each step goes on from the key where the last one stopped, which it may take again.

    In training each key's weight is the probability of stopping there, α_j = p_j q_j, q_j = (1 − p_{j−1}) q_{j−1} +
    α'_j, where α' are the weights of the step before: exactly so at any length, in O(Lk), without a division. In
    evaluation it takes the first key with p_j > ½, with weight 1. What stops nowhere has gone past the last key, and
    remains there: it attends nothing, and the context is 0. Hidden keys are passed over. Raffel et al. 2017, "Online
    and Linear-Time Attention by Enforcing Monotonic Alignments"; their scores are `Additive(..., weight_norm=True)`.
    The memory's normalizer is not used.

    Args:
        offset: the initial value of r, which is learnt; below 0 the first steps reach further.
        noise: the standard deviation of what is added to s_j + r in training, so that p learns to be 0 or 1.
        hard: whether it decides in evaluation; else it computes there what it does in training, without noise.

    Raises:
        ValueError: for negative noise.

    >>> memory, query = Memory(Dot(), torch.eye(4), torch.eye(4)), torch.tensor([[-9.0, 9, 0, 0], [9, -9, -9, 9]])
    >>> attention = Monotonic(noise=1.0).eval()
    >>> context, weights, state = attention(query, memory)
    >>> weights.tolist(), state.ended.item()
    ([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]], 0.0)
    """

    def __init__(self, offset: float = 0.0, noise: float = 0.0, *, hard: bool = True) -> None:
        super().__init__(offset, noise, hard)

    def start(self, memory: Memory) -> Aligned:
        """The first step begins at the first key."""
        return _first(memory)

    def forward(self, query: Tensor, memory: Memory, state: Aligned | None = None) -> Step:
        """A row of queries (..., Lq, Dq), whose scores are computed at once."""
        weights, now = self.align(query, memory, self.start(memory) if state is None else state)
        return Step(memory.read(weights), weights, now)


class MonotonicChunkwise(_Monotonic[Aligned | InChunks]):
    """Attention to a chunk of keys that ends where `Monotonic` stops: of α_k, the weight with which that stops at key
    k, the w keys up to k get shares by the softmax of scores u of their own,

    β_j = Σ_{k=j}^{j+w−1} α_k exp(u_j) / Σ_{l=k−w+1}^{k} exp(u_l).

    Chiu & Raffel 2018, "Monotonic Chunkwise Attention". A chunk without a key that may be attended gets nothing.

    Args:
        chunk_size: how many keys a chunk has, w; of one it is `Monotonic`.
        offset, noise, hard: as of `Monotonic`.

    Raises:
        ValueError: for a chunk_size that is not positive, or negative noise; from a step, for chunks that do not have
            the keys of the memory.

    >>> encoded = torch.randn(2, 10, 4)
    >>> memory, chunks = (Memory(Additive(6, 4, 8), encoded, encoded) for _ in range(2))
    >>> attention = MonotonicChunkwise(chunk_size=3)
    >>> state = attention.start(memory, chunks)
    >>> context, weights, state = attention.step(torch.randn(2, 6), memory, state)
    >>> context.shape, weights.shape
    (torch.Size([2, 4]), torch.Size([2, 10]))
    """

    def __init__(self, chunk_size: int, offset: float = 0.0, noise: float = 0.0, *, hard: bool = True) -> None:
        super().__init__(offset, noise, hard)
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}; it must be 1 or more")
        self.chunk_size = chunk_size

    def start(self, memory: Memory, chunks: Memory | None = None) -> Aligned | InChunks:
        """The first step begins at the first key.

        `chunks` has the same keys by a score of its own, which gives u; without, the memory's scores are u too. What
        is appended to the memory is to be appended to `state.chunks`.
        """
        return _first(memory) if chunks is None else InChunks(*_first(memory), chunks)

    def forward(self, query: Tensor, memory: Memory, state: Aligned | InChunks | None = None) -> Step:
        """A row of queries (..., Lq, Dq), whose scores are computed at once."""
        stops, now = self.align(query, memory, self.start(memory) if state is None else state)
        chunks = now.chunks if isinstance(now, InChunks) else memory
        if chunks.visible().shape != memory.visible().shape:
            raise ValueError(f"chunks is {chunks}; it must have as many keys and leading dimensions as {memory}")
        weights = _shared_out(stops, chunks.scores(query), self.chunk_size)
        return Step(memory.read(weights), weights, now)

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}, {super().extra_repr()}"


def _shared_out(stops: Tensor, scores: Tensor, size: int) -> Tensor:
    """Weights (..., Lk), each shared out to the chunk of keys that ends at its own, by the softmax of their scores."""
    keys = stops.shape[-1]
    if keys == 0:
        return stops
    chunks = F.pad(scores, (size - 1, 0), value=-inf).unfold(-1, size, 1)
    shares = softmax(chunks) * stops.unsqueeze(-1)  # (..., Lk, size)
    summed = F.fold(shares.reshape(-1, keys, size).mT, (1, keys + size - 1), (1, size))
    return summed[..., size - 1 :].reshape(stops.shape)
