"""Forward attention against its definition in plain loops, and where that would run out of weight."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from regard.decoding.forward import Forward


def expected(y: np.ndarray, u: list[float]) -> np.ndarray:
    """Algorithm 1 of the paper: weights (Lq, Lk) of the softmax weights y and of the chance u to move on."""
    previous, rows = np.eye(y.shape[1])[0], []
    for t, row in enumerate(y):
        moved = np.array([(1 - u[t]) * p + u[t] * before for p, before in zip(previous, [0, *previous], strict=False)])
        previous = moved * row / (moved * row).sum()
        rows.append(previous)
    return np.array(rows)


def softmax(s: np.ndarray) -> np.ndarray:
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    "visible", [[0, 1, 2, 3, 4, 5], [0, 1, 2], [3, 4, 5], [1, 2, 4, 5]], ids=["all", "right", "left", "gap"]
)
@pytest.mark.parametrize("with_agent", [False, True])
def test_weights_are_those_of_the_definition(with_agent: bool, visible: list[int]) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(n, size, dtype=torch.float64) for n, size in ((8, 4), (6, 4), (6, 3)))
    agent = nn.Linear(3 + 4, 1).double()
    memory = regard.Memory(regard.Dot(), key, value, torch.tensor([j in visible for j in range(6)]))
    found = Forward(agent if with_agent else None)(query, memory)
    y = softmax(query.numpy() @ key.numpy()[visible].T)
    u = [0.5]
    for t in range(8):  # u of each step is of the context before
        context = torch.from_numpy(expected(y[: t + 1], u)[-1]) @ value[visible]
        u.append(torch.sigmoid(agent(torch.cat([context, query[t]]))).item() if with_agent else 0.5)
    p = np.zeros((8, 6))
    p[:, visible] = expected(y, u)
    np.testing.assert_allclose(found.weights.detach(), p, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found.context.detach(), p @ value.numpy(), rtol=1e-10, atol=1e-14)


def long(dtype: torch.dtype, spread: float, agent: nn.Module | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Weights of 40 steps over 1,000 keys from anywhere in the middle, and gradients."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, n, 8, generator=generator) for n in (40, 1000))
    direction = torch.randn(2, 40, 1000, generator=generator).to(dtype)
    query, key = (x.to(dtype).requires_grad_() for x in (spread * query, key))
    attention = Forward(agent).to(dtype)
    memory = regard.Memory(regard.ScaledDot(), key, key)
    somewhere = torch.randn(2, 1000, generator=generator).log_softmax(-1).to(dtype)
    state = attention.start(memory)._replace(log_weights=somewhere)
    weights = attention(query, memory, state).weights
    return weights, torch.autograd.grad((weights * direction).sum(), [query, key, *attention.parameters()])


@pytest.mark.parametrize("spread", [1.0, 100.0])
@pytest.mark.parametrize("with_agent", [False, True])
def test_a_thousand_keys_in_single_precision(with_agent: bool, spread: float) -> None:
    torch.manual_seed(0)
    agent = nn.Linear(16, 1) if with_agent else None
    weights, found = long(torch.float32, spread, agent)
    exact, true = long(torch.float64, spread, agent)
    assert (weights.sum(-1) - 1).abs().max() <= 1e-5
    assert (weights - exact).abs().max() <= 1e-5 * spread
    for x, y in zip(found, true, strict=True):
        assert (x - y).abs().max() <= 1e-5 * spread * y.abs().max()


def test_no_row_runs_out_of_weight() -> None:
    """Where the next keys match 300 nats worse than another that is out of reach, float32 has no such weights."""
    key = torch.zeros(6, 1)
    key[5] = 300.0
    query, state = torch.ones(7, 1, requires_grad=True), None
    weights = Forward()(query, regard.Memory(regard.Dot(), key, key), state).weights
    assert weights[0].tolist() == [0.5, 0.5, 0, 0, 0, 0]
    assert weights[4:, 5].eq(1).all()
    assert weights.sum(-1).allclose(torch.ones(7))
    (gradient,) = torch.autograd.grad(weights[:, 0].sum(), query)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("odds", [-200.0, 200.0])
def test_the_agent_cannot_move_it_off_the_end(odds: float) -> None:
    agent = nn.Linear(2, 1)
    nn.init.zeros_(agent.weight)
    nn.init.constant_(agent.bias, odds)
    x = torch.zeros(3, 1)
    weights = Forward(agent)(torch.zeros(6, 1), regard.Memory(regard.Dot(), x, x)).weights
    assert weights[0].tolist() == [0.5, 0.5, 0]
    last = [[0.5, 0.5, 0]] * 5 if odds < 0 else [[0, 0.5, 0.5], *[[0, 0, 1]] * 4]
    assert weights[1:].tolist() == last
    assert weights.sum(-1).allclose(torch.ones(6))
    for x in torch.autograd.grad(weights.square().sum(), list(agent.parameters())):
        assert x.isfinite().all()


def test_a_score_of_minus_infinity_is_not_looked_at() -> None:
    score = regard.FunctionScore(lambda query, key: torch.where(key.mT > 0, query * 0, -inf))
    key = torch.tensor([[1.0], [1.0], [-1.0], [1.0]])
    weights = Forward()(torch.ones(5, 1), regard.Memory(score, key, key)).weights
    assert weights[:, 2:].eq(0).all()  # it is no padding: the key is there, and cannot be passed
    assert weights.sum(-1).allclose(torch.ones(5))


def test_heads_go_their_own_ways() -> None:
    torch.manual_seed(0)
    score, agent = regard.Additive(4, 4, 8, heads=2), nn.Linear(4 + 4, 1)
    x = torch.randn(3, 6, 4)
    state = Forward(agent)(torch.randn(3, 2, 4), regard.Memory(score, x, x)).state
    assert state.transition.shape == (3, 2)
    assert state.transition[:, 0].ne(state.transition[:, 1]).all()


def test_errors() -> None:
    x = torch.ones(2, 3, 4)
    memory = regard.Memory(regard.Dot(), x, x)
    attention = Forward(nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"agent made shape \(2, 2\) of \(2, 8\); it must be \(2, 1\)"):
        attention.step(x[:, 0], memory, attention.start(memory))
