"""Any part of the weights, from any path, differentiably, without the matrix."""

from __future__ import annotations

import pytest
import torch
from oracle import IMPLEMENTATIONS, score_for
from torch import Tensor

import regard
from regard import Attended, kernels
from regard.kernels import cpu, ops
from regard.reference import Pair


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.chunked, "BLOCK_BYTES", 600)


def attended(impl: str = "reference") -> Attended:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 4)
    lens = regard.Lengths(torch.tensor([9, 4]))
    return regard.attention(query.requires_grad_(), key, value, score_for(impl), lens, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_everything_follows_from_the_weights(impl: str) -> None:
    seen = attended(impl)
    p = seen.weights()
    torch.testing.assert_close(p @ seen.problem.value, seen.out)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 3, 7))
    torch.testing.assert_close(seen.key_mass(), p.sum(-2))
    torch.testing.assert_close(seen.entropy(), -torch.special.xlogy(p, p).sum(-1))
    values, indices = seen.top_k(3)
    torch.testing.assert_close(values, p.topk(3).values)
    torch.testing.assert_close(p.gather(-1, indices), values)
    assert seen.lse is not None
    problem = seen.problem
    scores = problem.pair(problem.query, problem.key)
    torch.testing.assert_close(torch.exp(scores - seen.lse[..., None])[0], p[0])


@pytest.mark.parametrize("mask", [None, regard.Causal(), regard.Window(1, 2), regard.Keep(torch.eye(7, 9).bool())])
def test_rows_and_heads(mask: regard.Mask | None) -> None:
    query, key = torch.randn(2, 3, 7, 4), torch.randn(2, 1, 9, 4)
    seen = regard.attention(query, key, key, mask=mask, bias=torch.randn(3, 7, 9))
    whole = seen.weights()
    torch.testing.assert_close(seen.weights(rows=[5, -7]), whole[..., [5, 0], :])
    torch.testing.assert_close(seen.weights(rows=slice(2, None, 2)), whole[..., 2::2, :])
    torch.testing.assert_close(seen.weights(heads=[2]), whole[:, 2:])
    torch.testing.assert_close(seen.weights(rows=[1], heads=slice(0, 2)), whole[:, :2, 1:2])


def test_heads_of_additive_and_grouped_scores() -> None:
    x = torch.randn(2, 5, 4)
    seen = regard.attention(x, x, x, regard.Additive(4, 4, 6, heads=3))
    torch.testing.assert_close(seen.weights(heads=[1], rows=[4]), seen.weights()[:, 1:2, 4:])
    query, key = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 6, 3)
    seen = regard.attention(query, key, key, mask=regard.Lengths(torch.tensor([6, 2])), enable_gqa=True)
    torch.testing.assert_close(seen.weights(heads=[1, 2]), seen.weights()[:, 1:3])


def test_every_part_is_differentiable() -> None:
    seen = attended()
    weights, query = seen.weights(), seen.problem.query
    parts = {
        "weights": (seen.weights(rows=[2]).square(), weights[..., 2:3, :].square()),
        "key_mass": (seen.key_mass().square(), weights.sum(-2).square()),
        "entropy": (seen.entropy(), -torch.special.xlogy(weights, weights.clamp(min=1e-38)).sum(-1)),
        "top_k": (seen.top_k(2)[0].square(), weights.topk(2).values.square()),
    }
    for name, (part, whole) in parts.items():
        ours = torch.autograd.grad(part.sum(), query, retain_graph=True)[0]
        torch.testing.assert_close(ours, torch.autograd.grad(whole.sum(), query, retain_graph=True)[0], msg=name)
        assert ours.abs().sum() > 0


def test_bad_arguments() -> None:
    seen = attended()
    with pytest.raises(ValueError, match=r"k is 10; it must be an int in 1 .. 9"):
        seen.top_k(10)
    with pytest.raises(ValueError, match=r"rows is \[7\]; each must lie in -7 .. 6"):
        seen.weights(rows=[7])
    with pytest.raises(ValueError, match=r"heads is \[3\]"):
        seen.weights(heads=[3])
    for rows in ([True, False], [1.5], 1):
        with pytest.raises(TypeError, match="it must be a slice or a sequence of ints"):
            seen.weights(rows=rows)  # pyright: ignore[reportArgumentType]
    assert seen.weights(rows=slice(3, 1)).shape == (2, 3, 0, 9)
    x = torch.randn(2, 4, 4)
    with pytest.raises(ValueError, match="have no heads"):
        regard.attention(x, x, x).weights(heads=[0])


def test_no_rows() -> None:
    seen = regard.attention(torch.zeros(2, 0, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
    assert seen.out.shape == (2, 0, 5)
    assert seen.entropy().shape == (2, 0)
    assert seen.key_mass().tolist() == [[0, 0, 0]] * 2


def test_weights_alone() -> None:
    query, key = torch.randn(2, 5, 4), torch.randn(2, 6, 3)
    score = regard.Bilinear(4, 3)
    p = regard.weights(query, key, score, regard.Causal())
    torch.testing.assert_close(p, regard.attention(query, key, key, score, regard.Causal()).weights())
    torch.testing.assert_close(regard.weights(query, key, score, regard.Causal(), rows=[3]), p[:, 3:4])
    assert regard.weights(query.half(), key.half(), score.half()).dtype == torch.float32


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_are_read_outside_the_mode_that_they_were_made_in(mode: type[torch.no_grad]) -> None:
    x, score = torch.randn(2, 5, 4), regard.Additive(4, 4, 6)
    with mode():
        seen = regard.attention(x, x, x, score, regard.Lengths(torch.tensor([5, 2])))
    for part in (seen.weights(), seen.entropy(), seen.key_mass(), seen.top_k(1)[0], seen.lse):
        assert part is not None
        assert not part.requires_grad


def test_weights_are_those_of_the_call_whatever_an_optimizer_does_since() -> None:
    x, score = torch.randn(2, 5, 4), regard.Additive(4, 4, 6)
    seen = regard.attention(x, x, x, score)
    expected = seen.weights().detach()
    seen.out.sum().backward()
    with torch.no_grad():
        for parameter in score.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(seen.weights(), expected)


def test_weights_of_inputs_written_to_since_are_an_error() -> None:
    x, keep = torch.randn(2, 5, 4), torch.ones(5, 5, dtype=torch.bool)
    for written, mask in ((x, None), (keep, keep)):
        seen = regard.attention(x, x, x, mask=mask)
        seen.weights()
        written[0, 0] = 0
        with pytest.raises(RuntimeError, match="written to since"):
            seen.weights()


@pytest.mark.skipif(cpu.LIBRARY is None, reason="regard was installed without its C++ library")
def test_additive_weights_are_read_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    score, x = regard.Additive(4, 4, 6, heads=2), torch.randn(2, 9, 4)
    mask = regard.Causal() & regard.Lengths(torch.tensor([9, 4]))
    seen = regard.attention(x, x, x, score, mask, impl="cpu")
    plain = seen.problem.weights()
    calls: list[tuple[int, ...]] = []

    def counted(pair: Pair, a: Tensor, b: Tensor) -> Tensor:
        calls.append(tuple(a.shape))
        return by_kernel(pair, a, b)

    by_kernel = ops.scores
    monkeypatch.setattr(ops, "scores", counted)
    for read, true in (
        (lambda: seen.weights(rows=[3, 8], heads=[1]), plain[:, 1:, [3, 8]]),
        (seen.key_mass, plain.sum(-2)),
        (seen.entropy, -torch.special.xlogy(plain, plain).sum(-1)),
        (lambda: seen.top_k(2)[0], plain.topk(2).values),
        (lambda: regard.weights(x, x, score, mask, rows=[2]), plain[..., [2], :]),
    ):
        calls.clear()
        torch.testing.assert_close(read(), true)
        assert calls  # not by the whole queries × keys × hidden tensor
    calls.clear()
    assert seen.lse is not None
    assert calls == []  # it came with the output
    torch.testing.assert_close(seen.lse, seen.problem.log_sum_exp().squeeze(-1))
