"""The definition of attention, on one page.

    s[i, j] = pair(a_i, b_j) + bias[i, j]        a = projected query i, b = projected key j
    p[i, :] = normalize(s[i, :])                 over the keys that row i may attend
    out[i]  = sum_j p[i, j] v_j

A row with no key it may attend has weights 0 and output 0. Every other path computes exactly this.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# --- Pairs: how one projected query a_i and one projected key b_j make a score.
# a: (..., Lq, D), b: (..., Lk, D), scores: (..., Lq, Lk). Half precision is widened to float32 first.


class DotPair(NamedTuple):
    """scale · a_i · b_j, where scale None means 1 / sqrt(D)."""

    scale: float | None = None
    fused = True  # it makes nothing of size Lq × Lk × D

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        scale = 1 / sqrt(max(1, a.shape[-1])) if self.scale is None else self.scale
        return product(widened(a) * scale, widened(b).mT)


class AdditivePair(NamedTuple):
    """Σ_h v_h · activation(a_ih + b_jh)."""

    v: Tensor  # (1, D) for all heads, or (heads, 1, 1, D)
    activation: str = "tanh"
    negative_slope: float = 0.2

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        features = activate(self, widened(a).unsqueeze(-2) + widened(b).unsqueeze(-3))
        return (features * widened(self.v)).sum(-1)


class L1Pair(NamedTuple):
    """−Σ_h |a_ih − b_jh|."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return -(widened(a).unsqueeze(-2) - widened(b).unsqueeze(-3)).abs().sum(-1)


class L2Pair(NamedTuple):
    """−½ Σ_h (a_ih − b_jh)²: the difference is taken first, for a² − 2ab + b² cancels."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return -0.5 * (widened(a).unsqueeze(-2) - widened(b).unsqueeze(-3)).square().sum(-1)


class FunctionPair(NamedTuple):
    """Whatever function(a, b) returns, as (..., Lq, Lk)."""

    function: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        scores = self.function(a, b)
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            raise TypeError(f"the scoring function returned {scores!r}; it must return a Tensor of a floating type")
        if scores.shape[-2:] != (a.shape[-2], b.shape[-2]):
            raise ValueError(
                f"the scoring function returned shape {tuple(scores.shape)} for query {tuple(a.shape)} and "
                f"key {tuple(b.shape)}; it must return (..., {a.shape[-2]}, {b.shape[-2]})"
            )
        return scores.to(widened(a).dtype)


Pair = Callable[[Tensor, Tensor], Tensor]  # these, or one that a user's own score brings


def activate(pair: AdditivePair, x: Tensor) -> Tensor:
    """The additive pair's activation of x."""
    match pair.activation:
        case "tanh":
            return torch.tanh(x)
        case "sigmoid":
            return torch.sigmoid(x)
        case "relu":
            return torch.relu(x)
        case "leaky_relu":
            return F.leaky_relu(x, pair.negative_slope)
    raise ValueError(f"activation is {pair.activation!r}; it must be tanh, sigmoid, relu or leaky_relu")


# --- Normalising: scores are −inf where nothing may be attended; weights are 0 there, in every dtype.


def softmax(scores: Tensor) -> Tensor:
    """exp(s) / Σ exp(s) along the last dimension, and 0 in a row of −inf only."""
    if torch.compiler.is_compiling():  # which traces the operator only by its full name
        return torch.ops.aten._safe_softmax.default(scores, -1)
    return torch._safe_softmax(scores, -1)  # pyright: ignore[reportPrivateImportUsage]


def log_sum_exp(scores: Tensor) -> Tensor:
    """log Σ exp(s) along the last dimension: −inf, with gradient 0, for a row of −inf only."""
    empty = (scores == -inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty.squeeze(-1), -inf)


# --- Attention.


def scores(query: Tensor, key: Tensor, pair: Pair, allowed: Tensor | None, bias: Tensor | None) -> Tensor:
    """(..., Lq, Lk): the scores, −inf where `allowed` is False."""
    s = pair(query, per_query_head(key, query))
    if bias is not None:
        s = s + bias.to(s.dtype)
    return s if allowed is None else torch.where(allowed, s, -inf)


def weights(
    query: Tensor,
    key: Tensor,
    pair: Pair,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    normalize: Callable[[Tensor], Tensor] = softmax,
) -> Tensor:
    """(..., Lq, Lk): how much each query attends to each key, before dropout."""
    return normalize(scores(query, key, pair, allowed, bias))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pair: Pair,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    normalize: Callable[[Tensor], Tensor] = softmax,
    kept: Tensor | None = None,
) -> Tensor:
    """(..., Lq, Dv): the weighted sum of the values; `kept` is dropout's factor for each weight."""
    p = weights(query, key, pair, allowed, bias, normalize)
    if kept is not None:
        p = p * kept
    return product(p, widened(per_query_head(value, query))).to(value.dtype)


def widened(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own precision, which autocast would lower."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(a.device.type):
        with torch.autocast(a.device.type, enabled=False):
            return a @ b
    plain = a.dim() == b.dim() == 3 and a.shape[0] == b.shape[0]
    return torch.bmm(a, b) if plain else a @ b  # the same, without looking for what to broadcast


def per_query_head(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values (..., Hkv, Lk, D) repeated for grouped query heads (..., Hq, Lq, D)."""
    if x.dim() < 3 or query.dim() < 3 or x.shape[-3] in (1, query.shape[-3]) or query.shape[-3] == 1:
        return x
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], -3)
