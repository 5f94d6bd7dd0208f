"""Local attention against its definition in plain loops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import regard
from regard.decoding.local import LocalMonotonic, LocalPredictive

VISIBLE = {"all": [0, 1, 2, 3, 4, 5, 6], "right": [0, 1, 2], "left": [4, 5, 6], "gap": [1, 2, 5, 6]}
each_padding = pytest.mark.parametrize("visible", VISIBLE.values(), ids=VISIBLE)


def expected(s: np.ndarray, places: np.ndarray, window: int, gaussian: bool) -> np.ndarray:
    """Weights (Lq, Lk) of the scores of visible keys, seen from the places (Lq,)."""
    p = np.zeros_like(s)
    for t, place in enumerate(places):
        near = [j for j in range(s.shape[1]) if place - window <= j <= place + window]
        total = sum(np.exp(s[t, j]) for j in near)
        for j in near:
            p[t, j] = np.exp(s[t, j]) / total
            if gaussian:
                p[t, j] *= np.exp(-((j - place) ** 2) / (2 * (window / 2) ** 2))
    return p


@pytest.mark.parametrize("window", [1, 2, 9])
@each_padding
def test_the_counted_place(visible: list[int], window: int) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(8, 4), torch.randn(7, 4)
    memory = regard.Memory(regard.Dot(), key, key, torch.tensor([j in visible for j in range(7)]))
    found = LocalMonotonic(window)(query, memory)
    p = np.zeros((8, 7))
    s = query.double().numpy() @ key.double().numpy()[visible].T
    p[:, visible] = expected(s, np.arange(8), window, gaussian=False)
    np.testing.assert_allclose(found.weights, p, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.context, p @ key.numpy(), rtol=1e-4, atol=1e-5)
    assert found.state.steps == 8


@pytest.mark.parametrize("window", [1, 2, 9])
@each_padding
def test_the_predicted_place(visible: list[int], window: int) -> None:
    torch.manual_seed(0)
    query, key, attention = torch.randn(8, 4), torch.randn(7, 4), LocalPredictive(4, 5, window)
    for p in attention.parameters():
        torch.nn.init.normal_(p)
    memory = regard.Memory(regard.Dot(), key, key, torch.tensor([j in visible for j in range(7)]))
    found = attention(query, memory)
    w_p, v_p, q, k = (x.detach().double().numpy() for x in (attention.W_p.weight, attention.v_p.weight[0], query, key))
    places = len(visible) / (1 + np.exp(-np.tanh(q @ w_p.T) @ v_p))
    p = np.zeros((8, 7))
    p[:, visible] = expected(q @ k[visible].T, places, window, gaussian=True)
    np.testing.assert_allclose(found.weights.detach(), p, rtol=1e-4, atol=1e-6)
    assert found.weights.sum(-1).lt(1).all()  # not normalised again


def test_past_the_last_key_there_is_nothing() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    found = LocalMonotonic(1)(torch.randn(6, 4), regard.Memory(regard.Dot(), x, x))
    assert found.weights.sum(-1).tolist() == pytest.approx([1, 1, 1, 1, 0, 0])
    assert found.context[4:].eq(0).all()
    assert torch.autograd.grad(found.context.sum(), x)[0].isfinite().all()


def test_a_row_takes_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    scores = regard.Memory.scores
    monkeypatch.setattr(regard.Memory, "scores", lambda *given: asked.append(given) or scores(*given))
    x = torch.randn(2, 9, 4)
    for attention in (LocalMonotonic(2), LocalPredictive(4, 4, 2)):
        attention(torch.randn(2, 6, 4), regard.Memory(regard.Dot(), x, x))
    assert len(asked) == 2


ERRORS: list[tuple[Callable[[], object], str]] = [
    (lambda: LocalMonotonic(0), "window is 0; it must be 1 or more"),
    (lambda: LocalPredictive(4, 4, 0), "window is 0; it must be 1 or more"),
    (lambda: LocalPredictive(0, 4, 1), "query_dim is 0; it must be 1 or more"),
    (lambda: LocalPredictive(4, 0, 1), "hidden_dim is 0; it must be 1 or more"),
]


@pytest.mark.parametrize(("call", "match"), ERRORS, ids=[match for _, match in ERRORS])
def test_errors(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_repr() -> None:
    assert "window=3" in repr(LocalMonotonic(3))
    assert "window=3" in repr(LocalPredictive(4, 4, 3))
