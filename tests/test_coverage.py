"""Coverage against its definition in plain loops, and its loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import regard
from regard.decoding.coverage import Coverage, coverage_loss


def test_weights_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    score, attention = regard.Additive(3, 4, 6), Coverage(key_dim=6)
    torch.nn.init.normal_(attention.w_c.weight)
    query, key, lens = torch.randn(2, 5, 3), torch.randn(2, 7, 4), [7, 4]
    memory = regard.Memory(score, key, key, regard.Lengths(torch.tensor(lens)))
    found = attention(query, memory)
    w_q, w_k, v, w_c = (
        p.detach().double().numpy()
        for p in (score.W_q.weight, score.W_k.weight, score.w_v.weight[0], attention.w_c.weight[:, 0])
    )
    for n, keys in enumerate(lens):
        total = np.zeros(7)
        for t in range(5):
            a, b = w_q @ query[n, t].double().numpy(), key[n].double().numpy() @ w_k.T
            s = np.array([v @ np.tanh(a + b[j] + w_c * total[j]) for j in range(keys)])
            p = np.pad(np.exp(s) / np.exp(s).sum(), (0, 7 - keys))
            total += p
            np.testing.assert_allclose(found.weights[n, t].detach(), p, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.state.total[n].detach(), total, rtol=1e-5, atol=1e-6)


def test_the_loss_is_what_is_looked_at_again() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 9, 4)
    p = regard.attention(query, key, key).weights()  # of any attention
    found = coverage_loss(p)
    assert found.shape == (2, 3, 5)
    for index in np.ndindex(2, 3, 5):
        *sample, t = index
        rows = p[tuple(sample)].double()
        true = sum(min(rows[t, j], rows[:t, j].sum()) for j in range(9))
        assert abs(found[index] - true) <= 1e-6
    assert coverage_loss(torch.eye(4)).eq(0).all()
    assert coverage_loss(torch.full((5, 4), 0.25))[1:].eq(1).all()


def test_the_loss_of_what_attends_nothing_is_zero() -> None:
    x = torch.randn(2, 4, 3, requires_grad=True)
    p = regard.attention(x, x, x, mask=regard.Lengths(torch.tensor([2, 0]))).weights()
    loss = coverage_loss(p)
    assert loss[1].eq(0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert gradient[0].ne(0).any()
    assert gradient[1].eq(0).all()
    for shape in ((0, 3), (3, 0), (2, 0, 0)):
        assert coverage_loss(torch.ones(shape)).equal(torch.zeros(shape[:-1]))


def test_the_loss_of_half_precision_is_summed_in_single() -> None:
    p = torch.full((1001, 1), 0.1, dtype=torch.float16)
    p[-1] = 1000
    loss = coverage_loss(p)
    assert loss.dtype == torch.float32
    assert loss[-1].item() == pytest.approx(1000 * p[0].item(), rel=1e-6)  # float16 has 100.0 next


def test_the_loss_is_differentiable() -> None:
    p = torch.rand(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(coverage_loss, p)


def test_errors() -> None:
    with pytest.raises(ValueError, match="key_dim is 0; it must be 1 or more"):
        Coverage(0)
    with pytest.raises(ValueError, match=r"weights has shape \(3,\); it must be \(..., length, size\)"):
        coverage_loss(torch.ones(3))
    with pytest.raises(TypeError, match=r"weights has dtype torch\.int64; it must be a floating type"):
        coverage_loss(torch.ones(3, 3, dtype=torch.int64))
