"""Local attention: each step sees a window of keys, around a place that is counted or predicted."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regard.decoding.memory import Memory
from regard.decoding.step import Step, Stepwise, check_samples, checked
from regard.reference import widened
from regard.scores import through


class Counted(NamedTuple):
    """How many steps there were."""

    steps: Tensor  # int64 (...)


class Nothing(NamedTuple):
    """No step depends on those before."""


class LocalMonotonic(Stepwise[Counted]):
    """Attention to the keys t − D … t + D alone in step t, counted from 0: *local-m* of Luong, Pham & Manning 2015,
    "Effective Approaches to Attention-based Neural Machine Translation".

    A key's place is its number among the sample's visible keys, also counted from 0. Steps that are more than D past
    the last of them have weights 0. Heads of the score's own share one window.

    Args:
        window: D, how many keys are seen on either side.

    Raises:
        ValueError: for a window below 1.

    >>> x = torch.zeros(4, 8)
    >>> context, weights, state = LocalMonotonic(window=1)(x, Memory(Dot(), x, x))
    >>> weights
    tensor([[0.5000, 0.5000, 0.0000, 0.0000],
            [0.3333, 0.3333, 0.3333, 0.0000],
            [0.0000, 0.3333, 0.3333, 0.3333],
            [0.0000, 0.0000, 0.5000, 0.5000]])
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        _check_positive(window=window)
        self.window = window

    def start(self, memory: Memory) -> Counted:
        """There was no step."""
        visible = memory.visible()
        return Counted(visible.new_zeros(visible.shape[:-1], dtype=torch.int64))

    def step(self, query: Tensor, memory: Memory, state: Counted) -> Step:
        """One query of each sample, (..., Dq)."""
        return _of_one(self.forward(checked(query, memory, "Dq").unsqueeze(-2), memory, state))

    def forward(self, query: Tensor, memory: Memory, state: Counted | None = None) -> Step:
        """A row of queries (..., Lq, Dq), all at once: what `step` gives for each, and the last state."""
        query = checked(query, memory, "Lq", "Dq")
        (steps,), count = self.start(memory) if state is None else state, query.shape[-2]
        check_samples(memory, steps.shape)
        place = steps.unsqueeze(-1) + torch.arange(count, device=steps.device)
        weights, _ = _near(query, memory, place, self.window)
        steps = (steps + count).expand(weights.shape[:-2])
        return Step(memory.read(weights), weights, Counted(steps))

    def extra_repr(self) -> str:
        return f"window={self.window}"


class LocalPredictive(Stepwise[Nothing]):
    """Attention near a place that each query predicts: *local-p* of Luong, Pham & Manning 2015, "Effective Approaches
    to Attention-based Neural Machine Translation".

    p_j = softmax_j(score(q, k_j)) · exp(−(j − m)² / 2σ²), where m = S · sigmoid(v_p · tanh(W_p q)) and σ = D / 2, with
    the softmax over the keys in m − D … m + D. As in the paper, the product is not normalised again: weights sum to
    less than 1. j is the key's number, from 0, among the S keys of the sample that are visible. Heads of the score's
    own share one place.

    Args:
        query_dim: the size of queries.
        hidden_dim: hidden units of the prediction.
        window: D, how many keys are seen on either side.

    Raises:
        ValueError: for a size or a window below 1.

    >>> score, encoded = Additive(query_dim=6, key_dim=4, hidden_dim=8), torch.randn(2, 10, 4)
    >>> memory = Memory(score, encoded, encoded, Lengths(torch.tensor([3, 10])))
    >>> context, weights, _ = LocalPredictive(query_dim=6, hidden_dim=8, window=2)(torch.randn(2, 5, 6), memory)
    >>> context.shape, weights.shape
    (torch.Size([2, 5, 4]), torch.Size([2, 5, 10]))
    """

    def __init__(self, query_dim: int, hidden_dim: int, window: int) -> None:
        super().__init__()
        _check_positive(query_dim=query_dim, hidden_dim=hidden_dim, window=window)
        self.window = window
        self.W_p = nn.Linear(query_dim, hidden_dim, bias=False)
        self.v_p = nn.Linear(hidden_dim, 1, bias=False)

    def start(self, memory: Memory) -> Nothing:
        """There is nothing to know."""
        return Nothing()

    def step(self, query: Tensor, memory: Memory, state: Nothing) -> Step:
        """One query of each sample, (..., Dq)."""
        return _of_one(self.forward(checked(query, memory, "Dq").unsqueeze(-2), memory, state))

    def forward(self, query: Tensor, memory: Memory, state: Nothing | None = None) -> Step:
        """A row of queries (..., Lq, Dq), all at once: what `step` gives for each."""
        query = checked(query, memory, "Lq", "Dq")
        part = torch.sigmoid(widened(self.v_p(torch.tanh(through(self.W_p, query, "query"))))).squeeze(-1)
        visible = memory.visible()
        place = visible.sum(-1, keepdim=True) * (part.unsqueeze(-2) if memory.score.heads > 1 else part)
        weights, distance = _near(query, memory, place, self.window)
        weights = weights * torch.exp(-2 * (distance / self.window).square())
        return Step(memory.read(weights), weights, Nothing())

    def extra_repr(self) -> str:
        return f"window={self.window}"


def _near(query: Tensor, memory: Memory, place: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Weights of the keys in the window around each query's place (..., Lq), and how far each key is from there."""
    distance = (memory.visible().cumsum(-1) - 1).unsqueeze(-2) - place.unsqueeze(-1)
    scores = memory.scores(query)
    return memory.normalizer(torch.where(distance.abs() <= window, scores, -inf)), distance


def _of_one(row: Step) -> Step:
    return Step(row.context.squeeze(-2), row.weights.squeeze(-2), row.state)


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be 1 or more")
