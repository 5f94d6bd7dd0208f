"""The C++ kernels: every instruction set, every range, every derivative, on any thread and after a fork."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from oracle import CASES, EPS, Case, check, inputs, mask_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import regard
from regard import functional, kernels, scores
from regard.kernels import cpu, ops
from regard.problem import Problem, Shift
from regard.reference import AdditivePair, L1Pair, Pair, activate

pytestmark = pytest.mark.skipif(cpu.LIBRARY is None, reason="regard was installed without its C++ library")
LEVELS: tuple[str, ...] = cpu.LEVELS if cpu.LIBRARY is not None else ()


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this processor has."""
    if cpu.level(request.param) != request.param:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    cpu.level(LEVELS[-1])


def taken(case: Case) -> bool:
    given = inputs(case)
    mask = mask_of(case.mask, case.queries, case.keys)
    return "cpu" not in regard.explain(given.query, given.key, given.value, given.score, mask).refused


# --- Right, at every instruction set.

SIZES = (  # rows and keys about the sizes of tiles, panels and registers
    *(Case(score, mask, queries, keys) for score in ("additive", "laplace") for mask in ("none", "causal")
      for queries, keys in ((33, 31), (31, 33), (65, 257), (3, 513))),
    *(Case(score, "sink | window", 40, 300) for score in ("additive_sigmoid", "gatv2", "laplace")),
    *(Case("additive", "keep", 33, 289) for _ in range(1)),
)  # fmt: skip


@pytest.mark.parametrize("case", [*filter(taken, CASES), *SIZES], ids=str)
def test_every_level_is_right(case: Case, level: str) -> None:
    before = cpu.paths()
    check(case, "cpu")
    if case.score.startswith("additive") and case.score != "additive_relu" and case.queries and case.keys:
        assert cpu.paths() > before


def test_levels_are_told_apart() -> None:
    best = cpu.level()
    assert cpu.level("baseline") == "baseline"
    assert cpu.level(best) == best


def test_a_fault_in_a_tile_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def last_tile_dropped(problem: Problem) -> tuple[Tensor, Tensor]:
        keep = (torch.arange(problem.keys) < 256).expand(problem.queries, -1)
        return cpu.run(problem._replace(keep=keep))

    monkeypatch.setitem(kernels.TABLE, "cpu", kernels.TABLE["cpu"]._replace(run=last_tile_dropped))
    with pytest.raises(AssertionError):
        check(Case(mask="none", keys=257), "cpu")


# --- Exact for any finite input.


def exact_scores(pair: Pair, a: Tensor, b: Tensor) -> Tensor:
    double = pair._replace(v=pair.v.double()) if isinstance(pair, AdditivePair) else pair
    return double(a.double(), b.double())


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize(
    ("size", "offset", "path"),
    [
        (0.5, 0.0, "fast"),
        (0.5, 100.0, "fast"),  # one side's offset, taken away by the other's
        (0.5, 1e4, "fast"),
        (6.0, 0.0, "capped"),
        (6.0, 100.0, "capped"),
        (50.0, 0.0, "direct"),
        (1e4, 0.0, "direct"),
        (1e4, 1e4, "direct"),
    ],
)
def test_every_range_within_the_budget(activation: str, size: float, offset: float, path: str, level: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, 1, 35, 40, generator=generator) * size + offset
    b = torch.randn(1, 1, 300, 40, generator=generator) * size - offset
    pair = AdditivePair(torch.randn(1, 40, generator=generator), activation)
    before = cpu.paths()
    found = ops.scores(pair, a, b)
    n = ("fast", "capped", "direct").index(path)
    assert cpu.paths()[n] > before[n]
    exact = exact_scores(pair, a, b)
    error = (found - exact).abs().max()
    assert float(error) <= 4 * EPS * (1 + float(pair.v.abs().sum()))


@pytest.mark.parametrize("v", [torch.ones(64), torch.linspace(-1e-30, 1, 64), torch.tensor([0.0, 1e10] * 32)])
def test_any_v(v: Tensor, level: str) -> None:
    a, b, pair = torch.randn(1, 1, 9, 64), torch.randn(1, 1, 70, 64), AdditivePair(v[None])
    error = (ops.scores(pair, a, b) - exact_scores(pair, a, b)).abs().max()
    assert float(error) <= 4 * EPS * (1 + float(v.abs().sum()))


def test_error_is_that_of_plain_float32(level: str) -> None:
    """Root mean square, pooled over many draws: at most 3 × that of tanh(a + b) @ v."""
    generator = torch.Generator().manual_seed(1)
    ours, naive = [], []
    for hidden in (16, 128, 256):
        for spread in (0.3, 1.0, 3.0):
            a, b = (torch.randn(1, 1, n, hidden, generator=generator) * spread for n in (40, 70))
            pair = AdditivePair(torch.randn(1, hidden, generator=generator) / hidden**0.5)
            exact = exact_scores(pair, a, b)
            ours.append((ops.scores(pair, a, b) - exact).square().mean())
            naive.append((pair(a, b) - exact).square().mean())
    assert float(torch.stack(ours).mean().sqrt()) <= 3 * float(torch.stack(naive).mean().sqrt())


def test_an_outlier_slows_its_own_units_only(level: str) -> None:
    a, b = torch.randn(1, 1, 32, 64), torch.randn(1, 1, 256, 64)
    b[..., 3, 5] = 1e6
    before = cpu.paths()
    ops.scores(AdditivePair(torch.randn(1, 64)), a, b)
    fast, capped, direct = (now - was for now, was in zip(cpu.paths(), before, strict=True))
    assert (fast, capped, direct) == (12, 0, 4)  # of 16 groups, the 4 of one block


def test_what_is_not_finite_is_its_own_rows(level: str) -> None:
    a, b, value = torch.randn(1, 1, 6, 8), torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 3)
    a[..., 2, :] = torch.nan
    score = regard.Additive(8, 8, 16)
    out = regard.attend(a, b, value, score, impl="cpu")
    assert out[..., 2, :].isnan().all()
    assert out[..., [0, 1, 3, 4, 5], :].isfinite().all()


# --- Derivatives and transforms.

MASK = regard.Lengths(torch.tensor([9, 4])) & regard.Causal()


def problem(pair: Pair, dropout_p: float = 0.0, dtype: torch.dtype = torch.float32, heads: int = 3) -> Problem:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, n, 5, dtype=dtype) for n in (7, 9, 9))
    given = functional.lower(
        query, key, value, regard.FunctionScore(pair), MASK, None, regard.Softmax(), dropout_p, False
    )
    leaves = [x.detach().requires_grad_() for x in (given.query, given.key, given.value)]
    return given._replace(query=leaves[0], key=leaves[1], value=leaves[2], pair=pair)


def pairs() -> dict[str, Pair]:
    torch.manual_seed(1)
    v, heads = torch.randn(1, 5), torch.randn(3, 1, 1, 5)
    return {
        "tanh": AdditivePair(v.requires_grad_()),
        "heads": AdditivePair(heads.requires_grad_()),
        "sigmoid": AdditivePair(v, "sigmoid"),
        "relu": AdditivePair(v, "relu"),
        "leaky_relu": AdditivePair(v, "leaky_relu", 0.3),
        "steep": AdditivePair(v, "leaky_relu", 1.5),
        "l1": L1Pair(),
    }


by_pair = pytest.mark.parametrize("pair", pairs())


@by_pair
@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
def test_gradients_of_out_and_log_sum_exp(pair: str, dropout_p: float, level: str) -> None:
    given = problem(pairs()[pair], dropout_p)
    exact = given.replaced([x.detach().double().requires_grad_() for x in given.differentiable()])
    out, lse = cpu.run(given)
    cotangent, weight = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse == -torch.inf, 0)
    found = torch.autograd.grad(
        (out * cotangent).sum() + (lse.nan_to_num(neginf=0) * weight).sum(), given.differentiable()
    )
    true_out, true_lse = exact.attend(), exact.log_sum_exp().squeeze(-1)
    true = torch.autograd.grad(
        (true_out * cotangent).sum() + (true_lse.nan_to_num(neginf=0) * weight).sum(), exact.differentiable()
    )
    torch.testing.assert_close(out.double(), true_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), true_lse, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(found, true, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-4)


@by_pair
def test_second_and_third_derivatives(pair: str) -> None:
    given = problem(pairs()[pair])
    exact = given.replaced([x.detach().double().requires_grad_() for x in given.differentiable()])

    def third(out: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
        energy, results = out.square().sum(), []
        for _ in range(3):
            grads = torch.autograd.grad(energy, leaves, create_graph=True, materialize_grads=True)
            results += grads
            energy = torch.stack([grad.square().sum() for grad in grads]).sum()
        return results

    ours, theirs = third(cpu.run(given)[0], given.differentiable()), third(exact.attend(), exact.differentiable())
    for found, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.double(), true, atol=1e-3 * float(true.detach().abs().max()) + 1e-6, rtol=0)


@by_pair
def test_operators_are_registered_rightly(pair: str) -> None:
    given = problem(pairs()[pair], dropout_p=0.2)
    sides, rest = ops.arguments(given)
    query, key = (x.detach().requires_grad_() for x in sides[:2])
    v = None if sides.v is None else sides.v.detach().requires_grad_()
    sides = sides._replace(query=query, key=key, v=v)
    rest = rest._replace(value=rest.value.detach().requires_grad_())
    torch.library.opcheck(torch.ops.regard.attend.default, (*sides, *rest, None))
    torch.library.opcheck(torch.ops.regard.scores.default, tuple(sides))
    out, lse = (x.detach() for x in torch.ops.regard.attend(*sides, *rest, None))
    torch.library.opcheck(
        torch.ops.regard.attend_backward.default,
        (*sides, *rest, out, lse, torch.randn_like(out), torch.zeros_like(lse), True, True),
    )
    grad = torch.randn(2, 3, 7, 9)
    torch.library.opcheck(torch.ops.regard.scores_backward.default, (*sides, grad))


def test_what_needs_no_gradient_costs_none() -> None:
    sides, rest = ops.arguments(problem(AdditivePair(torch.randn(1, 5))))
    out, lse = torch.ops.regard.attend(*sides, *rest, None)
    arguments = (*sides, *rest, out.detach(), lse.detach(), torch.randn_like(out), torch.zeros_like(lse))
    query, key, v, value = torch.ops.regard.attend_backward(*arguments, False, True)
    assert [x.numel() for x in (query, key, v)] == [0, 0, 0]
    assert value.shape == rest.value.shape
    frozen = torch.ops.regard.attend_backward(*arguments, True, False)
    assert frozen[3].numel() == 0


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("mask", [None, MASK, regard.Window(2, 0) | regard.Lengths(1)], ids=["none", "and", "two"])
def test_compiled_whole_it_is_the_operator(mask: regard.Mask | None, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    ran: list[str] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        ran.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    score = regard.Additive(5, 5, 6, heads=2)

    def run(query: Tensor, key: Tensor) -> Tensor:
        return regard.attend(query, key, key, score, mask, dropout_p=0.0)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=backend)
    for length in (9, 11):
        query, key = torch.randn(2, length, 5, requires_grad=True), torch.randn(2, length, 5)
        plain = run(query, key)
        torch.testing.assert_close(compiled(query, key), plain)
    assert any("regard.attend" in target for target in ran)
    torch._dynamo.reset()
    query = torch.randn(2, 9, 5, requires_grad=True)
    again = torch.compile(run, fullgraph=True, dynamic=dynamic)(query, query)
    found = torch.autograd.grad(again.square().sum(), (query, *score.parameters()))
    true = torch.autograd.grad(run(query, query).square().sum(), (query, *score.parameters()))
    for ours, theirs in zip(found, true, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_vmap_of_the_operator() -> None:
    given = problem(AdditivePair(torch.randn(1, 5)))
    sides, rest = ops.arguments(given)
    queries = torch.randn(4, *sides.query.shape)
    out, lse = torch.vmap(lambda query: torch.ops.regard.attend(query, *sides[1:], *rest, None))(queries)
    for n in range(4):
        one_out, one_lse = torch.ops.regard.attend(queries[n], *sides[1:], *rest, None)
        assert out[n].equal(one_out)
        assert lse[n].equal(one_lse)


def test_transforms_are_the_references() -> None:
    x, score = torch.randn(2, 40, 8), regard.Additive(8, 8, 32)
    assert regard.explain(x, x, x, score).implementation == "cpu"
    leaf = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(regard.attend(leaf, x, x, score).square().sum(), leaf)
    found = torch.func.grad(lambda q: regard.attend(q, x, x, score).square().sum())(x)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"torch\.func transforms"):
        torch.func.grad(lambda q: regard.attend(q, x, x, score, impl="cpu").sum())(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    x, score = torch.randn(2, 40, 8, requires_grad=True), regard.Additive(8, 8, 32)
    with torch.autocast("cpu", dtype):
        out = regard.attend(x, x, x, score, impl="cpu")
        assert out.dtype == dtype
        true = regard.attend(x, x, x, score, impl="reference")
        budget = 2 * torch.finfo(dtype).eps * float(true.detach().abs().max())
        torch.testing.assert_close(out, true, atol=budget, rtol=0)
    out.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


# --- Half precision, strides, sharing: what is read and written is what was meant.


@by_pair
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(pair: str, dtype: torch.dtype, level: str) -> None:
    given = problem(pairs()[pair], dtype=dtype)
    exact = given.replaced([x.detach().double().requires_grad_() for x in given.differentiable()])
    out, lse = cpu.run(given)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    found = torch.autograd.grad(out.float().square().sum(), given.differentiable())
    true_out = exact.attend()
    true = torch.autograd.grad(true_out.square().sum(), exact.differentiable())
    torch.testing.assert_close(lse.double(), exact.log_sum_exp().squeeze(-1), atol=1e-5, rtol=1e-5)
    for ours, theirs, like in zip((out, *found), (true_out, *true), (out, *given.differentiable()), strict=True):
        assert ours.dtype == like.dtype
        assert float((ours - theirs).detach().abs().max()) <= 4 * torch.finfo(dtype).eps * float(
            theirs.detach().abs().max()
        )


@pytest.mark.parametrize("special", [0.0, 2**-24, 2**-14 - 2**-24, 65504.0, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_goes_through_unchanged(dtype: torch.dtype, special: float, level: str) -> None:
    value = torch.tensor([[[special, -special, 1.0]]]).to(dtype)
    out = regard.attend(
        torch.zeros(1, 2, 4, dtype=dtype), torch.zeros(1, 1, 4, dtype=dtype), value, regard.Laplace(), impl="cpu"
    )
    torch.testing.assert_close(out, value.expand(1, 2, 3), equal_nan=True, atol=0, rtol=0)


def test_all_16_bit_patterns(level: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        value = bits.view(dtype)[None, :, None].reshape(64, 1, 1024)
        query = torch.zeros(64, 1, 4, dtype=dtype)
        out = regard.attend(query, query, value, regard.Laplace(), impl="cpu")
        same = (out == value) | (out.isnan() & value.isnan())
        assert same.all()


def test_float32_rounds_to_the_nearest_half(level: str) -> None:
    torch.manual_seed(0)
    value = torch.randn(1, 2, 4096) * torch.logspace(-9, 6, 4096)
    for dtype in (torch.float16, torch.bfloat16):
        halves, query = value.to(dtype), torch.zeros(1, 1, 4, dtype=dtype)
        out = regard.attend(query, query.expand(1, 2, 4), halves, regard.Laplace(), impl="cpu")
        mean = (halves[:, 0].float() * 0.5 + halves[:, 1].float() * 0.5).to(dtype)
        torch.testing.assert_close(out[:, 0], mean, equal_nan=True, atol=0, rtol=0)


def test_shared_keys_are_laid_out_once_and_summed() -> None:
    score = regard.Additive(6, 6, 8, heads=4)
    query, key = torch.randn(3, 10, 6), torch.randn(1, 12, 6)
    leaves = (key.requires_grad_(), *score.parameters())
    results = []
    for impl in ("cpu", "reference"):
        out = regard.attend(query, key, key, score, impl=impl)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# --- Keys that are moved for one query.


class Moved(NamedTuple):
    """What `regard::shifted_scores` takes, and what it is to give."""

    query: Tensor
    key: Tensor
    v: Tensor
    activation: str
    negative_slope: float
    seen: Tensor
    weight: Tensor
    filters: Tensor | None = None

    def scores(self) -> Tensor:
        return torch.ops.regard.shifted_scores(*self)

    def leaves(self) -> list[Tensor]:
        filters = [] if self.filters is None else [self.filters]
        return [self.query, self.key, self.v, self.seen, self.weight, *filters]

    def of(self, leaves: Sequence[Tensor]) -> Moved:
        query, key, v, seen, weight, *filters = leaves
        return Moved(query, key, v, self.activation, self.negative_slope, seen, weight, *filters)

    def differentiable(self) -> Moved:
        return self.of([x.detach().requires_grad_() for x in self.leaves()])

    def double(self) -> Moved:
        return self.of([x.detach().double().requires_grad_() for x in self.leaves()])

    def shift(self) -> Shift:
        return Shift(self.seen, self.weight, self.filters)

    def reference(self) -> Tensor:
        return ops.Sides(*self[:5]).pair()(self.query, self.shift().of(self.key))

    def within_the_budget(self, found: Tensor) -> bool:
        """Whether scores are those of float64, to the rounding of each activation and of what is summed before it."""
        exact = self.double()
        a, b, shift = exact.query, exact.key, exact.shift()
        x = (a + shift.of(b)).detach().requires_grad_()
        pair = ops.Sides(a, b, exact.v, self.activation, self.negative_slope).pair()
        assert isinstance(pair, AdditivePair)
        terms = activate(pair, x) * pair.v.squeeze(-2)
        (slopes,) = torch.autograd.grad(terms.sum(), x)
        summed = shift.each(torch.abs).of((a + b).abs())
        budget = 4 * EPS * (1 + pair.v.squeeze(-2).abs() + slopes.abs() * summed).sum(-1)
        return bool(((found.double() - terms.sum(-1).unsqueeze(-2)).abs() <= budget.unsqueeze(-2)).all())


def moved(
    heads: int = 1,
    keys: int = 17,
    hidden: int = 16,
    channels: int = 32,
    around: tuple[int, int] | None = None,
    *,
    activation: str = "tanh",
    size: float = 1.0,
    offset: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Moved:
    """Keys moved by features, or by filters of what was seen, (channels, taps), around each of them."""
    torch.manual_seed(0)
    query = (torch.randn(2, heads, 1, hidden) * size + offset).to(dtype)
    key = (torch.randn(2, heads, keys, hidden) * size - offset).to(dtype)
    seen = torch.randn(2, heads, channels if around is None else around[0], keys).to(dtype).mT  # a channel's together
    weight = (torch.randn(heads, hidden, channels) / max(1, channels) ** 0.5).to(dtype).expand(2, -1, -1, -1)
    filters = None if around is None else (torch.randn(channels, *around) / prod(around) ** 0.5).to(dtype)
    slope = 0.3 if activation == "leaky_relu" else 0.0
    return Moved(query, key, torch.randn(heads, hidden), activation, slope, seen, weight, filters)


ACTIVATIONS = ["tanh", "sigmoid", "relu", "leaky_relu"]
MOVED_SHAPES = [  # heads, keys, hidden, channels, what is seen around each key
    (1, 1, 1, 1, None),
    (1, 17, 16, 32, None),
    (3, 25, 17, 33, None),
    (2, 48, 130, 5, None),
    (2, 23, 64, 1, None),
    (1, 1000, 256, 32, None),
    (2, 9, 80, 3, None),
    (2, 0, 8, 3, None),
    (1, 1, 1, 1, (1, 1)),
    (3, 25, 17, 33, (2, 31)),
    (2, 200, 40, 5, (3, 401)),
    (1, 385, 64, 7, (1, 5)),
    (1, 1000, 256, 32, (2, 31)),
    (2, 0, 8, 3, (2, 5)),
]
MovedShape = tuple[int, int, int, int, tuple[int, int] | None]
AROUND = [None, (2, 5)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", MOVED_SHAPES, ids=str)
def test_moved_keys_are_scored_rightly(shape: MovedShape, activation: str, level: str) -> None:
    given = moved(*shape, activation=activation)
    assert given.within_the_budget(given.scores())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [0.5, 6.0, 50.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
def test_moved_keys_of_every_range(activation: str, size: float, offset: float, level: str) -> None:
    given = moved(2, 300, 40, 8, activation=activation, size=size, offset=offset)
    found = given.scores()
    assert given.within_the_budget(found)
    if activation in ("tanh", "sigmoid"):  # and no further than keys that stay where they are
        exact = given.double().reference().detach()
        assert float((found - exact).abs().max()) <= 4 * EPS * (1 + float(given.v.abs().sum(-1).max()))


@pytest.mark.parametrize("fault", ["a channel", "a key", "a unit", "a head", "a tap"])
def test_a_fault_in_moved_keys_is_caught(fault: str) -> None:
    given = moved(2, 25, 17, 33, (2, 31) if fault == "a tap" else None)
    query, key, v, seen, weight, *filters = (x.clone() for x in given.leaves())
    match fault:
        case "a channel":
            seen[..., -1] = 0
        case "a key":
            seen[..., -1, :] = seen[..., -2, :]
        case "a unit":
            key[..., -1] = 0
        case "a head":
            v = v.flip(0)
        case "a tap":
            filters[0][..., -1] = 0
    assert not given.within_the_budget(given.of([query, key, v, seen, weight, *filters]).scores())


def test_error_of_moved_keys_is_that_of_plain_float32(level: str) -> None:
    errors = []
    for hidden in (16, 128, 256):
        for size in (0.3, 1.0, 3.0):
            given = moved(keys=70, hidden=hidden, size=size)
            exact = given.double().reference()
            errors.append(torch.stack([(s - exact).square().mean() for s in (given.scores(), given.reference())]))
    ours, naive = torch.stack(errors).mean(0).sqrt().tolist()
    assert ours <= 3 * naive


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("around", AROUND, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moved_keys_of_half_precision_are_widened(
    dtype: torch.dtype, around: tuple[int, int] | None, activation: str, level: str
) -> None:
    given = moved(3, 25, 70, 9, around, activation=activation, dtype=dtype)
    found = given.scores()
    assert found.dtype == torch.float32
    assert given.within_the_budget(found)
    given = given.differentiable()
    ours = torch.autograd.grad(given.scores().square().sum(), given.leaves())
    exact = given.double()
    true = torch.autograd.grad(exact.reference().square().sum(), exact.leaves())
    for gradient, right, x in zip(ours, true, given.leaves(), strict=True):
        assert gradient.dtype == x.dtype
        assert float((gradient - right).abs().max()) <= 4 * torch.finfo(x.dtype).eps * float(right.abs().max()) + 1e-4


@pytest.mark.parametrize("around", [None, (3, 7)], ids=str)
def test_moved_keys_of_any_layout(around: tuple[int, int] | None, level: str) -> None:
    given = moved(2, 205, 70, 9, around)
    query, key, v, seen, weight, *filters = given.leaves()
    wide = torch.randn(2, 2, 205, 3 * seen.shape[-1])
    wide[..., ::3] = seen
    laid = [x.mT.contiguous().mT for x in (query, key, v, weight, *filters)]
    laid.insert(3, wide[..., ::3])
    assert given.of(laid).scores().equal(given.scores())


def test_what_is_not_finite_moves_its_own_keys(level: str) -> None:
    given = moved(keys=25)
    given.key[0, 0, 3, 5], given.seen[0, 0, 24, 2] = torch.nan, torch.nan
    assert given.scores().isnan().nonzero().tolist() == [[0, 0, 0, 3], [0, 0, 0, 24]]
    given = moved(1, 25, 16, 4, (1, 5))
    given.seen[0, 0, 10] = torch.nan
    assert given.scores().isnan().nonzero().tolist() == [[0, 0, 0, j] for j in range(8, 13)]


def moved_gradients(given: Moved) -> tuple[Tensor, ...]:
    direction = torch.randn(2, *given.query.shape[1:3], given.key.shape[2], generator=torch.Generator().manual_seed(1))
    scores = given.scores() if given.key.dtype == torch.float32 else given.reference()
    return torch.autograd.grad((scores * direction).sum(), given.leaves(), create_graph=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", MOVED_SHAPES, ids=str)
def test_gradients_of_moved_keys(shape: MovedShape, activation: str, level: str) -> None:
    given = moved(*shape, activation=activation).differentiable()
    for ours, true in zip(moved_gradients(given), moved_gradients(given.double()), strict=True):
        largest = float(true.detach().abs().max()) if true.numel() else 0.0
        torch.testing.assert_close(ours.double(), true, atol=2e-5 + 2e-5 * largest, rtol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("around", AROUND, ids=str)
def test_second_derivatives_of_moved_keys(around: tuple[int, int] | None, activation: str) -> None:
    given = moved(2, 5, 6, 3, around, activation=activation).differentiable()
    results = []
    for each in (given, given.double()):
        energy = torch.stack([gradient.square().sum() for gradient in moved_gradients(each)]).sum()
        results.append(torch.autograd.grad(energy, each.leaves(), materialize_grads=True))
    for ours, true in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), true, atol=1e-4 * float(true.abs().max()) + 1e-6, rtol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("around", AROUND, ids=str)
def test_the_operator_of_moved_keys_is_registered_rightly(around: tuple[int, int] | None, activation: str) -> None:
    given = moved(2, 9, 8, 3, around, activation=activation).differentiable()
    torch.library.opcheck(torch.ops.regard.shifted_scores.default, tuple(given))
    queries = torch.randn(4, *given.query.shape)
    each = torch.vmap(lambda query: given._replace(query=query).scores())(queries)
    assert each.equal(torch.stack([given._replace(query=query).scores() for query in queries]))


def test_frozen_inputs_of_moved_keys_get_no_gradient() -> None:
    given = moved()
    weight = given.weight.detach().requires_grad_()
    given._replace(weight=weight).scores().sum().backward()
    assert weight.grad is not None
    assert all(x.grad is None for x in given.leaves())


def test_every_number_of_threads_moves_keys_alike() -> None:
    given, before, results = moved(3, 500, 40, 8, (2, 31)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(given.scores())
    finally:
        torch.set_num_threads(before)
    assert results[1].equal(results[0])
    assert results[2].equal(results[0])


# --- One row of weights that are there already.


WEIGHTED_SHAPES = [
    (2, 1, 1, 17, 16),
    (1, 1, 1, 1, 1),
    (2, 4, 2, 300, 33),
    (3, 2, 2, 257, 256),
    (2, 2, 2, 0, 8),
    (1, 1, 1, 9, 0),
]


def weights_and_values(
    batch: int, heads: int, groups: int, keys: int, width: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.rand(batch, heads, 1, keys), torch.randn(batch, groups, keys, width).to(dtype)]


@pytest.mark.parametrize("shape", WEIGHTED_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_summed_by_their_weights(shape: tuple[int, ...], dtype: torch.dtype, level: str) -> None:
    weights, value = weights_and_values(*shape, dtype=dtype)
    found = torch.ops.regard.weighted(weights, value)
    each = value.double().repeat_interleave(shape[1] // shape[2], 1)
    assert found.dtype == dtype
    torch.testing.assert_close(found, (weights.double() @ each).to(dtype))
    torch.testing.assert_close(torch.ops.regard.weighted(weights, value.mT.contiguous().mT), found, atol=0, rtol=0)


def test_sums_of_values_have_derivatives_of_any_order() -> None:
    given = [x.double().float().requires_grad_() for x in weights_and_values(2, 2, 2, 7, 5)]
    torch.library.opcheck(torch.ops.regard.weighted.default, tuple(given))
    results = []
    for leaves, by in (
        (given, torch.ops.regard.weighted),
        ([x.detach().double().requires_grad_() for x in given], torch.matmul),
    ):
        out = by(*leaves)
        first = torch.autograd.grad(out.pow(3).sum(), leaves, create_graph=True)
        energy = torch.stack([x.square().sum() for x in first]).sum()
        results.append((out, *first, *torch.autograd.grad(energy, leaves)))
    for ours, true in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), true, atol=1e-4, rtol=1e-4)


def test_a_memory_reads_much_by_the_operator() -> None:
    torch.manual_seed(0)
    for score in (regard.Additive(6, 6, 8), regard.Additive(6, 6, 8, heads=3)):
        key, value = torch.randn(2, 600, 6), torch.randn(2, 600, 64)
        memory = regard.Memory(score, key, value)
        p = memory.weights(torch.randn(2, 6))
        with Called() as called:
            found = memory.read(p)
        assert "regard.weighted.default" in called.names
        torch.testing.assert_close(found, torch.einsum("b...j,bjd->b...d", p, value))
        rows = torch.stack([p, p], -2)
        with Called() as called:
            assert memory.read(rows).shape == (*rows.shape[:-1], 64)
        assert "regard.weighted.default" not in called.names


class Called(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def step(
    score: regard.Score, queries: int = 1, dtype: torch.dtype = torch.float32, channels: int = 4
) -> tuple[Tensor, Tensor, list[str]]:
    """The scores of a memory's keys that are moved, what they are by the composition, and what ran."""
    torch.manual_seed(0)
    score = score.to(dtype)
    query, key = torch.randn(3, queries, 6, dtype=dtype), torch.randn(3, 19, 6, dtype=dtype)
    memory = regard.Memory(score, key, key, regard.Lengths(torch.tensor([19, 0, 7])))
    keys = score.project_key(key)
    weight = torch.randn(keys.shape[-1], channels, dtype=dtype)
    shift = Shift(torch.randn(*keys.shape[:-1], channels, dtype=dtype), weight)
    with Called() as called:
        found = memory.scores(query, shift=shift)
    true = score.pair()(score.project_query(query), shift.of(keys))
    return found, true.masked_fill(~memory.visible().unsqueeze(-2), -torch.inf), called.names


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_memory_of_one_query_moves_keys_by_the_operator(activation: scores.Activation, heads: int) -> None:
    found, true, names = step(regard.Additive(6, 6, 8, heads=heads, activation=activation))
    assert "regard.shifted_scores.default" in names
    torch.testing.assert_close(found, true, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("score", "queries", "dtype", "channels"),
    [
        (regard.Additive(6, 6, 8), 2, torch.float32, 4),
        (regard.Additive(6, 6, 8), 1, torch.float64, 4),
        (regard.Additive(6, 6, 8), 1, torch.float32, 0),
        (regard.Laplace(), 1, torch.float32, 4),
        (regard.ScaledDot(), 1, torch.float32, 4),
    ],
    ids=["queries", "float64", "nothing", "l1", "dot"],
)
def test_other_keys_are_moved_before(score: regard.Score, queries: int, dtype: torch.dtype, channels: int) -> None:
    found, true, names = step(score, queries, dtype, channels)
    assert "regard.shifted_scores.default" not in names
    torch.testing.assert_close(found, true, atol=1e-5, rtol=1e-5)


def located() -> tuple[regard.LocationSensitive, regard.Memory, Tensor]:
    torch.manual_seed(0)
    x, score = torch.randn(2, 50, 8), regard.Additive(8, 8, 32)
    with torch.no_grad():
        memory = regard.Memory(score, x, x, regard.Lengths(torch.tensor([50, 20])))
    return regard.LocationSensitive(32, filters=4, kernel_size=5, cumulative=True), memory, torch.randn(2, 3, 8)


def test_steps_compiled_whole_move_keys_by_the_operator() -> None:
    torch._dynamo.reset()
    ran: list[str] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        ran.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    attention, memory, queries = located()
    compiled = torch.compile(lambda queries: attention(queries, memory).context, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(queries), attention(queries, memory).context)
    assert sum("regard.shifted_scores" in target for target in ran) == 3


def test_transforms_move_keys_by_the_reference() -> None:
    attention, memory, queries = located()
    leaf = queries.clone().requires_grad_()
    (true,) = torch.autograd.grad(attention(leaf, memory).context.square().sum(), leaf)
    found = torch.func.grad(lambda queries: attention(queries, memory).context.square().sum())(queries)
    torch.testing.assert_close(found, true, atol=1e-5, rtol=1e-4)


def kept(steps: int) -> int:
    """Bytes that backward through so many steps keeps."""
    attention, memory, _ = located()
    storages = dict[int, torch.UntypedStorage]()

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attention(torch.randn(2, steps, 8), memory)
    return sum(storage.nbytes() for storage in storages.values())


def test_a_step_keeps_no_moved_keys_for_backward() -> None:
    assert (kept(20) - kept(10)) / 10 < 2 * 50 * 32 * 4 / 2  # half of the projected keys


# --- Dropout.


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 7])
def test_dropout_is_the_contracts(seed: int, level: str) -> None:
    given = problem(AdditivePair(torch.randn(1, 5)), dropout_p=0.4)
    assert given.dropout is not None
    given = given._replace(dropout=given.dropout._replace(seed=torch.tensor(seed), first_row=3))
    torch.testing.assert_close(cpu.run(given)[0], given.attend())


# --- Threads and forks.


def test_threads_do_not_disturb_one_another() -> None:
    x, score = torch.randn(2, 64, 16), regard.Additive(16, 16, 32)
    with torch.no_grad():
        true = regard.attend(x, x, x, score, impl="cpu")
        wrong: list[Tensor] = []

        def work() -> None:
            with torch.no_grad():
                for _ in range(20):
                    out = regard.attend(x, x, x, score, impl="cpu")
                    if not out.equal(true):
                        wrong.append(out)

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert wrong == []


@pytest.mark.parametrize("mask", [None, regard.Causal()], ids=["none", "causal"])
def test_every_number_of_threads_gives_the_same(mask: regard.Mask | None) -> None:
    score, before, results = regard.Additive(16, 16, 32), torch.get_num_threads(), []
    x = torch.randn(1, 300, 16, requires_grad=True)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = regard.attend(x, x, x, score, mask, impl="cpu")
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, *score.parameters()))))
    finally:
        torch.set_num_threads(before)
    for several in results[1:]:
        assert several[0].equal(results[0][0])
        for ours, theirs in zip(several, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_gil_is_free_while_a_kernel_runs() -> None:
    x, score, counted = torch.randn(1, 1500, 64), regard.Additive(64, 64, 256), 0
    done = threading.Event()

    def run() -> None:
        with torch.no_grad():
            regard.attend(x, x, x, score, impl="cpu")
        done.set()

    worker = threading.Thread(target=run)
    worker.start()
    while not done.is_set():
        counted += 1
    worker.join()
    assert counted > 1000  # a GIL that is held lets a few through


def in_child(queue: multiprocessing.SimpleQueue[bool], x: Tensor, score: regard.Score, true: Tensor) -> None:
    with torch.no_grad():
        queue.put(regard.attend(x, x, x, score, impl="cpu").allclose(true))


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_it_runs_after_a_fork() -> None:
    x, score, before = torch.randn(4, 64, 16), regard.Additive(16, 16, 32), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.no_grad():
            true = regard.attend(x, x, x, score, impl="cpu")  # starts the parent's threads
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        torch.set_num_threads(1)  # or torch's own projections hang in the child
        child = context.Process(target=in_child, args=(queue, x, score, true))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert queue.get()
    finally:
        torch.set_num_threads(before)


class Attending(torch.utils.data.Dataset[Tensor]):
    def __init__(self) -> None:
        self.x, self.score = torch.randn(8, 64, 16), regard.Additive(16, 16, 32)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, n: int) -> Tensor:
        x = self.x[n]
        return regard.attend(x, x, x, self.score, impl="cpu").detach()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_of_a_data_loader() -> None:
    data = Attending()
    true = torch.stack([data[n] for n in range(8)])
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=2)
    torch.testing.assert_close(torch.cat(list(loader)), true)


# --- Without the library.

WITHOUT = """
import regard.kernels.cpu as cpu
cpu.LIBRARY = None
import torch, regard
x, score = torch.randn(2, 64, 16), regard.Additive(16, 16, 64)
said = regard.explain(x, x, x, score)
assert said.implementation == "chunked", said
assert "not installed" in said.refused["cpu"]
seen = regard.attention(x, x, x, score)
print(seen.out.shape, seen.weights().shape)
try:
    regard.attend(x, x, x, score, impl="cpu")
except ValueError as error:
    print(error)
"""


def test_all_else_works_without_it() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert "torch.Size([2, 64, 16]) torch.Size([2, 64, 64])" in run.stdout
    assert "its C++ library is not installed" in run.stdout


def test_a_library_of_other_sources_is_refused() -> None:
    torchs = next(Path(torch.__file__).parent.glob("lib/*c10.*"))
    with pytest.raises(ImportError, match="was built of other sources"):
        cpu.load(torchs)
