"""Weights of Keras and torch layers, loaded: the outputs are theirs."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import regard
from regard.loading import additive_from_keras, bilinear_from_keras, multi_head_from_torch

# What Keras' own tests call its layers with, and the outputs and weights that they expect, to 1e-3.
QUERY, KEY = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
VALUE = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
ADDITIVE = [[[1.727, 2.727], [2.272, 3.272]]], [[[0.636, 0.363], [0.363, 0.636]]]
DOT = [[[2.462, 3.462], [1.538, 2.538]]], [[[0.269, 0.731], [0.731, 0.269]]]
IDENTITY = np.eye(2)


@pytest.mark.parametrize(
    ("score", "out", "weights"),
    [
        pytest.param(additive_from_keras([], query=[IDENTITY]), *ADDITIVE, id="AdditiveAttention(use_scale=False)"),
        pytest.param(additive_from_keras([np.ones(2)]), *ADDITIVE, id="AdditiveAttention()"),
        pytest.param(
            additive_from_keras([np.ones(())], key=[IDENTITY]), *ADDITIVE, id="Attention(score_mode='concat')"
        ),
        pytest.param(bilinear_from_keras([], query=[IDENTITY]), *DOT, id="Attention()"),
        pytest.param(bilinear_from_keras([np.ones(())], key=[IDENTITY]), *DOT, id="Attention(use_scale=True)"),
        pytest.param(regard.Dot(), *DOT, id="Attention() as Dot()"),
    ],
)
def test_numbers_published_by_keras(score: regard.Score, out: list[float], weights: list[float]) -> None:
    seen = regard.attention(QUERY, KEY, VALUE, score)
    torch.testing.assert_close(seen.out, torch.tensor(out), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen.weights(), torch.tensor(weights), atol=1e-3, rtol=0)


@pytest.mark.parametrize("score", [additive_from_keras([np.ones(2)]), bilinear_from_keras([], query=[IDENTITY])])
def test_masks_published_by_keras(score: regard.Score) -> None:
    query_mask = value_mask = torch.tensor([[True, False]])
    mask = value_mask[:, None] & query_mask[..., None]
    out = regard.attend(QUERY, torch.ones(1, 2, 2), torch.ones(1, 2, 2), score, mask)
    assert out.tolist() == [[[1.0, 1.0], [0.0, 0.0]]]


# Each against the layers' formula in numpy, in Keras' shapes: kernels are (inputs, outputs).
RANDOM = np.random.default_rng(0)
Q, K, Q_BIAS, K_BIAS, V = (RANDOM.normal(size=size) for size in ((5, 4), (3, 4), 4, 4, 4))
SCALE, C = np.array(0.7), np.array(-1.3)
X, Y = RANDOM.normal(size=(2, 3, 5)), RANDOM.normal(size=(2, 6, 3))


def tanh(q: np.ndarray, k: np.ndarray, scale: float | np.ndarray = 1.0) -> np.ndarray:
    return np.tanh(scale * (q[:, :, None] + k[:, None]))


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (lambda: additive_from_keras([V], query=[Q], key=[K]), (V * tanh(X @ Q, Y @ K)).sum(-1)),
        (lambda: additive_from_keras([V], query=[Q, Q_BIAS], key=[K]), (V * tanh(X @ Q + Q_BIAS, Y @ K)).sum(-1)),
        (lambda: additive_from_keras([V], query=[Q], key=[K, K_BIAS]), (V * tanh(X @ Q, Y @ K + K_BIAS)).sum(-1)),
        (
            lambda: additive_from_keras([SCALE, C], query=[Q, Q_BIAS], key=[K, K_BIAS]),
            C * tanh(X @ Q + Q_BIAS, Y @ K + K_BIAS, SCALE).sum(-1),
        ),
        (lambda: additive_from_keras([C], query=[Q], key=[K]), C * tanh(X @ Q, Y @ K).sum(-1)),
        (lambda: additive_from_keras([], query=[Q], key=[K]), tanh(X @ Q, Y @ K).sum(-1)),
        (
            lambda: additive_from_keras([X[0, 0]], key=[np.ones((3, 5))]),
            (X[0, 0] * tanh(X, Y @ np.ones((3, 5)))).sum(-1),
        ),
        (lambda: bilinear_from_keras([SCALE], query=[Q], key=[K]), SCALE * (X @ Q) @ (Y @ K).transpose(0, 2, 1)),
        (lambda: bilinear_from_keras([], query=[Q], key=[K]), (X @ Q) @ (Y @ K).transpose(0, 2, 1)),
        (lambda: bilinear_from_keras([SCALE], query=[Q[:, :3]]), SCALE * (X @ Q[:, :3]) @ Y.transpose(0, 2, 1)),
    ],
)
def test_dense_layers_are_the_projections(load: Callable[[], regard.Score], expected: np.ndarray) -> None:
    score = load()
    found = score.pair()(score.project_query(torch.tensor(X).float()), score.project_key(torch.tensor(Y).float()))
    torch.testing.assert_close(found, torch.tensor(expected).float())


def test_arrays_are_copied_in_the_default_dtype() -> None:
    v = np.ones(4, dtype=np.float16)
    v.flags.writeable = False
    score = additive_from_keras([v], query=[Q], key=[K])
    assert {parameter.dtype for parameter in score.parameters()} == {torch.float32}
    before = Q.copy()
    with torch.no_grad():
        score.W_q.weight.zero_()
    assert (before == Q).all()


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        (lambda: additive_from_keras(V), TypeError, "weights is a ndarray; it must be a list"),  # pyright: ignore[reportArgumentType]
        (lambda: additive_from_keras([V], query=Q), TypeError, "query is a ndarray; it must be a list"),  # pyright: ignore[reportArgumentType]
        (lambda: additive_from_keras([V, V]), ValueError, "weights have the shapes [(4,), (4,)]; they must be []"),
        (
            lambda: additive_from_keras([V], query=[Q.T]),
            ValueError,
            "query, weights are of sizes (5, 4); they must be of one",
        ),
        (
            lambda: additive_from_keras([V], key=[]),
            ValueError,
            "key has the shapes []; they must be [(inputs, outputs)]",
        ),
        (
            lambda: additive_from_keras([V], query=[Q, K]),
            ValueError,
            "query has the shapes [(5, 4), (3, 4)]; they must be",
        ),
        (lambda: additive_from_keras([V], query=[Q, np.ones(5)]), ValueError, "query has the shapes [(5, 4), (5,)]"),
        (lambda: additive_from_keras([]), ValueError, "do not tell a size; pass query=[identity]"),
        (lambda: bilinear_from_keras([V]), ValueError, "weights have the shapes [(4,)]; they must be [] or [()]"),
        (lambda: bilinear_from_keras([], query=[Q, Q_BIAS], key=[K]), ValueError, "query has a bias, of shape (4,)"),
        (lambda: bilinear_from_keras([], query=[Q], key=[K, K_BIAS]), ValueError, "key has a bias, of shape (4,)"),
        (lambda: bilinear_from_keras([]), ValueError, "do not tell a size"),
        (lambda: multi_head_from_torch(nn.Linear(2, 2)), TypeError, "module is a Linear; it must be"),  # pyright: ignore[reportArgumentType]
        (
            lambda: multi_head_from_torch(nn.MultiheadAttention(4, 2, add_bias_kv=True)),
            ValueError,
            "module has add_bias_kv=True, so that it attends to a key of its own",
        ),
        (
            lambda: multi_head_from_torch(nn.MultiheadAttention(4, 2, add_zero_attn=True)),
            ValueError,
            "add_zero_attn must be False",
        ),
    ],
)
def test_bad_arguments(load: Callable[[], nn.Module], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        load()


def torchs(**settings: object) -> nn.MultiheadAttention:
    """torch's module, in float64, with biases that are not 0 as its own are at first."""
    module = nn.MultiheadAttention(12, 3, dtype=torch.float64, **settings)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(12, 12), (5, 7), (12, 7), (5, 12)])
def test_torchs_module_is_ours(sizes: tuple[int, int], bias: bool) -> None:
    theirs = torchs(kdim=sizes[0], vdim=sizes[1], bias=bias, batch_first=True)
    ours = multi_head_from_torch(theirs)
    query, key, value = (torch.randn(2, *of).double() for of in ((4, 12), (6, sizes[0]), (6, sizes[1])))
    padding, blocked = torch.arange(6) >= torch.tensor([[4], [6]]), torch.ones(4, 6).triu(2).bool()
    for theirs_has, mask in (
        ({}, None),
        ({"key_padding_mask": padding}, ~padding[:, None, None]),
        ({"attn_mask": blocked}, ~blocked),
        ({"key_padding_mask": padding, "attn_mask": blocked}, ~(padding[:, None, None] | blocked)),
    ):
        expected, weights = theirs(query, key, value, average_attn_weights=False, **theirs_has)
        torch.testing.assert_close(ours(query, key, value, mask), expected)
        torch.testing.assert_close(ours.attention(query, key, value, mask).weights(), weights)


def test_a_row_that_is_nan_in_torch_is_empty_in_ours() -> None:
    theirs, x = torchs(batch_first=True), torch.randn(2, 5, 12).double()
    ours = multi_head_from_torch(theirs)
    padding = torch.tensor([[False] * 5, [True] * 5])
    mask, (expected, weights) = ~padding[:, None, None], theirs(x, x, x, padding)
    assert weights[1].isnan().all()
    torch.testing.assert_close(ours(x, x, x, mask)[0], expected[0])
    torch.testing.assert_close(ours(x, x, x, mask)[1], ours.W_o.bias.expand(5, 12))
    assert ours.attention(x, x, x, mask).weights()[1].eq(0).all()


def test_batches_come_first_and_settings_come_along() -> None:
    theirs, x = torchs(dropout=0.25), torch.randn(2, 5, 12).double()
    ours = multi_head_from_torch(theirs)
    torch.testing.assert_close(ours(x, x, x), theirs(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1))
    assert (ours.attend.dropout, ours.training, multi_head_from_torch(theirs.train()).training) == (0.25, False, True)


def test_weights_are_copies() -> None:
    theirs = torchs()
    ours, before = multi_head_from_torch(theirs), theirs.in_proj_weight.detach().clone()
    with torch.no_grad():
        ours.W_q.weight.zero_()
    assert before.equal(theirs.in_proj_weight)
