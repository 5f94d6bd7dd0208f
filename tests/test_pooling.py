"""Set poolings against their formulas, on ragged bags."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from regard import Lengths
from regard.pooling import (
    AttentionPooling,
    FullyConnectedPooling,
    GatedAttentionPooling,
    GatedPooling,
    MaxPooling,
    MeanPooling,
)

SIZES = [5, 2, 0]
BAGS = [torch.randn(size, 4) for size in SIZES]
LENS = Lengths(torch.tensor(SIZES))


def padded(filler: float = torch.nan) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(BAGS, batch_first=True, padding_value=filler)


FORMULAS: list[tuple[torch.nn.Module, Callable[..., Tensor]]] = [
    (MeanPooling(), lambda pool, x: x.mean(0)),
    (MaxPooling(), lambda pool, x: x.amax(0)),
    (GatedPooling(4), lambda pool, x: (torch.sigmoid(pool.w(x)) * x).sum(0)),
    (AttentionPooling(4, 6), lambda pool, x: (pool.w(torch.tanh(pool.V(x))).softmax(0) * x).sum(0)),
    (
        GatedAttentionPooling(4, 6),
        lambda pool, x: (pool.w(torch.tanh(pool.V(x)) * torch.sigmoid(pool.U(x))).softmax(0) * x).sum(0),
    ),
    (
        FullyConnectedPooling(5, 4, 4),
        lambda pool, x: pool.W(torch.cat([x, torch.zeros(5 - len(x), 4)]).flatten()),
    ),
]
each_pooling = pytest.mark.parametrize(("pool", "formula"), FORMULAS, ids=lambda x: type(x).__name__)


@each_pooling
def test_formula_on_each_bag(pool: torch.nn.Module, formula: Callable[..., Tensor]) -> None:
    pooled = pool(padded(), LENS)
    assert pooled.shape == (3, 4)
    for found, bag in zip(pooled, BAGS, strict=True):
        empty = len(bag) == 0 and not isinstance(pool, FullyConnectedPooling)
        torch.testing.assert_close(found, torch.zeros(4) if empty else formula(pool, bag))


@each_pooling
def test_padding_reaches_no_gradient(pool: torch.nn.Module, formula: Callable[..., Tensor]) -> None:
    items = padded().requires_grad_()
    pool.zero_grad()
    pool(items, LENS).square().sum().backward()
    assert items.grad is not None
    assert items.grad[1, 2:].eq(0).all()
    for gradient in (items.grad, *(p.grad for p in pool.parameters())):
        assert gradient is not None
        assert gradient.isfinite().all()


@each_pooling
def test_no_mask_and_bool_masks(pool: torch.nn.Module, formula: Callable[..., Tensor]) -> None:
    torch.testing.assert_close(pool(padded()[:1]), formula(pool, BAGS[0])[None])
    present = (torch.arange(5) < torch.tensor(SIZES)[:, None])[:, None]
    torch.testing.assert_close(pool(padded(), present), pool(padded(), LENS))


def test_weights_of_the_items() -> None:
    pool = GatedAttentionPooling(4, 6)
    seen = pool.attention(padded(), LENS)
    torch.testing.assert_close(seen.weights().sum(-1).flatten(), torch.tensor([1.0, 1.0, 0.0]))
    assert seen.weights()[1, 0, 2:].eq(0).all()


def test_fully_connected_pooling_needs_its_number_of_items() -> None:
    with pytest.raises(ValueError, match=r"items has shape \(2, 3, 4\); this pooling is for 5 items a bag"):
        FullyConnectedPooling(5, 4, 2)(torch.randn(2, 3, 4))
