"""Memory: what attend gives, step by step, whatever was appended, selected, moved or copied before."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import IMPLEMENTATIONS, SCORES
from torch import Tensor, nn
from torch.nn import functional as F

import regard
from regard import kernels, scores
from regard.intervals import Grid, Interval, Intervals
from regard.kernels import cpu
from regard.masks import as_mask
from regard.problem import Problem, Shift
from regard.reference import AdditivePair

BATCH, QUERIES, KEYS, DIM = 3, 4, 19, 5
needs_library = pytest.mark.skipif(cpu.LIBRARY is None, reason="regard was installed without its C++ library")
CPU = pytest.param("cpu", marks=needs_library)


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(DIM, DIM))

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return query @ self.W @ key.mT


ALL_SCORES: dict[str, Callable[[], regard.Score]] = {
    **{name: make for name, (_, make) in SCORES.items()},
    "cosine": regard.Cosine,
    "learnable": lambda: regard.Laplace(0.7, learnable=True),
    "weight_norm": lambda: regard.Additive(DIM, DIM, 8, weight_norm=True),
    "lazy": lambda: regard.Additive(None, None, 8),
    "heads": lambda: regard.Additive(DIM, DIM, 8, heads=2, bias=True),
    "gatv2_heads": lambda: regard.GATv2(DIM, DIM, 8, heads=2),
    "function": lambda: regard.FunctionScore(Quadratic()),
}
LENS = torch.tensor([KEYS, 0, 7])


class From(regard.Mask):
    def __init__(self, first: int) -> None:
        self.first = first

    def allow(self, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        return j >= self.first

    def intervals(self, grid: Grid) -> Intervals:
        return (Interval(self.first, 10**6),)


MASKS = {
    "none": None,
    "custom": From(2),
    "lengths": regard.Lengths(LENS),
    "left_padding": regard.Lengths(start=KEYS - LENS),
    "not": ~regard.Lengths(LENS),
    "two": regard.Lengths(LENS // 2) | regard.Lengths(start=KEYS - LENS // 3),
    "keep": regard.Keep(torch.arange(BATCH * KEYS).reshape(BATCH, 1, KEYS) % 3 > 0),
    "tensor": torch.arange(KEYS) % 2 == 0,
    "both": regard.Lengths(LENS) & (torch.arange(KEYS) % 3 > 0),
    "nothing": regard.Lengths(0),
}


def mask_for(name: str, score: regard.Score) -> regard.Mask | Tensor | None:
    mask = MASKS[name]
    return regard.Keep(mask.keep.unsqueeze(1)) if isinstance(mask, regard.Keep) and score.heads > 1 else mask


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def assert_close(found: Tensor, true: Tensor) -> None:
    torch.testing.assert_close(found, true, rtol=2e-5, atol=2e-6)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems that the C++ kernels were given."""
    problems: list[Problem] = []

    def run(problem: Problem) -> tuple[Tensor, Tensor | None]:
        problems.append(problem)
        return cpu.run(problem)

    monkeypatch.setitem(kernels.TABLE, "cpu", kernels.TABLE["cpu"]._replace(run=run))
    return problems


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many keys were laid out for the kernels at a time."""
    counts: list[int] = []
    prepare = cpu.prepare

    def counting(pair: Any, key: Tensor, room: int = 0, prepared: Tensor | None = None, first: int = 0) -> Tensor:
        laid = prepare(pair, key, room, prepared, first)
        counts.append(key.shape[2] - (first if laid is prepared else 0))
        return laid

    monkeypatch.setattr(cpu, "prepare", counting)
    return counts


# --- It is attend.


def test_every_score_is_here() -> None:
    public = {each for each in vars(scores).values() if isinstance(each, type) and issubclass(each, regard.Score)}
    assert {type(make()) for make in ALL_SCORES.values()} == public - {regard.Score, scores._Bandwidth}


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "auto"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ALL_SCORES)
def test_output_weights_and_gradients_are_those_of_attend(name: str, mask: str, impl: str, ran: list[Problem]) -> None:
    score = ALL_SCORES[name]()
    query, key, value = draw(BATCH, QUERIES, DIM), draw(BATCH, KEYS, DIM), draw(BATCH, KEYS, DIM)
    own = mask_for(mask, score)
    memory = regard.Memory(score, key, value, own, impl=impl)
    assert len(memory) == memory.keys == KEYS
    if impl in regard.explain(query, key, value, score, own).refused:
        with pytest.raises(ValueError, match=f"impl='{impl}' refuses"):
            memory.attend(query)
        return
    true = regard.attend(query, key, value, score, own, impl="reference")
    weights = regard.weights(query, key, score, own)
    rows = memory.attend(query)
    steps = torch.stack([memory.attend(query[:, n]) for n in range(QUERIES)], -2)
    seen = memory.attention(query)
    assert len(ran) == (QUERIES + 2) * (impl == "cpu")
    assert all(problem.prepared is not None for problem in ran)
    for out in (rows, steps, seen.out):
        assert_close(out, true)
    for found in (memory.weights(query), seen.weights()):
        assert_close(found, weights)
    assert_close(memory.weights(query[:, 1]), weights[..., 1, :])
    assert_close(memory.attention(query[:, 1]).out, true[..., 1:2, :])
    leaves, direction = [query, key, value, *score.parameters()], torch.randn_like(true)
    expected = torch.autograd.grad(true, leaves, direction, allow_unused=True)
    for out in (rows, steps):
        found = torch.autograd.grad(out, leaves, direction, allow_unused=True, retain_graph=True)
        for leaf, gradient, exact in zip(leaves, found, expected, strict=True):
            none = torch.zeros_like(leaf)
            assert_close(none if gradient is None else gradient, none if exact is None else exact)


@pytest.mark.parametrize("normalizer", [regard.Sparsemax(), regard.Entmax15(), regard.Sigmoid()], ids=str)
def test_every_normalizer(normalizer: regard.Normalizer) -> None:
    score, query, key = regard.Additive(DIM, DIM, 8), draw(BATCH, DIM), draw(BATCH, KEYS, DIM)
    memory = regard.Memory(score, key, key, MASKS["lengths"], normalizer=normalizer)
    true = regard.attend(query[:, None], key, key, score, MASKS["lengths"], normalizer=normalizer)
    assert_close(memory.attend(query), true[:, 0])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ALL_SCORES)
def test_scores_normalized_and_read_are_what_attend_does(name: str, mask: str) -> None:
    score = ALL_SCORES[name]()
    query, key, value = draw(BATCH, QUERIES, DIM), draw(BATCH, KEYS, DIM), draw(BATCH, KEYS, DIM)
    memory = regard.Memory(score, key, value, mask_for(mask, score))
    s, visible = memory.scores(query), memory.visible()
    assert visible.shape == (*s.shape[:-2], KEYS)
    assert torch.equal(s != -torch.inf, visible.unsqueeze(-2).expand_as(s))
    p = regard.Softmax()(s)
    assert_close(p, memory.weights(query))
    assert_close(memory.read(p), memory.attend(query))
    assert_close(memory.scores(query[:, 1]), s[..., 1, :])
    assert_close(memory.read(p[..., 1, :]), memory.attend(query[:, 1]))
    direction = torch.randn_like(value if score.heads == 1 else memory.attend(query))[..., :QUERIES, :]
    leaves = [query, key, value, *score.parameters()]
    expected = torch.autograd.grad(memory.attend(query), leaves, direction, allow_unused=True, retain_graph=True)
    found = torch.autograd.grad(memory.read(p), leaves, direction, allow_unused=True)
    for leaf, gradient, exact in zip(leaves, found, expected, strict=True):
        none = torch.zeros_like(leaf)
        assert_close(none if gradient is None else gradient, none if exact is None else exact)


@pytest.mark.parametrize("name", ALL_SCORES)
def test_a_shift_moves_the_projected_keys(name: str) -> None:
    score = ALL_SCORES[name]()
    query, key = draw(BATCH, DIM), draw(BATCH, KEYS, DIM)
    memory = regard.Memory(score, key, key, mask_for("lengths", score))
    keys = score.project_key(key)
    features, weight = draw(*keys.shape[:-1], 3), draw(keys.shape[-1], 3)
    seen, filters = draw(*keys.shape[:-1], 2), draw(3, 2, 5)
    around = F.pad(seen, (0, 0, 2, 2)).unfold(-2, 5, 1)  # (..., Lk, 2, 5)
    for shift, f in (
        (Shift(features, weight), features),
        (Shift(seen, weight, filters), torch.einsum("...jst,cst->...jc", around, filters)),
    ):
        found = memory.scores(query, shift=shift)
        a = score.project_query(query.unsqueeze(-2))
        true = score.pair()(a, keys + f @ weight.mT).squeeze(-2)
        assert_close(found, true.masked_fill(~memory.visible(), -torch.inf))


@pytest.mark.parametrize("hidden", [8, 70])
@pytest.mark.parametrize(
    ("seen", "weight", "filters", "said"),
    [
        ((BATCH, KEYS, 3), (4, 3), None, f"shift moves {KEYS} keys of size 4; here are {KEYS} of size"),
        ((BATCH, KEYS, 3), (71, 3), None, f"shift moves {KEYS} keys of size 71; here are {KEYS} of size"),
        ((BATCH, KEYS - 1, 3), (None, 3), None, f"shift moves {KEYS - 1} keys of size"),
        ((BATCH + 1, KEYS, 3), (None, 3), None, rf"seen \({BATCH + 1}, {KEYS}, 3\), .* \({BATCH}, {KEYS}, C\)"),
        ((2, BATCH, KEYS, 3), (None, 3), None, r"shift has seen \(2, "),
        ((BATCH, KEYS, 3), (None, 2), None, "shift has seen .* must be"),
        ((BATCH, KEYS, 3), (2, None, 3), None, r"shift has seen .* weight \(2, "),
        ((BATCH, KEYS, 2), (None, 3), (3, 2, 4), r"filters \(3, 2, 4\); .* K odd"),
        ((BATCH, KEYS, 2), (None, 3), (3, 1, 5), r"filters \(3, 1, 5\)"),
        ((BATCH, KEYS, 2), (None, 3), (2, 2, 5), r"filters \(2, 2, 5\)"),
    ],
)
def test_a_shift_that_does_not_fit_is_refused(
    seen: tuple[int, ...],
    weight: tuple[int | None, ...],
    filters: tuple[int, ...] | None,
    said: str,
    hidden: int,
) -> None:
    x = torch.randn(BATCH, KEYS, DIM)
    memory = regard.Memory(regard.Additive(DIM, DIM, hidden), x, x)
    sizes = [hidden if n is None else n for n in weight]
    shift = Shift(torch.randn(seen), torch.randn(sizes), None if filters is None else torch.randn(filters))
    with pytest.raises(ValueError, match=said):
        memory.scores(x[:, 0], shift=shift)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_are_float32_and_what_is_read_is_not(dtype: torch.dtype) -> None:
    x = torch.randn(BATCH, KEYS, DIM, dtype=dtype)
    memory = regard.Memory(regard.ScaledDot(), x, x)
    s = memory.scores(x[:, 0])
    assert (s.dtype, memory.read(s).dtype, memory.dtype) == (torch.float32, dtype, dtype)


def test_what_is_read_is_dropped_as_the_memory_says() -> None:
    x = torch.randn(2, 1000, 4)
    memory = regard.Memory(regard.ScaledDot(), x, torch.ones_like(x), dropout_p=0.25)
    dropped = 1 - 0.75 * memory.read(torch.full((2, 1000), 0.001))
    assert 0.2 < dropped.mean() < 0.3


@pytest.mark.parametrize("shape", [(KEYS,), (BATCH, KEYS + 1), (2, KEYS), (2, 4, KEYS), ()])
def test_weights_of_other_keys_are_refused(shape: tuple[int, ...]) -> None:
    x = torch.randn(BATCH, KEYS, DIM)
    with pytest.raises(ValueError, match=r"weights has shape .* it must be \(3, 19\), or \(3, Lq, 19\)"):
        regard.Memory(regard.ScaledDot(), x, x).read(torch.zeros(shape))


LEADING = (
    ((), (), ()),
    ((), (), (6,)),
    ((2,), (2,), (2,)),
    ((1,), (2,), (1,)),
    ((2,), (), (2,)),
    ((), (2,), (2,)),
    ((2, 3), (2, 3), (2, 3)),
    ((2, 1), (1, 3), (2, 3)),
    ((3,), (2, 3), (2, 1)),
    ((2, 1, 3), (4, 1), (1, 4, 3)),
    ((1,), (1,), (5,)),
)


@pytest.mark.parametrize("impl", ["reference", CPU])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("of_key", "of_value", "of_query"), LEADING)
def test_leading_dimensions_broadcast(
    of_key: tuple[int, ...], of_value: tuple[int, ...], of_query: tuple[int, ...], heads: int, impl: str
) -> None:
    score = regard.Additive(DIM, DIM, 8, heads=heads)
    key, value, query = torch.randn(*of_key, 33, DIM), torch.randn(*of_value, 33, 2), torch.randn(*of_query, 3, DIM)
    true = regard.attend(query, key, value, score, impl="reference")
    memory = regard.Memory(score, key[..., :10, :], value[..., :10, :], impl=impl)
    memory = memory.append(key[..., 10:11, :], value[..., 10:11, :])
    memory = memory.append(key[..., 11:, :], value[..., 11:, :])
    assert_close(memory.attend(query), true)
    if len(of_query) == max(len(of_key), len(of_value)):
        assert_close(memory.attend(query[..., 0, :]), true[..., 0, :])
        assert memory.weights(query[..., 0, :]).shape == (*true.shape[:-2], 33)


def test_an_expanded_key_is_prepared_for_each_sample() -> None:
    class Plain(regard.Dot):
        def project_key(self, key: Tensor) -> Tensor:
            return key[:1].clone().expand_as(key)

        def pair(self) -> Any:
            return AdditivePair(torch.ones(1, DIM))

    key = torch.randn(1, 40, DIM).expand(200, -1, -1)
    query = torch.randn(200, 1, DIM)
    memory = regard.Memory(Plain(), key, key, impl="reference" if cpu.LIBRARY is None else "cpu")
    assert_close(memory.attend(query), regard.attend(query, key, key, Plain(), impl="reference"))


# --- Masks, and what they hide.


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("impl", ["reference", CPU])
def test_what_is_masked_does_not_exist(impl: str, heads: int, garbage: float) -> None:
    score, valid = regard.Additive(DIM, DIM, 8, heads=heads, bias=True), torch.arange(KEYS) < LENS[:, None]
    query, key, value = torch.randn(BATCH, DIM), torch.randn(BATCH, KEYS, DIM), torch.randn(BATCH, KEYS, DIM)
    key[~valid], value[~valid], query[LENS == 0] = garbage, garbage, garbage
    leaves = [x.requires_grad_() for x in (query, key, value)]
    memory = regard.Memory(score, key, value, regard.Lengths(LENS), impl=impl)
    grown = memory.append(key[:, :0], value[:, :0]).append(key, value, regard.Lengths(LENS))
    for each in (memory, grown):
        out = each.attend(query)
        assert out[1].eq(0).all()
        assert each.weights(query)[1].eq(0).all()
        for x in (out, *torch.autograd.grad(out.sum(), [*leaves, *score.parameters()], retain_graph=True)):
            assert x.isfinite().all()
    assert grown.attend(query).allclose(memory.attend(query), atol=1e-6)  # every key twice is every key once


STEP_MASKS = {
    "causal": regard.Causal(),
    "window": regard.Window(3, 0),
    "lengths": regard.Lengths(torch.tensor([2, 5, 9])),
    "rows": regard.Lengths(torch.arange(BATCH * QUERIES).reshape(BATCH, QUERIES)),
    "keep": torch.arange(BATCH * QUERIES * KEYS).reshape(BATCH, QUERIES, KEYS) % 4 > 1,
    "sink": regard.Lengths(2) | regard.Window(2, 0),
}


@pytest.mark.parametrize("own", MASKS)
@pytest.mark.parametrize("further", STEP_MASKS)
def test_a_further_mask_of_the_step(further: str, own: str) -> None:
    score, query = regard.Additive(DIM, DIM, 8), torch.randn(BATCH, QUERIES, DIM)
    key, value = torch.randn(BATCH, KEYS, DIM), torch.randn(BATCH, KEYS, DIM)
    mask = as_mask(STEP_MASKS[further])
    whole = mask if MASKS[own] is None else MASKS[own] & mask
    allowed = whole.lay(Grid((BATCH,), QUERIES, KEYS)).expand(BATCH, QUERIES, KEYS)
    query[~allowed.any(-1)] = torch.nan
    true = regard.attend(query, key, value, score, whole, impl="reference")
    for impl in ("reference", *["cpu"] * (cpu.LIBRARY is not None)):
        memory = regard.Memory(score, key, value, MASKS[own], impl=impl)
        out = memory.attend(query, STEP_MASKS[further])
        assert_close(out, true)
        assert_close(
            *(torch.autograd.grad(x.square().sum(), score.W_q.weight, retain_graph=True)[0] for x in (out, true))
        )
        assert_close(memory.weights(query, STEP_MASKS[further]), regard.weights(query, key, score, whole))


def test_a_mask_of_one_step_is_of_that_step() -> None:
    x, query = torch.randn(2, 5, 4), torch.randn(2, 4)
    memory = regard.Memory(regard.ScaledDot(), x, x)
    before = memory.attend(query)
    assert memory.weights(query, regard.Lengths(torch.tensor([1, 0]))).tolist() == [[1, 0, 0, 0, 0], [0] * 5]
    assert memory.attend(query).equal(before)


@pytest.mark.parametrize(
    "mask",
    [
        regard.Causal(),
        regard.Window(2, 2),
        regard.Prefix(torch.tensor([1, 2, 3])),
        regard.Lengths(LENS) & regard.Causal(),
        regard.Lengths(LENS[:, None]),
        regard.Documents(torch.zeros(1, dtype=torch.int64), torch.zeros(KEYS, dtype=torch.int64)),
    ],
    ids=lambda mask: type(mask).__name__,
)
def test_a_mask_that_differs_by_row_is_of_no_memory(mask: regard.Mask) -> None:
    x = torch.randn(BATCH, KEYS, DIM)
    memory = regard.Memory(regard.Dot(), x, x)
    for make in (lambda: regard.Memory(regard.Dot(), x, x, mask), lambda: memory.append(x, x, mask)):
        with pytest.raises(ValueError, match=r"one for all queries, such as Lengths\(valid_lens\) of shape \(B,\)"):
            make()


# --- Appending.

CROSSED = (1, 2, 31, 32, 33, 255, 256, 257, 258)


@pytest.mark.parametrize("offset", [0.0, 300.0, -1e4])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["additive", "gatv2", "laplace", "heads", "scaled_dot", "function"])
def test_keys_come_one_by_one(name: str, grad: bool, offset: float, ran: list[Problem]) -> None:
    score, query = ALL_SCORES[name](), torch.randn(2, DIM)
    key, value = torch.randn(2, CROSSED[-1], DIM), torch.randn(2, CROSSED[-1], DIM)
    key[:, 40:] += offset
    impl = "cpu" if cpu.LIBRARY is not None and name not in ("scaled_dot", "function") else "reference"
    kept: list[tuple[regard.Memory, Tensor]] = []
    with torch.set_grad_enabled(grad):
        memory = regard.Memory(score, key[:, :1], value[:, :1], impl=impl)
        for n in range(1, CROSSED[-1] + 1):
            if n in CROSSED:
                out = memory.attend(query)
                part = key[:, :n], value[:, :n]
                assert_close(out, regard.attend(query[:, None], *part, score, impl="reference").squeeze(-2))
                kept.append((memory, out))
            memory = memory.append(key[:, n : n + 1], value[:, n : n + 1])
    for n, (earlier, out) in zip(CROSSED, kept, strict=True):  # what was appended since is nothing to those before
        assert len(earlier) == n
        assert_close(earlier.attend(query), out)
    assert len(ran) == (2 * len(CROSSED) if impl == "cpu" else 0)
    assert all(problem.prepared is not None for problem in ran)


@pytest.mark.parametrize("of_new", MASKS)
@pytest.mark.parametrize("of_old", MASKS)
def test_masks_grow_too(of_old: str, of_new: str) -> None:
    def laid(mask: regard.Mask | Tensor | None, keys: int) -> Tensor:
        return (regard.Lengths() if mask is None else as_mask(mask)).lay(Grid((BATCH,), 1, keys)).expand(BATCH, 1, keys)

    score, query = regard.Additive(DIM, DIM, 8), torch.randn(BATCH, QUERIES, DIM)
    for masks in ((of_old, "none", of_new, "none"), (of_old, of_new, "none")):
        x = [torch.randn(BATCH, 2 if mask == "none" else KEYS, DIM) for mask in masks]
        allowed = [laid(MASKS[mask], each.shape[1]) for mask, each in zip(masks, x, strict=True)]
        for impl in ("reference", *["cpu"] * (cpu.LIBRARY is not None)):
            memory = regard.Memory(score, x[0][:, :0], x[0][:, :0], impl=impl)
            if masks[0] != "none":
                memory = regard.Memory(score, x[0], x[0], MASKS[masks[0]], impl=impl)
            for n in range(len(masks)):
                if n or masks[0] == "none":
                    memory = memory.append(x[n], x[n], MASKS[masks[n]])
                keys, mask = torch.cat(x[: n + 1], 1), regard.Keep(torch.cat(allowed[: n + 1], -1))
                for step, whole in ((None, mask), (regard.Causal(), mask & regard.Causal())):
                    true = regard.attend(query, keys, keys, score, whole, impl="reference")
                    assert_close(memory.attend(query, step), true)


@needs_library
@pytest.mark.parametrize("mask", ["none", "custom", "lengths", "left_padding"])
def test_intervals_stay_intervals(mask: str, ran: list[Problem]) -> None:
    score, x = regard.Additive(DIM, DIM, 8), torch.randn(BATCH, KEYS, DIM)
    memory = regard.Memory(score, x, x, MASKS[mask], impl="cpu").append(x, x).append(x, x)
    memory.attend(torch.randn(BATCH, DIM))
    assert ran[0].keep is None
    assert len(ran[0].intervals or ()) == {"none": 0, "custom": 1, "lengths": 2, "left_padding": 1}[mask]


def test_two_that_append_to_one_do_not_see_each_other(prepared: list[int]) -> None:
    score, query = regard.Additive(DIM, DIM, 8), torch.randn(2, DIM)
    impl = "reference" if cpu.LIBRARY is None else "cpu"
    keys, left, right = torch.randn(2, 20, DIM), torch.randn(2, 3, DIM), torch.randn(2, 3, DIM) + 300
    with torch.no_grad():
        base = regard.Memory(score, keys[:, :10], keys[:, :10], impl=impl).append(keys[:, 10:], keys[:, 10:])
        forks = [base.append(x, x) for x in (left, right)]
        forks.append(forks[0].append(right, right))
        forks.append(forks[0].append(left, left))
    for memory, parts in zip([base, *forks], [(), (left,), (right,), (left, right), (left, left)], strict=True):
        whole = torch.cat([keys, *parts], 1)
        assert_close(memory.attend(query), regard.attend(query[:, None], whole, whole, score)[:, 0])
    assert forks[0]._rows[0].data_ptr() == base._rows[0].data_ptr() == forks[2]._rows[0].data_ptr()
    assert len({forks[n]._rows[0].data_ptr() for n in (0, 1, 3)}) == 3


def test_threads_that_append_to_one_do_not_see_each_other() -> None:
    x = torch.zeros(1, 1, 1)
    with torch.no_grad():
        base = regard.Memory(regard.Dot(), x, x).append(x, x)
    together, found = threading.Barrier(4), {}

    def grow(number: int) -> None:
        with torch.no_grad():
            for turn in range(200):
                together.wait()
                memory, own = base, x + 200 * number + turn
                for _ in range(3):
                    memory = memory.append(own, own)
                together.wait()
                found[number, turn] = memory._rows[1].flatten().tolist() == [0.0, 0.0, *[float(own)] * 3]

    threads = [threading.Thread(target=grow, args=[n]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 800
    assert all(found.values())


@pytest.mark.parametrize("mask", [None, regard.Lengths(torch.tensor([1, 0]))], ids=["none", "lengths"])
def test_appending_touches_each_key_a_few_times(
    mask: regard.Mask | None, prepared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    copy_ = Tensor.copy_

    def counting(self: Tensor, source: Tensor) -> Tensor:
        written.append(self.numel() * self.element_size())
        return copy_(self, source)

    monkeypatch.setattr(Tensor, "copy_", counting)
    monkeypatch.setattr(torch, "cat", lambda *_: pytest.fail("all was copied"))
    score, x, n = regard.Additive(8, 8, 64), torch.randn(2, 1, 8), 1000
    with torch.no_grad():
        memory = regard.Memory(score, x, x, mask, impl="auto" if cpu.LIBRARY is None else "cpu")
        places = set()
        for _ in range(n):
            memory = memory.append(x, x)
            places.add(memory._rows[0].data_ptr())
    final = sum(rows.numel() * rows.element_size() for rows in memory._rows)
    assert len(memory) == n + 1
    assert len(places) <= 11  # it doubles
    assert sum(written) < 4 * final
    assert sum(prepared) < 4 * n or cpu.LIBRARY is None


@needs_library
def test_auto_prepares_once_it_pays(ran: list[Problem]) -> None:
    score, query = regard.Additive(DIM, DIM, 64), torch.randn(4, DIM)
    x = torch.randn(4, 600, DIM)
    with torch.no_grad():
        memory = regard.Memory(score, x[:, :1], x[:, :1])
        for n in range(1, 600):
            assert_close(memory.attend(query), regard.attend(query[:, None], x[:, :n], x[:, :n], score)[:, 0])
            memory = memory.append(x[:, n : n + 1], x[:, n : n + 1])
    ours = [problem for problem in ran if problem.prepared is not None]
    assert 0 < len(ours) < 600
    assert len(ran) == 2 * len(ours)  # attend's own, of as many keys, are not prepared


def test_from_nothing() -> None:
    nothing, x, query = torch.zeros(2, 0, DIM), torch.randn(2, 40, DIM), torch.randn(2, DIM)
    for score in (regard.Additive(DIM, DIM, 8), regard.ScaledDot(), regard.Additive(DIM, DIM, 8, heads=2)):
        memory = regard.Memory(score, nothing, nothing)
        assert memory.attend(torch.full_like(query, torch.nan)).eq(0).all()
        assert memory.weights(query).numel() == 0
        with torch.no_grad():
            for n in range(40):
                memory = memory.append(x[:, n : n + 1], x[:, n : n + 1])
        assert_close(memory.attend(query), regard.attend(query[:, None], x, x, score).squeeze(-2))


@pytest.mark.parametrize("name", ["additive", "heads", "bilinear", "learnable"])
def test_gradients_reach_every_key_appended(name: str) -> None:
    score, query = ALL_SCORES[name](), draw(2, 6, DIM)
    key, value = draw(2, 6, DIM), draw(2, 6, 3)
    leaves = [query, key, value, *score.parameters()]
    memory = regard.Memory(score, key[:, :1], value[:, :1], impl="reference")
    steps = []
    for n in range(6):
        steps.append(memory.attend(query[:, n]))
        memory = memory.append(key[:, n + 1 : n + 2], value[:, n + 1 : n + 2])
    true = regard.attend(query, key, value, score, regard.Causal(), impl="reference")
    out, direction = torch.stack(steps, -2), torch.randn_like(true)
    assert_close(out, true)
    for found, exact in zip(*(torch.autograd.grad(x, leaves, direction) for x in (out, true)), strict=True):
        assert_close(found, exact)


def test_only_the_new_keys_may_need_gradients() -> None:
    old, new, query = torch.randn(2, 3, DIM), draw(2, 1, DIM), torch.randn(2, DIM)
    memory = regard.Memory(regard.ScaledDot(), old, old)
    found = torch.autograd.grad(memory.append(new, new).append(old, old).attend(query).sum(), new)[0]
    whole = torch.cat([old, new, old], 1)
    assert_close(found, torch.autograd.grad(regard.attend(query[:, None], whole, whole).sum(), new)[0])
    with torch.no_grad():
        assert not memory.append(new, new).attend(query).requires_grad


# --- Selecting.


@pytest.mark.parametrize("impl", ["reference", CPU])
@pytest.mark.parametrize("name", ["additive", "heads", "laplace", "scaled_dot"])
def test_beams(name: str, impl: str) -> None:
    if impl == "cpu" and name == "scaled_dot":
        pytest.skip("no pair of the C++ kernels")
    score, lens = ALL_SCORES[name](), torch.tensor([5, 0, 3])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, DIM)
    with torch.no_grad():
        memory = regard.Memory(score, x, x, regard.Lengths(lens), impl=impl)
        keys, allowed = x, (torch.arange(5) < lens[:, None])[:, None]
        for _ in range(12):
            index = torch.randint(len(keys), (int(torch.randint(1, 6, (), generator=generator)),), generator=generator)
            keys, allowed, before = keys[index], allowed[index], memory
            memory = memory.select(index)
            new, query = torch.randn(len(index), 1, DIM), torch.randn(len(index), DIM)
            mask = allowed if score.heads == 1 else allowed[:, None]
            assert_close(memory.attend(query), regard.attend(query[:, None], keys, keys, score, mask).squeeze(-2))
            other = before.append(torch.randn(1, 1, DIM), torch.randn(1, 1, DIM))
            memory = memory.append(new, new)
            keys = torch.cat([keys, new], 1)
            allowed = torch.cat([allowed, torch.ones(len(index), 1, 1, dtype=torch.bool)], -1)
            mask = allowed if score.heads == 1 else allowed[:, None]
            assert_close(memory.attend(query), regard.attend(query[:, None], keys, keys, score, mask).squeeze(-2))
            assert len(other) == len(memory)


def test_no_beam_goes_on() -> None:
    for key in (torch.randn(2, 6, DIM), torch.randn(1, 6, DIM)):
        memory = regard.Memory(regard.Additive(DIM, DIM, 8), key, key).select(torch.zeros(0, dtype=torch.int64))
        assert memory.attend(torch.randn(0, DIM)).shape == (0, DIM)
        assert len(memory.append(torch.randn(0, 2, DIM), torch.randn(0, 2, DIM))) == 8


def test_a_selection_keeps_its_room() -> None:
    x, index = torch.randn(2, 8, DIM), torch.tensor([1, 1, 0])
    with torch.no_grad():
        memory = regard.Memory(regard.Dot(), x, x).append(x, x).select(index)
        more = memory.append(x[index], x[index])
    assert more._rows[0].data_ptr() == memory._rows[0].data_ptr()


def test_what_samples_share_is_not_copied_and_stays_apart() -> None:
    key, value, query = torch.randn(1, 8, DIM), torch.randn(3, 8, DIM), torch.randn(3, DIM)
    with torch.no_grad():
        memory = regard.Memory(regard.Dot(), key, value).append(key, value)
        chosen = memory.select(torch.tensor([2, 0, 0]))
        assert chosen._rows[0].data_ptr() == memory._rows[0].data_ptr()
        ones, twos = (chosen.append(key + n, value + n) for n in (1, 2))
        more = memory.append(key + 3, value + 3)
        memory = regard.Memory(regard.Dot(), key, value).append(key, value)
        beams = regard.Memory(regard.Dot(), key, key).select(torch.tensor([0, 0, 0]))
        assert_close(beams.attend(query), regard.attend(query[:, None], key, key, regard.Dot())[:, 0])
        own = beams.append(value, value)
        wide = memory.append(value, value)
    assert_close(wide.attend(query), regard.attend(query[:, None], torch.cat([key.expand(3, -1, -1)] * 2 + [value], 1),
                                            torch.cat([value] * 3, 1), regard.Dot())[:, 0])  # fmt: skip
    picked = value[[2, 0, 0]]
    for grown, n, first in ((ones, 1, picked), (twos, 2, picked), (more, 3, value)):
        values = torch.cat([first, first, (value + n)], 1)
        keys = torch.cat([key, key, key + n], 1)
        assert_close(grown.attend(query), regard.attend(query[:, None], keys, values, regard.Dot())[:, 0])
    whole = torch.cat([key.expand(3, -1, -1), value], 1)
    assert_close(own.attend(query), regard.attend(query[:, None], whole, whole, regard.Dot())[:, 0])


def test_gradients_go_through_a_selection() -> None:
    x, index = draw(3, 6, DIM), torch.tensor([2, 2, 0])
    score, query = regard.Additive(DIM, DIM, 8), torch.randn(3, DIM)
    found = regard.Memory(score, x, x).select(index).attend(query)
    true = regard.attend(query[:, None], x[index], x[index], score)[:, 0]
    assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (found, true)))


# --- It does not change.


def test_it_has_memory_of_its_own() -> None:
    for score in (regard.ScaledDot(), regard.Cosine(), regard.FunctionScore(lambda query, key: query @ key.mT)):
        key, value, query = torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.randn(2, 4)
        memory = regard.Memory(score, key, value)
        before = memory.attend(query)
        key.zero_()
        value.zero_()
        assert memory.attend(query).equal(before)


def test_it_has_memory_of_its_own_where_heads_are_views() -> None:
    class Split(regard.Score):
        heads = 2

        def project_query(self, query: Tensor) -> Tensor:
            return query.unflatten(-1, (2, -1)).transpose(-2, -3)

        def project_key(self, key: Tensor) -> Tensor:
            return self.project_query(key)

        def pair(self) -> Any:
            return regard.Dot().pair()

    key, value, query = torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.randn(2, 4)
    memory = regard.Memory(Split(), key, value)
    before = memory.attend(query)
    assert before.shape == (2, 2, 4)
    key.zero_()
    value.zero_()
    assert memory.attend(query).equal(before)


def test_what_was_seen_may_be_read_after_more_was_appended() -> None:
    score, x, query = regard.Additive(DIM, DIM, 8), torch.randn(2, 9, DIM), draw(2, DIM)
    with torch.no_grad():
        memory = regard.Memory(score, x, x).append(x, x)
    seen = memory.attention(query)
    weights = memory.weights(query)
    with torch.no_grad():
        memory.append(x, x).append(x, x)
    assert_close(seen.weights()[:, 0], weights)
    seen.out.sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()


def test_nothing_appended_is_nothing_written() -> None:
    x, query = draw(2, 9, DIM), draw(2, DIM)
    memory = regard.Memory(regard.Additive(DIM, DIM, 8), x, x)
    out = memory.attend(query)
    with torch.no_grad():
        assert len(memory.append(x[:, :0], x[:, :0])) == 9
    out.sum().backward()


def test_weights_are_those_of_the_call() -> None:
    score, x, query = regard.Additive(DIM, DIM, 8), torch.randn(2, 9, DIM), torch.randn(2, DIM)
    memory = regard.Memory(score, x, x)
    with torch.no_grad():
        seen = memory.attention(query)
        before = seen.weights()
        score.w_v.weight.mul_(3)
    assert seen.weights().equal(before)
    assert not seen.weights().requires_grad


def test_parameters_may_change_between_steps() -> None:
    score, x, query = regard.Additive(DIM, DIM, 8, weight_norm=True), torch.randn(2, 40, DIM), torch.randn(2, DIM)
    impl = "reference" if cpu.LIBRARY is None else "cpu"
    memory = regard.Memory(score, x, x, impl=impl)
    with torch.no_grad():
        for parameter in (score.W_q.weight, score.w_v.weight, score.g):
            assert parameter is not None
            parameter.mul_(-2)
    assert_close(memory.attend(query), regard.attend(query[:, None], x, x, score)[:, 0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(duplicate: Callable[[regard.Memory], regard.Memory]) -> None:
    score, x, query = regard.Additive(DIM, DIM, 8), torch.randn(2, 30, DIM), torch.randn(2, DIM)
    impl = "reference" if cpu.LIBRARY is None else "cpu"
    with torch.no_grad():
        memory = regard.Memory(score, x, x, regard.Lengths(torch.tensor([3, 30])), impl=impl).append(x, x)
        again = duplicate(memory)
        assert again.attend(query).equal(memory.attend(query))
        for each, n in ((memory, 1), (again, 2)):
            grown = each.append(x + n, x + n)
            keys = torch.cat([x, x, x + n], 1)
            allowed = torch.ones(2, 1, 90, dtype=torch.bool)
            allowed[0, 0, 3:30] = False
            assert_close(grown.attend(query), regard.attend(query[:, None], keys, keys, score, allowed)[:, 0])


def test_a_pickle_holds_no_spare_room() -> None:
    x = torch.randn(1, 1000, 8)
    with torch.no_grad():
        memory = regard.Memory(regard.Dot(), x, x)
        assert len(pickle.dumps(memory.append(x[:, :1], x[:, :1]))) < 1.1 * len(pickle.dumps(memory))


# --- Devices, dtypes, modes.


@pytest.mark.parametrize("name", ["additive", "heads", "laplace", "gaussian", "scaled_dot"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, name: str) -> None:
    score, x, query = ALL_SCORES[name](), torch.randn(BATCH, KEYS, DIM), torch.randn(BATCH, DIM)
    with torch.no_grad():
        memory = regard.Memory(score, x, x, MASKS["lengths"]).append(x, x).to(dtype)
        score.to(dtype)
        out = memory.append(x.to(dtype), x.to(dtype), MASKS["lengths"]).attend(query.to(dtype))
        score.double()
        keys = torch.cat([x, x, x], 1).double()
        allowed = torch.ones(BATCH, 1, 3 * KEYS, dtype=torch.bool)
        for n in (0, 2):
            allowed[:, 0, n * KEYS : (n + 1) * KEYS] = torch.arange(KEYS) < LENS[:, None]
        mask = allowed if score.heads == 1 else allowed[:, None]
        true = regard.attend(query[:, None].double(), keys, keys, score, mask).squeeze(-2)
    assert out.dtype == dtype
    assert (out - true).abs().max() <= 8 * torch.finfo(dtype).eps * true.abs().max() + 1e-6


def test_autocast() -> None:
    score, x, query = regard.Additive(DIM, DIM, 8), torch.randn(2, 9, DIM), torch.randn(2, DIM)
    plain = regard.Memory(score, x, x)
    with torch.autocast("cpu", torch.bfloat16):
        memory = regard.Memory(score, x, x).append(x, x)
        true = regard.attend(query[:, None], torch.cat([x, x], 1), torch.cat([x, x], 1), score)[:, 0]
        assert memory.attend(query).dtype == true.dtype == torch.bfloat16
        torch.testing.assert_close(memory.attend(query.bfloat16()), true)
        assert plain.append(x.bfloat16(), x.bfloat16()).attend(query.bfloat16()).dtype == torch.float32
        with pytest.raises(ValueError, match=r"query is torch\.float64"):
            memory.attend(query.double())


def test_to_the_same_is_as_it_was() -> None:
    x, query = torch.randn(2, 9, DIM), torch.randn(2, DIM)
    with torch.no_grad():
        memory = regard.Memory(regard.Dot(), x, x).append(x, x)
        same = memory.to("cpu").to(torch.float32)
        ones, twos = same.append(x, x), memory.append(x + 1, x + 1)
    whole = torch.cat([x, x, x], 1)
    assert_close(ones.attend(query), regard.attend(query[:, None], whole, whole, regard.Dot())[:, 0])
    assert not twos.attend(query).allclose(ones.attend(query))


def test_to_another_device() -> None:
    x = torch.randn(2, 9, DIM)
    memory = regard.Memory(regard.Additive(DIM, DIM, 8), x, x, regard.Lengths(torch.tensor([3, 0])))
    moved, query = memory.to("meta"), torch.zeros(2, DIM, device="meta")
    assert {each.device.type for each in moved._rows} == {"meta"}
    moved.score.to("meta")
    for each in (moved, moved.append(x.to("meta"), x.to("meta"))):
        assert each.attend(query).device.type == each.attend(query, regard.Causal()).device.type == "meta"


def test_inference_mode() -> None:
    score, x, query = regard.Additive(DIM, DIM, 8), torch.randn(2, 9, DIM), torch.randn(2, DIM)
    with torch.inference_mode():
        memory, other = (regard.Memory(score, x, x).append(x, x) for _ in range(2))
        inside = memory.append(x, x).attend(query)
    with torch.no_grad():
        assert_close(other.append(x, x).attend(query), inside)
    with torch.no_grad():
        outside = regard.Memory(score, x, x).append(x, x)
    with torch.inference_mode():
        assert_close(outside.append(x, x).attend(query), inside)


def test_dropout_is_that_of_attend() -> None:
    score, x, query = regard.Additive(DIM, DIM, 8), torch.randn(2, 50, DIM), torch.randn(2, 3, DIM)
    memory = regard.Memory(score, x, x, dropout_p=0.5)
    torch.manual_seed(7)
    true = regard.attend(query, x, x, score, dropout_p=0.5)
    torch.manual_seed(7)
    assert_close(memory.weights(query), regard.weights(query, x, score))  # draws no seed
    assert_close(memory.attend(query), true)
    assert not memory.attend(query).allclose(true)  # another step, another seed


def test_under_vmap_it_is_the_reference() -> None:
    score, x, query = regard.Additive(DIM, DIM, 64), torch.randn(2, 600, DIM), torch.randn(7, 2, DIM)
    memory = regard.Memory(score, x, x)
    assert_close(torch.func.vmap(memory.attend)(query), torch.stack([memory.attend(each) for each in query]))

    def own(x: Tensor, query: Tensor) -> Tensor:
        return regard.Memory(score, x, x).append(x, x).select(torch.tensor([1, 0])).attend(query)

    keys = torch.randn(7, 2, 9, DIM)
    assert_close(torch.func.vmap(own)(keys, query), torch.stack(list(map(own, keys, query))))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile's, of the memory's keys
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mask", [None, regard.Lengths(torch.tensor([3, 0]))], ids=["none", "lengths"])
@pytest.mark.parametrize("score", [regard.Additive(DIM, DIM, 64), regard.ScaledDot()], ids=["additive", "dot"])
def test_a_compiled_step(score: regard.Score, mask: regard.Mask | None, grad: bool) -> None:
    torch._dynamo.reset()
    step = torch.compile(lambda memory, query: memory.attend(query), fullgraph=True, backend="aot_eager")
    x, query = torch.randn(2, 600, DIM), torch.randn(2, DIM)
    with torch.set_grad_enabled(grad):
        memory = regard.Memory(score, x, x, mask)
        for _ in range(3):
            assert_close(step(memory, query), memory.attend(query))
            memory = memory.append(query[:, None], query[:, None])


def test_a_compiled_decoder() -> None:
    torch._dynamo.reset()
    score, softmax, mask = regard.Additive(DIM, DIM, 8), regard.Softmax(), regard.Lengths(torch.tensor([3, 0]))

    def decode(x: Tensor, query: Tensor) -> Tensor:
        memory = regard.Memory(score, x, x, mask, normalizer=softmax)
        for _ in range(3):
            query = memory.attend(query)
            memory = memory.append(query[:, None], query[:, None]).select(torch.tensor([1, 0]))
        return query

    x, query = draw(2, 9, DIM), torch.randn(2, DIM)
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(x, query), decode(x, query))
    found, true = compiled(x, query), decode(x, query)
    assert_close(found, true)
    assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in (found, true)))


# --- Errors.


def made(**changes: Any) -> Any:
    x = torch.randn(2, 9, DIM)
    return regard.Memory(**{"score": regard.Additive(DIM, DIM, 8), "key": x, "value": x, **changes})


X, ROW = torch.randn(2, 9, DIM), torch.randn(2, 1, DIM)
ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: made(score=torch.relu), TypeError, "score is <.*it must be a Score"),
    (lambda: made(key=[1]), TypeError, "key is a list; it must be a Tensor"),
    (lambda: made(value=X.long()), TypeError, "value has dtype torch.int64; it must be a floating type"),
    (lambda: made(key=X[0, 0]), ValueError, r"key has shape \(5,\); it must be \(..., length, size\)"),
    (lambda: made(key=X.double()), ValueError, "they are key torch.float64 on cpu, value torch.float32 on cpu"),
    (lambda: made(key=X[:, 1:]), ValueError, r"\(2, 8, 5\) and \(2, 9, 5\); each key needs one value"),
    (lambda: made(value=torch.randn(3, 9, 5)), ValueError, "leading dimensions do not broadcast"),
    (lambda: made(key=X[..., :3]), ValueError, r"key has shape \(2, 9, 3\), of size 3; W was made for size 5"),
    (lambda: made(mask=regard.Lengths(torch.tensor([10, 3]))), ValueError, "valid_lens spans 3 .. 10; .* in 0 .. 9"),
    (lambda: made(mask=torch.ones(2, 9)), TypeError, "mask has dtype torch.float32; it must be bool"),
    (lambda: made(mask=torch.ones(2, 9) > 0), ValueError, r"mask has shape \(2, 9\); .* broadcast to \(2, 1, 9\)"),
    (lambda: made(normalizer=regard.Softmax), TypeError, "normalizer is .*; it must be a Normalizer"),
    (lambda: made(dropout_p=1.5), ValueError, "dropout_p is 1.5; it must be a number in 0 .. 1"),
    (lambda: made(impl="tpu").attend(ROW), ValueError, "impl is 'tpu'; it must be 'auto' or one of"),
    (lambda: made().attend([1]), TypeError, "query is a list; it must be a Tensor"),
    (lambda: made().attend(ROW.double()), ValueError, "query is torch.float64 on cpu; it must be torch.float32 on cpu"),
    (lambda: made().attend(ROW.long()), ValueError, "query is torch.int64 on cpu; it must be torch.float32"),
    (lambda: made().attend(ROW.to("meta")), ValueError, "query is torch.float32 on meta; it must be .* on cpu"),
    (lambda: made().attend(ROW[0, 0]), ValueError, r"query has shape \(5,\); .* \(2, Dq\), .* or \(2, Lq, Dq\)"),
    (lambda: made().attend(torch.randn(3, 5)), ValueError, r"query has shape \(3, 5\); .* must be \(2, Dq\)"),
    (lambda: made().attend(torch.randn(2, 1, 3)), ValueError, r"query has shape \(2, 1, 3\), of size 3; W was made"),
    (lambda: made(score=regard.Dot()).attend(ROW[..., :3]), ValueError, "to size 3 and the memory's keys to size 5"),
    (lambda: made().attend(ROW, torch.ones(2, 9)), TypeError, "mask has dtype torch.float32"),
    (lambda: made().attend(ROW, regard.Lengths(LENS // 3)), ValueError, r"valid_lens has shape \(3,\); .* \(2,\)"),
    (lambda: made().append(ROW, ROW[..., :3]), ValueError, "value has size 3; it must be 5, as in the memory"),
    (lambda: made(score=regard.Dot()).append(ROW[..., :3], ROW), ValueError, "key has size 3 .* must be 5"),
    (lambda: made().append(ROW.double(), ROW.double()), ValueError, "float64 on cpu; they must be torch.float32 on"),
    (lambda: made().append(ROW, ROW.to("meta")), ValueError, "on one device; they are key .* on cpu, value .* on meta"),
    (lambda: made().append(X[:, :2], ROW), ValueError, "each key needs one value"),
    (lambda: made().append(torch.ones(3, 1, 5), torch.ones(3, 1, 5)), ValueError, r"\(3,\); .* memory's, \(2,\)"),
    (lambda: made(key=X[:1], value=X[:1]).append(ROW, ROW), ValueError, r"\(2,\); .* to the memory's, \(1,\)"),
    (lambda: made().append(ROW, ROW, regard.Lengths(2)), ValueError, "valid_lens spans 2 .. 2; .* in 0 .. 1"),
    (lambda: made().select(torch.tensor([0, 2])), ValueError, r"index is \[0, 2\]; each must lie in 0 .. 1"),
    (lambda: made().select(torch.tensor([-1])), ValueError, r"index is \[-1\]; each must lie in 0 .. 1"),
    (lambda: made().select(torch.tensor(0)), ValueError, r"index has shape \(\) on cpu; it must be of one dimension"),
    (lambda: made().select(torch.tensor([True])), TypeError, "index is .*; it must be an int64 Tensor"),
    (lambda: made().select([0]), TypeError, r"index is \[0\]; it must be an int64 Tensor"),
    (lambda: made(key=X[0], value=X[0]).select(torch.tensor([0])), ValueError, "no leading dimension"),
    (lambda: made(key=X[0], value=X[0], score=regard.GATv2(5, 5, 4, heads=2)).select(torch.tensor([0])), ValueError,
     "no leading dimension"),
    (lambda: made().to(torch.int64), ValueError, "target is torch.int64; it must be a floating type, or a device"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), ERRORS, ids=[match for *_, match in ERRORS])
def test_errors_name_what_was_wrong(call: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_repr() -> None:
    found = "Memory(Additive, 9 keys of size 8 and values of size 5, leading dimensions (2,), torch.float32)"
    assert repr(made()) == found
