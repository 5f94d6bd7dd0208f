"""Normalizers: what turns a row of scores into weights.

Each takes scores (..., Lk) that are −inf where nothing may be attended and returns weights of the same shape
that are exactly 0 there, with gradient 0; a row of −inf only has weights 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor
from torch.nn import functional as F

from regard import reference


class Normalizer(ABC):
    """Scores to weights, along the last dimension."""

    @abstractmethod
    def __call__(self, scores: Tensor) -> Tensor:
        """Weights of the same shape as the scores (..., Lk)."""


@dataclass(frozen=True)
class Softmax(Normalizer):
    """p_j = exp(s_j) / Σ_k exp(s_k).

    >>> Softmax()(torch.tensor([1.0, 0.0, -torch.inf]))
    tensor([0.7311, 0.2689, 0.0000])
    """

    def __call__(self, scores: Tensor) -> Tensor:
        return reference.softmax(scores)


@dataclass(frozen=True)
class Sparsemax(Normalizer):
    """p_j = max(s_j − τ, 0) with τ such that Σ_j p_j = 1: exact zeros for low scores.

    Martins & Astudillo 2016, "From Softmax to Sparsemax".

    >>> Sparsemax()(torch.tensor([1.0, 0.4, -1.0]))
    tensor([0.8000, 0.2000, 0.0000])
    """

    def __call__(self, scores: Tensor) -> Tensor:
        s, empty = _centred(scores)
        with torch.no_grad():
            descending = s.sort(-1, descending=True).values
            size = _ranks(s)
            threshold = (descending.cumsum(-1) - 1) / size
            support = s >= _at_last(descending, descending > threshold)
        tau = (s.masked_fill(~support, 0.0).sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
        return (s - tau).masked_fill(~support | empty, 0.0)


@dataclass(frozen=True)
class Entmax15(Normalizer):
    """p_j = max(s_j / 2 − τ, 0)² with τ such that Σ_j p_j = 1: between softmax and sparsemax.

    Peters, Niculae & Martins 2019, "Sparse Sequence-to-Sequence Models".

    >>> Entmax15()(torch.tensor([1.0, 0.4, -2.0]))
    tensor([0.7073, 0.2927, 0.0000])
    """

    def __call__(self, scores: Tensor) -> Tensor:
        s, empty = _centred(scores)
        s = s / 2
        with torch.no_grad():
            descending = s.sort(-1, descending=True).values
            size = _ranks(s)
            mean = descending.cumsum(-1) / size
            variance = descending.square().cumsum(-1) / size - mean.square()
            threshold = mean - (1 / size - variance).clamp(min=0).sqrt()
            support = s >= _at_last(descending, descending >= threshold)
        size = support.sum(-1, keepdim=True)
        mean = s.masked_fill(~support, 0.0).sum(-1, keepdim=True) / size
        variance = (s - mean).masked_fill(~support, 0.0).square().sum(-1, keepdim=True) / size
        tau = mean - (1 / size - variance).sqrt()
        return (s - tau).masked_fill(~support | empty, 0.0).square()


@dataclass(frozen=True)
class Sigmoid(Normalizer):
    """p_j = 1 / (1 + exp(−s_j)): each key on its own, so that a row need not sum to 1.

    >>> Sigmoid()(torch.tensor([0.0, 2.0, -torch.inf]))
    tensor([0.5000, 0.8808, 0.0000])
    """

    def __call__(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores)


# The sparse normalizers find the support without gradients and then write τ in closed form on it: ordinary
# differentiable code, which double backward, vmap and forward mode go through. The floor stands for −inf: far
# enough below the largest score (0) to be outside every support, and finite, so that no sum is NaN.
_FLOOR = -1e4


def _centred(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores with their row's largest at 0 and −inf at a finite floor, and which rows are empty (..., 1)."""
    top = _largest(scores.detach())
    empty = top == -inf
    return (scores - top.masked_fill(empty, 0.0)).clamp(min=_FLOOR), empty


def _ranks(s: Tensor) -> Tensor:
    return torch.arange(1, s.shape[-1] + 1, device=s.device, dtype=s.dtype)


def _at_last(descending: Tensor, supported: Tensor) -> Tensor:
    """The smallest supported score of each row."""
    return -_largest(-descending.masked_fill(~supported, inf))


def _largest(s: Tensor) -> Tensor:
    """Of each row; −inf for a row of no keys."""
    return F.pad(s, (0, 1), value=-inf).amax(-1, keepdim=True) if s.shape[-1] == 0 else s.amax(-1, keepdim=True)
