"""Normalizers against their definitions, with masked rows."""

from __future__ import annotations

import entmax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import regard
from regard import Entmax15, Normalizer, Sigmoid, Softmax, Sparsemax

NORMALIZERS = (Softmax(), Sparsemax(), Entmax15(), Sigmoid())
MASKED = torch.tensor([[0.3, -torch.inf, 1.2, -0.4], [-torch.inf] * 4])


@pytest.mark.parametrize(
    ("normalizer", "known"), [(Sparsemax(), entmax.sparsemax), (Entmax15(), entmax.entmax15)], ids=str
)
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_the_sparse_ones_agree_with_their_authors(normalizer: Normalizer, known, size: float) -> None:
    scores = size * torch.randn(200, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(normalizer(scores), known(scores, dim=-1))


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=str)
def test_masked_scores_get_nothing(normalizer: Normalizer) -> None:
    scores = MASKED.clone().requires_grad_()
    p = normalizer(scores)
    assert p[0, 1] == 0
    assert p[1].eq(0).all()
    torch.testing.assert_close(p[0, [0, 2, 3]], normalizer(MASKED[0, [0, 2, 3]]))
    p.square().sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert scores.grad[0, 1] == 0
    assert scores.grad[1].eq(0).all()


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=str)
def test_gradients_of_both_orders(normalizer: Normalizer) -> None:
    scores = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def masked(scores: Tensor) -> Tensor:
        return normalizer(scores.masked_fill(torch.tensor([False, True, False, False, False]), -torch.inf))

    assert torch.autograd.gradcheck(masked, scores)
    assert torch.autograd.gradgradcheck(masked, scores)


@pytest.mark.parametrize("normalizer", NORMALIZERS[:3], ids=str)
@given(scores=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8))
def test_rows_sum_to_one_and_keep_the_order(normalizer: Normalizer, scores: list[float]) -> None:
    p = normalizer(torch.tensor(scores))
    assert float(p.sum()) == pytest.approx(1, abs=2e-3 if isinstance(normalizer, Entmax15) else 1e-4)
    assert p.min() >= 0
    assert p[torch.tensor(scores).argmax()] == p.max()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=str)
def test_through_attention(normalizer: Normalizer, impl: str) -> None:
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(2))
    lens = regard.Lengths(torch.tensor([3, 0]))
    seen = regard.attention(x, x, x, mask=lens, normalizer=normalizer, impl=impl)
    torch.testing.assert_close(seen.out, seen.weights() @ x)
    torch.testing.assert_close(seen.weights()[0, :, :3], normalizer(x[0] @ x[0, :3].mT * 3**-0.5))
    assert seen.weights()[1].eq(0).all()
    assert (seen.lse is None) == (not isinstance(normalizer, Softmax))


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=str)
def test_no_keys(normalizer: Normalizer) -> None:
    assert normalizer(torch.zeros(2, 0)).shape == (2, 0)
