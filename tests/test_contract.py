"""Every implementation against the float64 oracle, and every check against faults it must catch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import CASES, IMPLEMENTATIONS, KEY_DIM, QUERY_DIM, Case, check, inputs, mask_of, score_for
from torch import Tensor

import regard
from regard import kernels
from regard.intervals import Grid, Interval
from regard.problem import Problem
from regard.reference import AdditivePair


def refused(case: Case, impl: str) -> str | None:
    given = inputs(case)
    mask = mask_of(case.mask, case.queries, case.keys)
    return regard.explain(given.query, given.key, given.value, given.score, mask).refused.get(impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_every_gradient(case: Case, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = refused(case, impl)
    if reason is not None:
        with pytest.raises(ValueError, match="refuses"):
            check(case, impl)
        return
    runs: list[str] = []

    def counted(problem: Problem) -> tuple[Tensor, Tensor | None]:
        runs.append(impl)
        return implementation.run(problem)

    implementation = kernels.TABLE[impl]
    monkeypatch.setitem(kernels.TABLE, impl, implementation._replace(run=counted))
    monkeypatch.setattr(kernels.chunked, "BLOCK_BYTES", 4096)  # several blocks, the last one shorter
    check(case, impl)
    assert runs == [impl]


def test_sdpa_takes_what_it_should() -> None:
    taken = {case.mask for case in CASES if case.score == "scaled_dot" and refused(case, "sdpa") is None}
    assert taken == {"none", "lengths", "left_padding"}
    assert refused(Case("dot", "causal", 15, 15), "sdpa") is None


# --- Each fault is an implementation with one thing wrong.


def last_key_dropped(problem: Problem) -> Tensor:
    keep = torch.ones(problem.queries, problem.keys, dtype=torch.bool)
    keep[:, -1] = False
    return masked(problem, keep & dense(problem)).attend()


def last_rows_dropped(problem: Problem) -> Tensor:
    out = problem.attend()
    return torch.cat([out[..., :-1, :], torch.zeros_like(out[..., -1:, :])], -2)


def one_element_off(problem: Problem) -> Tensor:
    off = torch.zeros_like(problem.value)
    off[0, 0, 0] = 1e-4
    return problem._replace(value=problem.value + off).attend()


def mask_shifted_by_one(problem: Problem) -> Tensor:
    return masked(problem, dense(problem).roll(1, -1)).attend()


def mask_ignored_past_key_16(problem: Problem) -> Tensor:
    return masked(problem, dense(problem) | (torch.arange(problem.keys) >= 16)).attend()


def gradient_zeroed(problem: Problem) -> Tensor:
    return with_v(problem, lambda v: v.detach()).attend()


def gradient_halved(problem: Problem) -> Tensor:
    return with_v(problem, lambda v: v / 2 + v.detach() / 2).attend()


def values_gradient_lost(problem: Problem) -> Tensor:
    return problem._replace(value=problem.value.detach()).attend()


def dense(problem: Problem) -> Tensor:
    allowed = problem.allowed()
    assert allowed is not None
    return allowed.expand(*problem.leading, problem.queries, problem.keys)


def masked(problem: Problem, keep: Tensor) -> Problem:
    return problem._replace(intervals=None, shared=None, keep=keep)


def with_v(problem: Problem, change: Callable[[Tensor], Tensor]) -> Problem:
    assert isinstance(problem.pair, AdditivePair)
    return problem._replace(pair=problem.pair._replace(v=change(problem.pair.v)))


FAULTS = (
    last_key_dropped,
    last_rows_dropped,
    one_element_off,
    mask_shifted_by_one,
    mask_ignored_past_key_16,
    gradient_zeroed,
    gradient_halved,
    values_gradient_lost,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_check_catches(fault: Callable[[Problem], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(mask="causal", queries=5, keys=19)
    check(case, "reference")
    monkeypatch.setitem(kernels.TABLE, "reference", kernels.WHOLE._replace(run=lambda problem: (fault(problem), None)))
    with pytest.raises(AssertionError):
        check(case, "reference")


# --- Numbers from outside.


@pytest.mark.parametrize("impl", ["reference", "chunked", "cpu"])
def test_equal_keys_give_the_mean_of_the_valid_values(impl: str) -> None:
    values = torch.arange(40.0).reshape(1, 10, 4).repeat(2, 1, 1)
    score, lens = regard.Additive(20, 2, 8), torch.tensor([2, 6])
    out = regard.attend(torch.randn(2, 1, 20), torch.ones(2, 10, 2), values, score, regard.Lengths(lens), impl=impl)
    torch.testing.assert_close(out, torch.tensor([[[2.0, 3, 4, 5]], [[10.0, 11, 12, 13]]]))


@pytest.mark.parametrize("impl", ["reference", "chunked", "cpu"])
def test_additive_with_identity_projections(impl: str) -> None:
    score = regard.Additive(2, 2, 2)
    with torch.no_grad():
        for weight in (score.W_q.weight, score.W_k.weight):
            weight.copy_(torch.eye(2))
        score.w_v.weight.fill_(1.0)
    query, key = torch.eye(2)[None], torch.tensor([[[0.0, 1], [1, 0]]])
    value = torch.tensor([[[1.0, 2], [3, 4]]])
    seen = regard.attention(query, key, value, score, impl=impl)
    torch.testing.assert_close(seen.weights()[0], torch.tensor([[0.636, 0.364], [0.364, 0.636]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen.out, seen.weights() @ value)


def test_masked_scores() -> None:
    def scores(query: Tensor, key: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0, 1.0]])

    p = regard.weights(torch.zeros(1, 1), torch.zeros(3, 1), regard.FunctionScore(scores), regard.Lengths(2))
    torch.testing.assert_close(p, torch.tensor([[0.73105857863, 0.26894142137, 0.0]]))


# --- Precision.


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu", "leaky_relu"])
def test_scores_are_within_the_budget(name: str, offset: float, size: float) -> None:
    torch.manual_seed(0)
    a, b, v = torch.randn(7, 16) * size + offset, torch.randn(17, 16) * size - offset, torch.randn(1, 16)
    scores = AdditivePair(v, name)(a, b)
    x = a.double()[:, None] + b.double()
    functions = {
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "relu": torch.relu,
        "leaky_relu": lambda x: torch.where(x > 0, x, 0.2 * x),
    }
    exact = (functions[name](x) * v.double()).sum(-1)
    largest = 1.0 if name in ("tanh", "sigmoid") else float(x.abs().max())  # unbounded activations scale the budget
    assert (
        float((scores - exact).abs().max()) <= 4 * torch.finfo(torch.float32).eps * (1 + float(v.abs().sum())) * largest
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "low"), [(torch.float32, -2e6), (torch.float16, -6e4), (torch.bfloat16, -6e4)])
def test_valid_scores_however_low_win_over_padding(impl: str, dtype: torch.dtype, low: float) -> None:
    query = torch.tensor([[[1.0, 0.0]]], dtype=dtype)
    key = torch.tensor([[[low, 0.0], [low, 0.0], [9.0, 0.0]]], dtype=dtype)
    value = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [100.0, 0.0]]], dtype=dtype)
    score = score_for(impl) if impl == "cpu" else regard.Dot()
    out = regard.attend(query, key, value, score, regard.Lengths(torch.tensor([2])), impl=impl)
    assert out.dtype == dtype
    assert out.tolist() == [[[2.0, 0.0]]]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(impl: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.chunked, "BLOCK_BYTES", 100)  # as many blocks as rows
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, length, 8, dtype=dtype, requires_grad=True) for length in (50, 19, 19))
    mask = regard.Lengths(torch.tensor([19, 7]))
    score = score_for(impl)
    if impl == "cpu" and dtype == torch.float64:
        with pytest.raises(ValueError, match="computes in float32"):
            regard.attend(query, key, value, score, impl=impl)
        return
    out = regard.attend(query, key, value, score, mask, impl=impl)
    exact = regard.attend(query.double(), key.double(), value.double(), score, mask, impl="reference")
    assert out.dtype == dtype
    results = [(y, *torch.autograd.grad(y.square().sum(), (query, key, value))) for y in (out, exact)]
    for found, true in zip(*results, strict=True):
        roundings = (
            16 if dtype == torch.float64 else 2
        )  # half precision rounds the inputs' products once, and the result
        budget = roundings * torch.finfo(dtype).eps * true.detach().abs().max()
        assert (found - true).detach().abs().max() <= budget


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_summed_in_float32(impl: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.chunked, "BLOCK_BYTES", 1)
    query, key = torch.zeros(1, 3000, 8, dtype=dtype), torch.zeros(1, 1, 8, dtype=dtype)
    value = torch.ones(1, 1, 8, dtype=dtype, requires_grad=True)
    regard.attend(query, key, value, score_for(impl), impl=impl).sum(1).backward(torch.ones(1, 8, dtype=dtype))
    assert value.grad is not None
    assert value.grad.eq(torch.tensor(3000, dtype=dtype)).all()  # 256 or 2048 when summed in its own precision


# --- Rows, keys, values that nothing attends; writing to the caller's.


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_row_that_may_attend_nothing_is_zero(impl: str) -> None:
    x = torch.randn(2, 4, 8, requires_grad=True)
    seen = regard.attention(x, x, x, score_for(impl), regard.Lengths(torch.tensor([0, 3])), impl=impl)
    assert seen.out[0].eq(0).all()
    assert seen.weights()[0].eq(0).all()
    assert seen.lse is not None
    assert seen.lse[0].eq(-torch.inf).all()
    assert seen.entropy()[0].eq(0).all()
    (seen.out.sum() + seen.lse[1].sum() + seen.entropy().sum()).backward()
    assert x.grad is not None
    assert x.grad[0].eq(0).all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_row_of_minus_infinity_is_empty(impl: str) -> None:
    bias = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf]], requires_grad=True)
    x = torch.randn(2, 8, requires_grad=True)
    out = regard.attend(x, x, x, bias=bias, impl=impl)
    assert out[1].eq(0).all()
    out.sum().backward()
    assert bias.grad is not None
    assert bias.grad.isfinite().all()
    torch.testing.assert_close(out[0], x[0])


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("name", ["keep", "intervals", "both", "rows"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_nothing_attends_does_not_exist(impl: str, name: str, garbage: float) -> None:
    lens = torch.tensor([2, 4])
    valid = torch.arange(6) < lens[:, None]
    mask = {
        "keep": regard.Keep(valid[:, None]),
        "intervals": regard.Lengths(lens),
        "both": regard.Keep(valid[:, None]) & regard.Causal(align="upper_left"),
        "rows": regard.Keep(valid[:, None] & valid[:, :, None]),
    }[name]
    key, value = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    query = torch.randn(2, 6, 8)
    key[~valid], value[~valid] = garbage, garbage
    if name == "rows":
        query[~valid] = garbage
    score = score_for(impl) if impl == "sdpa" else regard.Additive(8, 8, 4)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    if impl in regard.explain(*leaves, score=score, mask=mask).refused:
        with pytest.raises(ValueError, match="refuses"):
            regard.attend(*leaves, score=score, mask=mask, impl=impl)
        return
    out = regard.attend(*leaves, score=score, mask=mask, impl=impl)
    out.sum().backward()
    for x in (out, *(leaf.grad for leaf in leaves), *(p.grad for p in score.parameters())):
        assert x is not None
        assert x.isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_of_the_callers_is_written_to(impl: str) -> None:
    case = Case("laplace" if impl == "cpu" else "scaled_dot", "lengths")
    given = inputs(case)
    lens = torch.tensor([9, 0])
    before = [x.detach().clone() for x in (given.query, given.key, given.value, lens)]
    regard.attend(given.query, given.key, given.value, given.score, regard.Lengths(lens), impl=impl).sum().backward()
    for x, was in zip((given.query, given.key, given.value, lens), before, strict=True):
        assert x.detach().equal(was) or x.isnan().equal(was.isnan())
        assert torch.equal(x.detach().nan_to_num(), was.nan_to_num())


def test_a_shared_key_is_blanked_only_where_no_sample_attends_it() -> None:
    query, lens = torch.randn(2, 1, 4), torch.tensor([1, 3])
    key = torch.randn(1, 5, 4)
    out = regard.attend(query, key, key, mask=regard.Lengths(lens))
    whole = regard.attend(
        query, key.expand(2, 5, 4).contiguous(), key.expand(2, 5, 4).contiguous(), mask=regard.Lengths(lens)
    )
    torch.testing.assert_close(out, whole)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("leading", [(), (1,), (1, 1)])
def test_shared_padding_does_not_exist_for_a_batch_that_skips_it(impl: str, leading: tuple[int, ...]) -> None:
    query, key, value = torch.randn(2, 3, 4), torch.randn(*leading, 5, 4), torch.randn(*leading, 5, 4)
    key[..., 4, :], value[..., 4, :] = torch.nan, torch.nan
    if len(leading) == 2:
        query = query[:, None]
    lens = torch.tensor([2, 4])
    score = score_for(impl)
    out = regard.attend(query, key, value, score, regard.Lengths(lens), impl=impl)
    for n in range(2):
        alone = regard.attend(query[n], key[..., : lens[n], :], value[..., : lens[n], :], score, impl="reference")
        torch.testing.assert_close(out[n].reshape(3, 4), alone.reshape(3, 4))


def test_a_shared_query_that_nothing_asks_is_blanked() -> None:
    query, key = torch.randn(3, 4), torch.randn(2, 5, 4)
    query[0] = torch.nan
    keep = torch.ones(2, 3, 5, dtype=torch.bool)
    keep[:, 0] = False
    score = regard.Additive(4, 4, 6)
    regard.attend(query, key, key, score, keep).sum().backward()
    for parameter in score.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (3, 0), (0, 0)])
def test_without_rows_or_keys_nothing_exists(queries: int, keys: int) -> None:
    query, key = torch.full((2, queries, 4), torch.nan), torch.full((2, keys, 4), torch.nan)
    score = regard.Additive(4, 4, 8)
    out = regard.attend(query, key, key, score)
    out.sum().backward()
    assert out.eq(0).all()
    for parameter in score.parameters():
        assert parameter.grad is not None
        assert parameter.grad.eq(0).all()


@pytest.mark.parametrize("mask", [regard.Lengths, lambda n: regard.Causal(offset=n)], ids=["lengths", "offset"])
def test_an_empty_batch_with_a_tensor_in_its_mask(mask: Callable[[Tensor], regard.Mask]) -> None:
    x = torch.zeros(0, 3, 4)
    assert regard.attend(x, x, x, mask=mask(torch.zeros(0, dtype=torch.int64))).shape == (0, 3, 4)


def test_lengths_of_small_integer_types() -> None:
    x, lens = torch.randn(2, 256, 4), torch.tensor([0, 20])
    expected = regard.attend(x, x, x, mask=regard.Lengths(lens))
    torch.testing.assert_close(regard.attend(x, x, x, mask=regard.Lengths(lens.to(torch.uint8))), expected)
    ids = torch.tensor([1, 0, 1], dtype=torch.uint8)
    assert regard.weights(x[:, :3], x[:, :3], mask=regard.Documents(ids))[0].ne(0).tolist() == [
        [True, False, True],
        [False, True, False],
        [True, False, True],
    ]


@pytest.mark.parametrize("impl", ["reference", "chunked", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cosine_of_padding_and_of_zero_vectors(impl: str, dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 5, 4, dtype=dtype)
    query[0, 0] = 0
    query.requires_grad_()
    out = regard.attend(query, key, key, regard.Cosine(), regard.Lengths(torch.tensor([2, 4])), impl=impl)
    out.sum().backward()
    assert query.grad is not None
    assert out.isfinite().all()
    assert query.grad[1].isfinite().all()


def test_half_precision_distances_far_from_the_origin() -> None:
    query, key = 100 + torch.rand(4, 3), 100 + torch.rand(6, 3)
    query, key = query.half(), key.half()
    exact = regard.weights(query.double(), key.double(), regard.Gaussian(0.3).double())
    torch.testing.assert_close(regard.weights(query, key, regard.Gaussian(0.3)).double(), exact, atol=1e-5, rtol=1e-4)


class Tempered(regard.Normalizer):
    """A user's own, with something to learn."""

    def __init__(self) -> None:
        self.temperature = torch.tensor(2.0, requires_grad=True)

    def __call__(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores / self.temperature, -1)


class Halved(regard.Softmax):
    def __call__(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores / 2, -1)


class Own(regard.Score):
    """A user's own, with a pair of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def project_query(self, query: Tensor) -> Tensor:
        return query

    def project_key(self, key: Tensor) -> Tensor:
        return key

    def pair(self) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda a, b: torch.sin(self.scale * (a @ b.mT))


def test_a_users_own_parts_get_their_gradients_by_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.chunked, "BLOCK_BYTES", 100)
    x, normalizer, score = torch.randn(2, 9, 4), Tempered(), Own()
    found = []
    for impl in ("reference", "chunked"):
        out = regard.attend(x, x, x, score, normalizer=normalizer, impl=impl)
        found.append(torch.autograd.grad(out.square().sum(), (normalizer.temperature, score.scale)))
    torch.testing.assert_close(*found)
    assert all(gradient != 0 for gradient in found[0])


def test_a_kind_of_softmax_is_not_taken_for_softmax() -> None:
    x = torch.randn(1, 5, 4)
    seen = regard.attention(x, x, x, normalizer=Halved())
    torch.testing.assert_close(seen.out, torch.softmax(x @ x.mT / 4, -1) @ x)
    assert seen.lse is None


def test_a_mask_written_to_before_backward_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    x, keep = torch.randn(3, 4, requires_grad=True), torch.ones(3, 3, dtype=torch.bool)
    for impl in ("reference", "chunked"):
        out = regard.attend(x, x, x, mask=keep, impl=impl)
        keep[0, 0] = False
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


# --- Shapes.


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
def test_leading_dimensions(impl: str, leading: tuple[int, ...]) -> None:
    query, key, value = (torch.randn(*leading, length, 4) for length in (2, 5, 5))
    out = regard.attend(query, key, value, score_for(impl), impl=impl)
    query, key, value = (x.reshape(-1, *x.shape[-2:]) for x in (query, key, value))
    flat = regard.attend(query, key, value, score_for(impl), impl="reference")
    torch.testing.assert_close(out, flat.reshape(*leading, 2, 4))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_leading_dimensions_broadcast(impl: str) -> None:
    query, key, value = torch.randn(2, 1, 3, 4), torch.randn(5, 6, 4), torch.randn(1, 5, 6, 4)
    score = score_for(impl)
    out = regard.attend(query, key, value, score, impl=impl)
    assert out.shape == (2, 5, 3, 4)
    torch.testing.assert_close(out[1, 2], regard.attend(query[1, 0], key[2], value[0, 2], score, impl="reference"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_grouped_heads(impl: str) -> None:
    query, key, value = torch.randn(2, 6, 3, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    key[1, :, 3:], value[1, :, 3:] = torch.nan, torch.nan
    mask = regard.Lengths(torch.tensor([5, 3]))
    score = score_for(impl)
    out = regard.attend(query, key, value, score, mask, enable_gqa=True, impl=impl)
    for head in range(6):
        one = regard.attend(query[:, head], key[:, head // 3], value[:, head // 3], score, mask, impl="reference")
        torch.testing.assert_close(out[:, head], one)
    with pytest.raises(ValueError, match="enable_gqa=True"):
        regard.attend(query, key, value, score, impl=impl)


@pytest.mark.parametrize("impl", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("leading", [(), (2,), (2, 2)])
def test_heads_of_an_additive_score(impl: str, leading: tuple[int, ...]) -> None:
    score = regard.Additive(QUERY_DIM, KEY_DIM, 8, heads=3, weight_norm=True)
    query, key = torch.randn(*leading, 4, QUERY_DIM), torch.randn(*leading, 7, KEY_DIM)
    value = torch.randn(*leading, 7, 3)
    mask = regard.Lengths(torch.tensor([7, 2])) if leading else None
    seen = regard.attention(query, key, value, score, mask, impl=impl)
    out = seen.out
    assert out.shape == (*leading, 3, 4, 3)
    torch.testing.assert_close(seen.weights() @ value.unsqueeze(-3), out)
    one = regard.Additive(QUERY_DIM, KEY_DIM, 8)
    assert score.g is not None
    for head in range(3):
        rows = slice(8 * head, 8 * head + 8)
        v = score.w_v.weight[head]
        one.load_state_dict(
            {
                "W_q.weight": score.W_q.weight[rows],
                "W_k.weight": score.W_k.weight[rows],
                "w_v.weight": (score.g[head] * v / v.norm())[None],
            }
        )
        alone = regard.attend(query, key, value, one, mask, impl="reference")
        torch.testing.assert_close(out[..., head, :, :], alone)


# --- Bias.


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6), (1, 6), (6,)])
def test_bias_is_added_to_the_scores(impl: str, shape: tuple[int, ...]) -> None:
    query, key, value = torch.randn(2, 4, 3), torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    bias = torch.randn(shape, requires_grad=True)
    mask = regard.Lengths(torch.tensor([6, 2]))
    out = regard.attend(query, key, value, mask=mask, bias=bias, impl=impl)
    shifted = regard.FunctionScore(lambda query, key: query @ key.mT * 3**-0.5 + bias)
    again = regard.attend(query, key, value, shifted, mask, impl="reference")
    torch.testing.assert_close(out, again)
    gradients = [torch.autograd.grad(x.square().sum(), bias)[0] for x in (out, again)]
    torch.testing.assert_close(*gradients)


def test_function_score_reaches_what_it_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.chunked, "BLOCK_BYTES", 256)
    table = torch.randn(4, 4, requires_grad=True)
    query, key, value = torch.randn(9, 4), torch.randn(6, 4), torch.randn(6, 4)
    captures = regard.FunctionScore(lambda query, key: query @ table @ key.mT)
    gradients = [
        torch.autograd.grad(regard.attend(query, key, value, captures, impl=impl).square().sum(), table)[0]
        for impl in ("reference", "chunked")
    ]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


def test_intervals_of_a_case_are_what_kernels_see() -> None:
    intervals, keep = (regard.Lengths(torch.tensor([2, 3])) & regard.Causal()).lower(Grid((2,), 4, 4))
    assert keep is None
    assert intervals is not None
    assert all(isinstance(interval, Interval) for interval in intervals)
    assert len(intervals) == 1
