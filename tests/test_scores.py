"""Every scoring function against its textbook line, in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import regard
from regard import scores

Q, K = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
PAIRWISE = Q[:, :, None] - K[:, None]


def hidden(score: regard.Additive) -> Tensor:
    return Q[:, :, None] @ score.W_q.weight.mT + K[:, None] @ score.W_k.weight.mT


def cosine(score: regard.Cosine) -> Tensor:
    return torch.nn.functional.cosine_similarity(Q[:, :, None], K[:, None], dim=-1) / score.temperature


# One line for each class; a new one fails the test below until its line is here.
TEXTBOOK: dict[type[regard.Score], tuple[Callable[[], regard.Score], Callable[..., Tensor]]] = {
    regard.Dot: (regard.Dot, lambda score: torch.einsum("bid,bjd->bij", Q, K)),
    regard.ScaledDot: (regard.ScaledDot, lambda score: torch.einsum("bid,bjd->bij", Q, K) / 4**0.5),
    regard.Bilinear: (
        lambda: regard.Bilinear(4, 4),
        lambda score: torch.einsum("bjd,de,bie->bij", K, score.W.weight, Q),
    ),
    regard.Cosine: (lambda: regard.Cosine(0.1), cosine),
    regard.Gaussian: (lambda: regard.Gaussian(0.5), lambda score: -0.5 * (PAIRWISE / 0.5).square().sum(-1)),
    regard.Laplace: (lambda: regard.Laplace(0.5), lambda score: -(PAIRWISE / 0.5).abs().sum(-1)),
    regard.Additive: (
        lambda: regard.Additive(4, 4, 6),
        lambda score: torch.tanh(hidden(score)) @ score.w_v.weight[0],
    ),
    regard.GATv2: (
        lambda: regard.GATv2(4, 4, 6),
        lambda score: torch.nn.functional.leaky_relu(hidden(score), 0.2) @ score.w_v.weight[0],
    ),
    regard.FunctionScore: (
        lambda: regard.FunctionScore(lambda query, key: (query @ key.mT).cos()),
        lambda score: torch.einsum("bid,bjd->bij", Q, K).cos(),
    ),
}


def test_every_class_has_its_line() -> None:
    public = {
        each
        for name, each in inspect.getmembers(scores, inspect.isclass)
        if issubclass(each, scores.Score) and each is not scores.Score and not name.startswith("_")
    }
    assert public == set(TEXTBOOK)


@pytest.mark.parametrize("kind", TEXTBOOK, ids=lambda kind: kind.__name__)
def test_is_its_textbook_line(kind: type[regard.Score]) -> None:
    make, line = TEXTBOOK[kind]
    score = make().double()
    found = score.pair()(score.project_query(Q), score.project_key(K))
    torch.testing.assert_close(found, line(score))
    p = regard.weights(Q, K, score)
    torch.testing.assert_close(p, line(score).softmax(-1))


@pytest.mark.parametrize("activation", ["tanh", "relu", "leaky_relu", "sigmoid"])
def test_activations_bias_and_weight_norm(activation: scores.Activation) -> None:
    score = regard.Additive(4, 4, 6, activation=activation, bias=True, weight_norm=True, negative_slope=0.1).double()
    functions = {"leaky_relu": lambda x: torch.nn.functional.leaky_relu(x, 0.1)}
    f = functions.get(activation, getattr(torch, activation, None))
    assert f is not None
    assert score.g is not None
    with torch.no_grad():
        score.g.mul_(3)
    v = score.w_v.weight[0]
    expected = f(hidden(score) + score.W_q.bias) @ (score.g[0] * v / v.norm())
    torch.testing.assert_close(score.pair()(score.project_query(Q), score.project_key(K)), expected)


def test_gaussian_is_exact_far_from_the_origin() -> None:
    query, key = torch.tensor([[1000.0]]), torch.tensor([[1000.0], [1000.5]])
    exact = torch.tensor([[0.0, -0.125]], dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(regard.weights(query, key, regard.Gaussian()).double(), exact, atol=1e-7, rtol=0)


def test_bandwidth_is_learnt_when_asked() -> None:
    x = torch.randn(4, 2)
    score = regard.Gaussian(2.0, learnable=True)
    regard.attend(x, x, x, score).square().sum().backward()
    assert isinstance(score.bandwidth, torch.nn.Parameter)
    assert score.bandwidth.grad is not None
    assert score.bandwidth.grad != 0
    assert list(regard.Gaussian(2.0).parameters()) == []


def test_sizes_read_from_the_first_call() -> None:
    score = regard.Additive(None, None, 6)
    regard.attend(torch.randn(1, 3), torch.randn(2, 5), torch.randn(2, 1), score)
    assert score.W_q.weight.shape == (6, 3)
    assert score.W_k.weight.shape == (6, 5)


def test_function_score_owns_the_module_it_calls() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            return self.linear(query) @ key.mT

    assert len(list(regard.FunctionScore(Net()).parameters())) == 2


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="activation is 'gelu'; it must be 'tanh'"):
        regard.Additive(2, 2, 2, activation="gelu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="heads is 0"):
        regard.Additive(2, 2, 2, heads=0)
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        regard.Cosine(0.0)
    with pytest.raises(ValueError, match=r"bandwidth is -1\.0"):
        regard.Gaussian(-1.0)
    with pytest.raises(ValueError, match=r"returned shape \(1, 5\)"):
        regard.attend(Q, K, K, regard.FunctionScore(lambda query, key: torch.zeros(1, 5)))
