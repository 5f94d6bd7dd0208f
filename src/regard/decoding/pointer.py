"""Pointing: probabilities of the keys themselves, and of the words that stand at them."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.decoding.memory import Memory
from regard.masks import Mask
from regard.normalizers import Softmax
from regard.reference import log_sum_exp, widened
from regard.transforms import may_look_at


def pointer(query: Tensor, memory: Memory, mask: Mask | Tensor | None = None) -> Tensor:
    """log p_j, the log-probability of pointing at each key: p = softmax_j(score(query, k_j)).

    Vinyals, Fortunato & Jaitly 2015, "Pointer Networks". It is the logarithm of `memory.weights`, and finite where
    these are too small for their dtype.

    Args:
        query: (..., Dq), one of each sample, or a row of them, (..., Lq, Dq).
        memory: whose keys are pointed at; its values are not read.
        mask: one more, of this step, as in `Memory.attend`: such as the keys that nothing pointed at before.

    Returns:
        (..., Lk) or (..., Lq, Lk), in float32 for half precision inputs: −inf for a key that may not be pointed at,
        and for every key, with gradient 0, where there is none to point at. `torch.nn.functional.nll_loss` takes it.

    Raises:
        ValueError, TypeError: as in `Memory.attend`; ValueError for a memory whose normalizer is not Softmax.

    >>> numbers = torch.tensor([[[0.7], [0.2], [0.9]], [[0.8], [0.3], [0.0]]])
    >>> memory = Memory(Dot(), numbers, numbers, Lengths(torch.tensor([3, 2])))
    >>> downwards, free = torch.tensor([[-1.0], [-1.0]]), memory.visible()
    >>> for _ in range(2):  # each key once, the smallest first
    ...     pointed = pointer(downwards, memory, free.unsqueeze(-2)).argmax(-1, keepdim=True)
    ...     free = free.scatter(-1, pointed, False)
    >>> free
    tensor([[False, False,  True],
            [False, False, False]])
    """
    if not isinstance(memory.normalizer, Softmax):
        raise ValueError(f"memory has the normalizer {memory.normalizer}; to be pointed at it must be Softmax()")
    return _log_softmax(memory.scores(query, mask))


def log_weights(weights: Tensor) -> Tensor:
    """log p of weights that came by other ways: −inf where p is 0, with gradient 0 there and not NaN.

    In float32 for half precision.

    >>> log_weights(torch.tensor([0.5, 0.5, 0.0]))
    tensor([-0.6931, -0.6931,    -inf])
    """
    weights = widened(weights)
    return weights.masked_fill(weights == 0, 1.0).log().masked_fill(weights == 0, -inf)


def pointer_generator(logits: Tensor, copy: Tensor, gate: Tensor, ids: Tensor, size: int) -> Tensor:
    """The log-probability of each word, generated from a vocabulary or copied from the keys:
    log P(w) = log(g P_vocab(w) + (1 − g) Σ_{j: id_j = w} p_j), g = sigmoid(gate), P_vocab = softmax(logits).

    See, Liu & Manning 2017, "Get To The Point: Summarization with Pointer-Generator Networks". Never NaN, and −inf
    only where P(w) is 0: gates of ±∞, words outside the vocabulary and rows without keys included. Where there is
    nothing to copy, 1 − g is lost, and all that is left sums to g.

    Args:
        logits: (..., V), of the vocabulary's words 0 .. V − 1; their log-probabilities are logits too.
        copy: (..., Lk), log p_j of each key, from `pointer`, or from `log_weights` of any attention's weights.
        gate: (...), the logit of g, the probability to generate.
        ids: int64, which word stands at each key; broadcasts to (..., Lk). Where p_j is 0 it may be any number.
        size: how many words there are with those outside the vocabulary, V .. size − 1; at least V.

    Returns:
        (..., size), in float32 for half precision.

    Raises:
        ValueError, TypeError: naming the argument, what was passed and what would fit. Whether ids lie in
            0 .. size − 1 is looked at on the CPU, and left to torch elsewhere.

    >>> source = torch.tensor([[2, 5, 2, 0]])  # word 5 is the first outside a vocabulary of 5; the last is padding
    >>> copy = log_weights(torch.tensor([[0.25, 0.5, 0.25, 0.0]]))
    >>> pointer_generator(torch.zeros(1, 5), copy, torch.zeros(1), source, size=6).exp()
    tensor([[0.1000, 0.1000, 0.3500, 0.1000, 0.1000, 0.2500]])
    """
    ids = _checked(logits, copy, gate, ids, size)
    generated = F.logsigmoid(widened(gate)).unsqueeze(-1) + _log_softmax(widened(logits))
    copied = F.logsigmoid(-widened(gate)).unsqueeze(-1) + _summed(widened(copy), ids, size)
    generated = F.pad(generated, (0, size - generated.shape[-1]), value=-inf)
    return log_sum_exp(torch.stack([generated, copied], -1))


def _log_softmax(scores: Tensor) -> Tensor:
    """The log-probabilities of scores (..., Lk): all −inf, with gradient 0, in a row of −inf only."""
    empty = (scores == -inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).log_softmax(-1).masked_fill(empty, -inf)


def _summed(copy: Tensor, ids: Tensor, size: int) -> Tensor:
    """(..., size): log Σ p_j over the keys of each word, whose largest is taken out before exp."""
    words = copy.new_full((*copy.shape[:-1], size), -inf)
    top = words.scatter_reduce(-1, ids, copy.detach(), "amax")
    top = top.masked_fill(top == -inf, 0.0)
    total = torch.zeros_like(words).scatter_add(-1, ids, (copy - top.gather(-1, ids)).exp())
    return top + log_weights(total)


def _checked(logits: Tensor, copy: Tensor, gate: Tensor, ids: Tensor, size: int) -> Tensor:
    """The ids (..., Lk), 0 where nothing is copied; ValueError or TypeError where the arguments do not fit."""
    for name, x in (("logits", logits), ("copy", copy), ("gate", gate)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} is {found}; it must be a Tensor of a floating type")
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise TypeError(f"ids is {ids.dtype if isinstance(ids, Tensor) else type(ids).__name__}; it must be int64")
    if not logits.dim() or logits.shape[:-1] != gate.shape or not copy.dim() or copy.shape[:-1] != gate.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (logits, copy, gate))
        raise ValueError(f"logits, copy and gate have shapes {shapes}; they must be (..., V), (..., Lk) and (...)")
    if not isinstance(size, int) or size < logits.shape[-1]:
        raise ValueError(f"size is {size!r}; it must be an int, at least the {logits.shape[-1]} of the vocabulary")
    try:
        ids = ids.expand(copy.shape)
    except RuntimeError:
        raise ValueError(f"ids has shape {tuple(ids.shape)}; it must broadcast to {tuple(copy.shape)}") from None
    ids = ids.masked_fill(copy == -inf, 0)
    if may_look_at(ids) and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(f"ids lie in {int(ids.min())} .. {int(ids.max())}; they must lie in 0 .. {size - 1}")
    return ids
