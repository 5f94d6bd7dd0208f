"""Every transform of torch goes through the public function, and no derivative is silently wrong."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from oracle import IMPLEMENTATIONS
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import regard
from regard import kernels, transforms

LENS = torch.tensor([0, 3])
SCORES: dict[str, Callable[[], regard.Score]] = {
    "additive": lambda: regard.Additive(5, 5, 6),
    "scaled_dot": regard.ScaledDot,
    "gaussian": lambda: regard.Gaussian(learnable=True),
    "function": lambda: regard.FunctionScore(lambda query, key: (query @ key.mT).sin()),
}
MASKS: dict[str, Callable[[Tensor], regard.Mask | None]] = {
    "none": lambda lens: None,
    "lengths": regard.Lengths,
    "causal": lambda lens: regard.Causal(),
    "window & lengths": lambda lens: regard.Window(1, 1) & regard.Lengths(lens),
    "sink | window": lambda lens: (regard.Window(1, 0) | regard.Lengths(1)) & regard.Causal(),
}
scores = pytest.mark.parametrize("score", SCORES)
masks = pytest.mark.parametrize("mask", MASKS)


def triple(dtype: torch.dtype = torch.float64, length: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, n, 5, dtype=dtype, generator=generator) for n in (length, length + 1, length + 1)
    )
    return query, key, value


def function(score: str, mask: str, dtype: torch.dtype = torch.float64) -> Callable[..., Tensor]:
    torch.manual_seed(0)
    made = SCORES[score]().to(dtype)
    return lambda query, key, value, lens=LENS: regard.attend(query, key, value, made, MASKS[mask](lens))


@scores
@masks
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_backward_and_double_backward(score: str, mask: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.chunked, "BLOCK_BYTES", 400)
    made, inputs = SCORES[score]().double(), tuple(x.requires_grad_() for x in triple())
    parameters = tuple(made.parameters())
    if impl in regard.explain(*inputs, score=made, mask=MASKS[mask](LENS)).refused:
        return

    def run(*leaves: Tensor) -> Tensor:
        return regard.attend(*leaves[:3], score=made, mask=MASKS[mask](LENS), impl=impl)

    assert torch.autograd.gradcheck(run, (*inputs, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (*inputs, *parameters), fast_mode=True)


@scores
@masks
def test_func_transforms(score: str, mask: str) -> None:
    run, (query, key, value) = function(score, mask), triple()
    leaf = query.clone().requires_grad_()
    (plain,) = torch.autograd.grad(run(leaf, key, value).square().sum(), leaf)
    torch.testing.assert_close(grad(lambda q: run(q, key, value).square().sum())(query), plain)

    def energy(q: Tensor) -> Tensor:
        return run(q, key, value).square().sum()

    jacobian = jacrev(run)(query, key, value)
    tangent = torch.ones_like(query)
    expected = torch.einsum("...nij,nij->...", jacobian, tangent)
    torch.testing.assert_close(jvp(lambda q: run(q, key, value), (query,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        dual = run(forward_ad.make_dual(query, tangent), key, value)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
    by_autograd = torch.autograd.functional.hessian(energy, query)
    assert isinstance(by_autograd, Tensor)
    torch.testing.assert_close(hessian(energy)(query), by_autograd)


@scores
@masks
def test_vmap(score: str, mask: str) -> None:
    run, inputs = function(score, mask), triple()
    torch.testing.assert_close(vmap(run)(*inputs, LENS), run(*inputs))


@pytest.mark.parametrize("impl", ["chunked", "sdpa"])
def test_an_implementation_that_cannot_says_so(impl: str) -> None:
    query, key, value = triple()
    with pytest.raises(ValueError, match=r"torch\.func transforms and forward-mode AD"):
        grad(lambda q: regard.attend(q, key, value, impl=impl).sum())(query)
    with pytest.raises(ValueError, match="forward-mode AD"), forward_ad.dual_level():
        regard.attend(forward_ad.make_dual(query, query), key, value, impl=impl)


def test_the_guard_is_what_keeps_tangents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "transforming", lambda: False)
    query, key, value = triple()
    with pytest.raises(RuntimeError):
        jvp(lambda q: regard.attend(q, key, value), (query,), (query,))


@scores
@masks
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_whole(score: str, mask: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    run = function(score, mask, torch.float32)
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (3, 6, 9):
        query, key, value = triple(torch.float32, length)
        query.requires_grad_()
        results = [f(query, key, value, LENS) for f in (compiled, run)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), query)[0] for out in results))


def test_compile_by_inductor_with_dropout() -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 6, 8)
    score = regard.Additive(8, 8, 4)

    def run(x: Tensor) -> Tensor:
        return regard.attend(x, x, x, score, regard.Lengths(torch.tensor([6, 2])), dropout_p=0.5)

    out = torch.compile(run, fullgraph=True)(x)
    assert out.isfinite().all()
    assert out.shape == (2, 6, 8)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_compile_of_a_transformed_function(transform: str) -> None:
    torch._dynamo.reset()
    run, inputs = function("scaled_dot", "causal", torch.float32), triple(torch.float32)
    transformed = {
        "vmap": lambda q, k, v: vmap(lambda q, k, v: run(q, k, v))(q, k, v),
        "grad": lambda q, k, v: grad(lambda q: run(q, k, v).square().sum())(q),
        "jvp": lambda q, k, v: jvp(lambda q: run(q, k, v), (q,), (q,))[1],
    }[transform]
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), transformed(*inputs))


class Model(nn.Module):
    def __init__(self, mask: str) -> None:
        super().__init__()
        self.attention = regard.Attention(regard.Additive(5, 5, 6))
        self.mask = mask

    def forward(self, query: Tensor, key: Tensor, value: Tensor, lens: Tensor) -> Tensor:
        return self.attention(query, key, value, MASKS[self.mask](lens))


@masks
@pytest.mark.parametrize("strict", [False, True])
def test_export(mask: str, strict: bool) -> None:
    model, inputs = Model(mask), (*triple(torch.float32), LENS)
    exported = torch.export.export(model, inputs, strict=strict).module()
    torch.testing.assert_close(exported(*inputs), model(*inputs))


@scores
def test_autocast(score: str) -> None:
    run, (query, key, value) = function(score, "lengths", torch.float32), triple(torch.float32)
    exact = run(query, key, value)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(query, key, value)
        seen = regard.attention(query, key, value, mask=regard.Lengths(LENS))
        weights = seen.weights()
        mixed = run(query.bfloat16(), key, value.half())  # as they come of layers, some of which autocast casts
    torch.testing.assert_close(mixed, out, atol=0.01, rtol=0)
    assert out.dtype == torch.bfloat16  # as scaled_dot_product_attention under autocast
    assert (out - exact).abs().max() < 0.05
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights[1].sum(-1), torch.ones(3))


@scores
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_activation_checkpointing(score: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.chunked, "BLOCK_BYTES", 400)
    made, (query, key, value) = SCORES[score](), triple(torch.float32)
    if impl in regard.explain(query, key, value, made, regard.Lengths(LENS)).refused:
        return
    query.requires_grad_()

    def run(query: Tensor) -> Tensor:
        return regard.attend(query, key, value, made, regard.Lengths(LENS), impl=impl)

    plain, again = run(query), checkpoint(run, query, use_reentrant=False)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), query)[0] for out in (plain, again)))


@pytest.mark.parametrize("score", ["additive", "scaled_dot", "gaussian"])
def test_copies_pickles_and_functional_calls(score: str) -> None:
    attention = regard.Attention(SCORES[score](), dropout=0.1).eval()
    inputs = triple(torch.float32)
    expected = attention(*inputs)
    buffer = io.BytesIO()
    torch.save(attention, buffer)
    buffer.seek(0)
    for again in (
        copy.deepcopy(attention),
        pickle.loads(pickle.dumps(attention)),
        torch.load(buffer, weights_only=False),
    ):
        assert again(*inputs).equal(expected)
    assert functional_call(attention, dict(attention.named_parameters()), inputs).equal(expected)
    mask = pickle.loads(pickle.dumps(regard.Lengths(LENS) & regard.Causal()))
    assert regard.attend(*inputs, mask=mask).equal(regard.attend(*inputs, mask=regard.Lengths(LENS) & regard.Causal()))


def test_frozen_inputs_cost_no_gradient_work() -> None:
    query, key, value = (torch.randn(1, 2, 8, 4) for _ in range(3))
    query.requires_grad_()
    regard.attend(query, key, value, impl="sdpa").sum().backward()
    assert query.grad is not None
    assert key.grad is None
    out = regard.attend(query.detach(), key, value)
    assert not out.requires_grad


def test_the_private_questions_are_answered() -> None:
    x = torch.zeros(2)
    assert (transforms.transforming(), transforms.autocasting(x), transforms.may_look_at(x)) == (False, False, True)
    seen: list[tuple[bool, bool]] = []

    def look(x: Tensor) -> Tensor:
        seen.append((transforms.transforming(), transforms.may_look_at(x)))
        return x.sum()

    vmap(look)(torch.zeros(2, 2))
    grad(look)(x)
    with forward_ad.dual_level():
        look(x)
    assert seen == [(True, False)] * 3
    with torch.autocast("cpu", torch.bfloat16):
        assert transforms.autocasting(x)
    before = transforms.versions([x])
    x.add_(1)
    assert transforms.versions([x]) != before
    assert not transforms.may_look_at(torch.zeros(2, device="meta"))
