"""Monotonic alignment: the recursion of weights that only move to the right, in plain torch and as a C++ operator."""

from __future__ import annotations

import ctypes
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.kernels import cpu, ops

ops.LIBRARY.define("monotonic(Tensor logits, Tensor previous) -> (Tensor weights, Tensor gone)")
ops.LIBRARY.define(
    "monotonic_backward(Tensor logits, Tensor previous, Tensor weights, Tensor gone, Tensor grad_weights, "
    "Tensor grad_gone) -> (Tensor logits, Tensor previous)"
)


def run(logits: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """The weights (..., Lq, Lk) of each row, and what went by all its keys, (..., Lq).

    What the row before left at key j, and what comes from its left, stops at j with probability p_j =
    sigmoid(logits_j), or goes on: weights_j = p_j q_j, where q_j = (1 − p_{j−1}) q_{j−1} + previous_j.

    Args:
        logits: (..., Lq, Lk); −inf where nothing may stop.
        previous: (..., Lk), the weights before the first row.
    """
    leading, shape = torch.broadcast_shapes(logits.shape[:-2], previous.shape[:-1]), logits.shape[-2:]
    logits, previous = logits.expand(*leading, *shape), previous.expand(*leading, shape[-1])
    if not cpu.takes(logits, previous):
        return plain(logits, previous)
    samples = prod(leading)
    flat = logits.reshape(samples, *shape), previous.reshape(samples, shape[-1])
    weights, gone = torch.ops.regard.monotonic.default(*flat)
    return weights.reshape(logits.shape), gone.reshape(logits.shape[:-1])


def plain(logits: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """The same, of torch's own operations: for each row some more than the number of keys has binary digits."""
    weights, gone = [], []
    for p, log_go in zip(logits.sigmoid().unbind(-2), F.logsigmoid(-logits).unbind(-2), strict=True):
        arrived = arriving(F.pad(log_go, (1, 0)), F.pad(previous, (0, 1)))
        previous = p * arrived[..., :-1]
        weights.append(previous)
        gone.append(arrived[..., -1])
    return torch.stack(weights, -2), torch.stack(gone, -1)


def arriving(log_go: Tensor, left: Tensor) -> Tensor:
    """q_j = exp(log_go_j) q_{j−1} + left_j along the last dimension, where nothing comes to the first.

    Two places are one of a recursion of half the length, and so on: Blelloch 1990, "Prefix Sums and Their
    Applications". Factors stay logarithms, as products of what is nearly 1 would lose what little is missing.
    """
    n = left.shape[-1]
    if n == 1:
        return left
    go, left = (F.pad(x, (0, n % 2)).unflatten(-1, ((n + 1) // 2, 2)) for x in (log_go, left))
    (go_even, go_odd), (even, odd) = go.unbind(-1), left.unbind(-1)
    odd = arriving(go_even + go_odd, go_odd.exp() * even + odd)
    even = go_even.exp() * F.pad(odd[..., :-1], (1, 0)) + even
    return torch.stack([even, odd], -1).flatten(-2)[..., :n]


# --- The operator: logits (N, Lq, Lk), previous (N, Lk).


@torch.library.register_fake("regard::monotonic", lib=ops.LIBRARY)
def _(logits: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), logits.new_empty(logits.shape[:-1])


@torch.library.register_fake("regard::monotonic_backward", lib=ops.LIBRARY)
def _(logits: Tensor, previous: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), previous.new_empty(previous.shape)


def _monotonic(logits: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    weights, gone = logits.new_empty(logits.shape), logits.new_empty(logits.shape[:-1])
    _call("regard_monotonic", logits, previous, weights, gone)
    return weights, gone


def _monotonic_backward(
    logits: Tensor, previous: Tensor, weights: Tensor, gone: Tensor, grad_weights: Tensor, grad_gone: Tensor
) -> tuple[Tensor, Tensor]:
    by_logits, by_previous = logits.new_empty(logits.shape), previous.new_empty(previous.shape)
    _call("regard_monotonic_backward", logits, previous, weights, grad_weights, grad_gone, by_logits, by_previous)
    return by_logits, by_previous


def _call(name: str, logits: Tensor, previous: Tensor, *more: Tensor) -> None:
    """Calls the function of csrc/monotonic.cpp, which wants 1 − p as exact as p."""
    tensors = [x.contiguous() for x in (logits.sigmoid(), logits.neg().sigmoid(), previous, *more)]
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in tensors)
    getattr(cpu.installed(), name)(*map(ctypes.c_int64, logits.shape), *pointers)


class _Monotonic(ops.Saving):
    operator = torch.ops.regard.monotonic.default
    wants_results = True

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given, results = _Monotonic.saved(ctx)
        found = _MonotonicBackward.call(*given, *results, *grads)
        return tuple(x if need else None for x, need in zip(found, ctx.needs_input_grad, strict=True))


class _MonotonicBackward(ops.Saving):
    operator = torch.ops.regard.monotonic_backward.default

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (logits, previous, _, _, *grads), _ = _MonotonicBackward.saved(ctx)
        by = ops.of_gradients(plain, (logits, previous), grads, (True, True), cotangents)
        return *by[:2], None, None, *by[2:]


ops.LIBRARY.impl("monotonic", _monotonic, "CPU")
ops.LIBRARY.impl("monotonic_backward", _monotonic_backward, "CPU")
ops.register(_Monotonic)
ops.register(_MonotonicBackward)
