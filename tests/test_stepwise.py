"""What every attention with a state keeps: the state goes in with a query, another comes out, and nothing else.

A new variant is one line in VARIANTS.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import SCORES
from torch import Tensor, nn

import regard
from regard.decoding.coverage import Coverage
from regard.decoding.forward import Forward
from regard.decoding.local import LocalMonotonic, LocalPredictive
from regard.decoding.location import LocationSensitive
from regard.decoding.monotonic import Monotonic, MonotonicChunkwise
from regard.decoding.step import Step, Stepwise

BATCH, QUERIES, KEYS, DIM, VALUE = 3, 4, 9, 5, 5
LENS = torch.tensor([KEYS, 0, 5])

# Each made for the size of the memory's projected keys.
VARIANTS: dict[str, Callable[[int], Stepwise[Any]]] = {
    "location": lambda size: LocationSensitive(size, filters=3, kernel_size=5),
    "cumulative": lambda size: LocationSensitive(size, filters=3, kernel_size=5, cumulative=True),
    "coverage": lambda size: Coverage(size),
    "forward": lambda size: Forward(),
    "agent": lambda size: Forward(nn.Linear(VALUE + DIM, 1)),
    "local-m": lambda size: LocalMonotonic(window=2),
    "local-p": lambda size: LocalPredictive(DIM, hidden_dim=4, window=2),
    "monotonic": lambda size: Monotonic(),
    "chunkwise": lambda size: MonotonicChunkwise(chunk_size=3),
}
SPANNING_HIDDEN = {"location", "cumulative", "chunkwise"}  # to these a hidden key is a place between those beside it
ENDING = {"monotonic", "chunkwise"}  # what goes past the last key remains there, even where more are appended

VISIBLE = {
    "right": torch.arange(KEYS) < LENS[:, None],
    "left": torch.arange(KEYS) >= KEYS - LENS[:, None],
    "gaps": (torch.arange(KEYS) % 3 > 0) & (LENS[:, None] > 0),
}


def made(name: str, score: regard.Score | None = None) -> Stepwise[Any]:
    """A variant whose history matters, for a score."""
    attention = VARIANTS[name]((score or additive()).project_key(torch.zeros(1, DIM)).shape[-1])
    for p in attention.parameters():
        nn.init.normal_(p)
    return attention


def additive(heads: int = 1) -> regard.Additive:
    return regard.Additive(DIM, DIM, 8, heads=heads, bias=True)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def memory_of(
    key: Tensor,
    value: Tensor,
    score: regard.Score,
    visible: Tensor | None = None,
    normalizer: regard.Normalizer = regard.Softmax(),
) -> regard.Memory:
    if visible is not None:
        visible = visible.unsqueeze(-2) if score.heads == 1 else visible[:, None, None]
    return regard.Memory(score, key, value, visible, normalizer=normalizer)


def stepped(attention: Stepwise[Any], query: Tensor, memory: regard.Memory, state: Any = None) -> Step:
    """A row of queries, one by one."""
    state = attention.start(memory) if state is None else state
    steps = []
    for each in query.unbind(-2):
        steps.append(attention.step(each, memory, state))
        state = steps[-1].state
    return Step(torch.stack([s.context for s in steps], -2), torch.stack([s.weights for s in steps], -2), state)


def assert_close(found: Any, true: Any, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    torch.testing.assert_close(found, true, rtol=rtol, atol=atol)


def assert_same_step(found: Step, true: Step) -> None:
    assert type(found.state) is type(true.state)
    assert_close((found.context, found.weights, *found.state), (true.context, true.weights, *true.state))


def gradients(step: Step, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of some function of contexts and weights."""
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=step.weights.dtype)
    for x in (step.context, step.weights):
        loss = loss + (x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum()
    return torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


each_variant = pytest.mark.parametrize("name", VARIANTS)
each_padding = pytest.mark.parametrize("visible", VISIBLE.values(), ids=VISIBLE)


def test_every_variant_is_here() -> None:
    def below(kind: type) -> set[type]:
        return {kind} | {each for child in kind.__subclasses__() for each in below(child)}

    variants = {each for each in below(Stepwise) if not getattr(each, "__abstractmethods__", None)}
    assert {type(make(4)) for make in VARIANTS.values()} == {each for each in variants if "regard." in each.__module__}


# --- Steps, rows and states.


@pytest.mark.parametrize("normalizer", [regard.Softmax(), regard.Sparsemax(), regard.Sigmoid()], ids=str)
@each_variant
def test_a_row_is_its_steps(name: str, normalizer: regard.Normalizer) -> None:
    score, query, key, value = additive(), draw(BATCH, QUERIES, DIM), draw(BATCH, KEYS, DIM), draw(BATCH, KEYS, VALUE)
    attention, memory = made(name), memory_of(key, value, score, VISIBLE["right"], normalizer)
    row, steps = attention(query, memory), stepped(attention, query, memory)
    assert row.context.shape == (BATCH, QUERIES, VALUE)
    assert row.weights.shape == (BATCH, QUERIES, KEYS)
    assert_same_step(row, steps)
    first = attention(query[:, :1], memory)
    rest = attention(query[:, 1:], memory, first.state)
    halves = Step(torch.cat([first.context, rest.context], 1), torch.cat([first.weights, rest.weights], 1), rest.state)
    assert_same_step(halves, steps)
    leaves = [query, key, value, *score.parameters(), *attention.parameters()]
    assert_close(gradients(row, leaves), gradients(steps, leaves))
    assert_close(gradients(halves, leaves), gradients(steps, leaves))


@each_variant
def test_gradients_flow_through_the_state_until_it_is_detached(name: str) -> None:
    key, earlier, query = torch.randn(BATCH, KEYS, DIM), draw(BATCH, 2, DIM), draw(BATCH, DIM)
    attention, memory = made(name), memory_of(key, key, additive())
    state = attention(earlier, memory).state
    differentiable = [x for x in state if x.is_floating_point()]
    assert all(x.requires_grad for x in differentiable) or name == "forward"  # whose transition is a constant
    whole = attention.step(query, memory, state)
    (history,) = gradients(whole, [earlier])
    assert history.abs().sum(-1).gt(0).all() == bool(differentiable)
    cut = attention.step(query, memory, attention.detach(state))
    assert_same_step(cut, whole)
    assert gradients(cut, [earlier])[0].eq(0).all()
    assert gradients(cut, [query])[0].ne(0).any()


@each_variant
def test_nothing_is_written_to(name: str) -> None:
    key, query = torch.randn(BATCH, KEYS, DIM), torch.randn(BATCH, QUERIES, DIM)
    attention, memory = made(name), memory_of(key, key, additive(), VISIBLE["right"])
    with torch.no_grad():
        state = attention.start(memory)
        for each in query.unbind(1):
            before = [each, key, *memory._rows, *state, *attention.state_dict().values()]
            copies, versions = [x.clone() for x in before], [x._version for x in before]
            buffers = {name: id(x) for name, x in vars(attention).items()}
            state = attention.step(each, memory, state).state
            assert [x._version for x in before] == versions
            assert all(x.equal(copy) for x, copy in zip(before, copies, strict=True))
            assert {name: id(x) for name, x in vars(attention).items()} == buffers


@each_variant
def test_beams_are_those_computed_again(name: str) -> None:
    score, query, key, value = additive(), draw(BATCH, QUERIES, DIM), draw(BATCH, KEYS, DIM), draw(BATCH, KEYS, VALUE)
    attention, memory = made(name), memory_of(key, value, score, VISIBLE["right"])
    index = torch.tensor([2, 0, 0, 1])
    state = attention.select(attention(query[:, :2], memory).state, index)
    found = attention(query[index, 2:], memory.select(index), state)
    again = memory_of(key[index], value[index], score, VISIBLE["right"][index])
    true = attention(query[index, 2:], again, attention(query[index, :2], again).state)
    assert_same_step(found, true)
    leaves = [query, key, value]
    assert_close(gradients(found, leaves), gradients(true, leaves))


@each_variant
def test_queries_share_a_memory(name: str) -> None:
    score, query, key, value = additive(), draw(4, QUERIES, DIM), draw(1, KEYS, DIM), draw(1, KEYS, VALUE)
    attention, index = made(name), torch.tensor([3, 1])
    shared, each = memory_of(key, value, score), memory_of(key.expand(4, -1, -1), value.expand(4, -1, -1), score)
    found, true = attention(query[:, :2], shared), attention(query[:, :2], each)
    assert_same_step(found, true)
    found = attention(query[index, 2:], shared, attention.select(found.state, index))
    true = attention(query[index, 2:], each.select(index), attention.select(true.state, index))
    assert_same_step(found, true)
    assert_close(gradients(found, [query, key, value]), gradients(true, [query, key, value]))


@each_variant
def test_keys_come_between_steps(name: str) -> None:
    score, query, key, value = additive(), draw(2, QUERIES, DIM), draw(2, KEYS, DIM), draw(2, KEYS, VALUE)
    attention, there = made(name), torch.arange(KEYS) < torch.tensor([[6], [0]])
    memory = memory_of(key[:, :6], value[:, :6], score, there[:, :6])
    state = attention(query[:, :2], memory).state
    found = attention(query[:, 2:], memory.append(key[:, 6:], value[:, 6:]), state)
    before = attention(query[:, :2], memory_of(key, value, score, there)).state  # the same keys, hidden until then
    later = there | (torch.arange(KEYS) >= 6)
    true = attention(query[:, 2:], memory_of(key, value, score, later), before)
    assert_same_step(found, true)
    begun = found.weights[1, :, 6:].gt(0).any(-1)  # a sample that had none begins with them
    assert begun.eq(name not in ENDING).all()
    leaves = [query, key, value]
    assert_close(gradients(found, leaves), gradients(true, leaves))


# --- What is hidden does not exist.


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("normalizer", [regard.Softmax(), regard.Sparsemax(), regard.Sigmoid()], ids=str)
@each_padding
@each_variant
def test_padding_gets_nothing(
    name: str, visible: Tensor, normalizer: regard.Normalizer, heads: int, garbage: float
) -> None:
    score, attention = additive(heads), made(name)
    query, key, value = torch.randn(BATCH, QUERIES, DIM), torch.randn(BATCH, KEYS, DIM), torch.randn(BATCH, KEYS, VALUE)
    query[1], key[~visible], value[~visible] = garbage, garbage, garbage  # the second sample has no keys at all
    query, key, value = (x.requires_grad_() for x in (query, key, value))
    memory = memory_of(key, value, score, visible, normalizer)
    for step in (attention(query, memory), stepped(attention, query, memory)):
        hidden = ~visible[:, None, None, :] if heads > 1 else ~visible[:, None]
        assert step.weights[hidden.expand_as(step.weights)].eq(0).all()
        assert step.context[1].eq(0).all()
        assert step.weights[0].gt(0).any(-1).all()
        leaves = [query, key, value, *score.parameters(), *attention.parameters()]
        found = gradients(step, leaves)
        assert all(x.isfinite().all() for x in (step.context, step.weights, *found))
        assert found[0][1].eq(0).all()
        assert found[1][~visible].eq(0).all()
        assert found[2][~visible].eq(0).all()


@each_padding
@each_variant
def test_a_ragged_batch_is_each_sample_alone(name: str, visible: Tensor) -> None:
    if name in SPANNING_HIDDEN and visible is VISIBLE["gaps"]:
        pytest.skip("hidden keys are places to it")
    score, query, key, value = additive(), draw(BATCH, QUERIES, DIM), draw(BATCH, KEYS, DIM), draw(BATCH, KEYS, VALUE)
    attention = made(name)
    batch = attention(query, memory_of(key, value, score, visible))
    leaves, of_batch = [query, key, value], gradients(batch, [query])[0]
    assert of_batch.isfinite().all()
    for n, seen in enumerate(visible):
        alone = attention(query[n], memory_of(key[n, seen], value[n, seen], score))
        assert_close(batch.context[n], alone.context)
        assert_close(batch.weights[n][:, seen], alone.weights)
        direction = torch.randn_like(alone.context)
        found = torch.autograd.grad(batch.context[n], leaves, direction, retain_graph=True)
        assert_close(found, torch.autograd.grad(alone.context, leaves, direction))


@each_variant
def test_a_memory_may_begin_without_keys(name: str) -> None:
    attention, query, key = made(name), torch.randn(BATCH, QUERIES, DIM), torch.randn(BATCH, KEYS, DIM)
    none = memory_of(key[:, :0], key[:, :0], additive())
    step = attention(query, none)
    assert step.weights.shape == (BATCH, QUERIES, 0)
    assert step.context.equal(torch.zeros(BATCH, QUERIES, DIM))
    then = attention.step(query[:, 0], none.append(key, key), step.state)
    assert then.weights.gt(0).any(-1).eq(name not in ENDING).all()


# --- Any score, and any shape.


@pytest.mark.parametrize("kind", SCORES)
@each_variant
def test_any_score(name: str, kind: str) -> None:
    score = SCORES[kind][1]()
    attention = made(name, score)
    query, key, value = draw(BATCH, QUERIES, DIM), draw(BATCH, KEYS, DIM), draw(BATCH, KEYS, VALUE)
    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    found = attention(query, memory_of(key, value, score, VISIBLE["right"]))
    twins = copy.deepcopy(score).double(), copy.deepcopy(attention).double()
    true = twins[1](exact[0], memory_of(exact[1], exact[2], twins[0], VISIBLE["right"]))
    assert true.weights.dtype == torch.float64
    assert_close((found.context.double(), found.weights.double()), (true.context, true.weights), 1e-4, 1e-5)
    parameters = [*score.parameters(), *attention.parameters()]
    others = [p for twin in twins for p in twin.parameters()]
    for x, y in zip(gradients(found, [query, key, value, *parameters]), gradients(true, exact + others), strict=True):
        assert_close(x.double(), y, 1e-3, 1e-4)
    start = twins[1].start(memory_of(exact[1], exact[2], twins[0]))
    assert all(x.dtype in (torch.float64, torch.int64) for x in (*start, *true.state))


@each_variant
def test_heads_are_scores_side_by_side(name: str) -> None:
    score, query, key, value = additive(heads=2), draw(2, QUERIES, DIM), draw(2, KEYS, DIM), draw(2, KEYS, VALUE)
    attention, visible = made(name), VISIBLE["right"][::2]
    both = attention(query, memory_of(key, value, score, visible))
    assert both.context.shape == (2, 2, QUERIES, VALUE)
    assert_same_step(both, stepped(attention, query, memory_of(key, value, score, visible)))
    for head in range(2):
        one = additive()
        rows = slice(8 * head, 8 * head + 8)
        one.W_q.weight.data, one.W_k.weight.data = score.W_q.weight.data[rows], score.W_k.weight.data[rows]
        one.W_q.bias.data, one.w_v.weight.data = score.W_q.bias.data[rows], score.w_v.weight.data[[head]]
        alone = attention(query, memory_of(key, value, one, visible))
        assert_close((both.context[:, head], both.weights[:, head]), (alone.context, alone.weights))


@each_variant
def test_leading_dimensions(name: str) -> None:
    score, query, key, value = additive(), draw(6, QUERIES, DIM), draw(6, KEYS, DIM), draw(6, KEYS, VALUE)
    attention, visible = made(name), VISIBLE["left"].repeat(2, 1)
    flat = attention(query, memory_of(key, value, score, visible))
    pairs = [x.unflatten(0, (2, 3)) for x in (key, value, visible)]
    two = memory_of(pairs[0], pairs[1], score, pairs[2])
    for found in (attention(query.unflatten(0, (2, 3)), two), stepped(attention, query.unflatten(0, (2, 3)), two)):
        assert_close((found.context.flatten(0, 1), found.weights.flatten(0, 1)), (flat.context, flat.weights))
        assert_close([x.flatten(0, 1) for x in found.state], [*flat.state])
    none = memory_of(key[2], value[2], score, visible[2])
    for found in (attention(query[2], none), stepped(attention, query[2], none)):
        assert_close((found.context, found.weights), (flat.context[2], flat.weights[2]))
        assert_close([*found.state], [x[2] for x in flat.state])


# --- Types, derivatives and copies.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_variant
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    score, attention = additive().to(dtype), made(name).to(dtype)
    query, key, value = (torch.randn(BATCH, n, DIM, dtype=dtype).requires_grad_() for n in (QUERIES, KEYS, KEYS))
    half = attention(query, memory_of(key, value, score, VISIBLE["right"]))
    assert half.context.dtype == dtype
    assert half.weights.dtype == torch.float32
    start = attention.start(memory_of(key, value, score))
    assert all(x.dtype in (torch.float32, torch.int64) for x in (*start, *half.state))
    assert half.weights[~VISIBLE["right"][:, None].expand_as(half.weights)].eq(0).all()
    wide = [x.detach().float().requires_grad_() for x in (query, key, value)]
    twins = copy.deepcopy(attention).float(), copy.deepcopy(score).float()
    whole = twins[0](wide[0], memory_of(wide[1], wide[2], twins[1], VISIBLE["right"]))
    rough = 2e-3 if dtype == torch.float16 else 2e-2
    for x, y in zip((half.context, half.weights), (whole.context, whole.weights), strict=True):
        assert (x.float() - y).square().mean().sqrt() <= rough
    assert all(x.isfinite().all() for x in gradients(half, [query, key, value]))


@each_variant
def test_autocast(name: str) -> None:
    score, query, key = additive(), draw(BATCH, QUERIES, DIM), draw(BATCH, KEYS, DIM)
    attention = made(name)
    true = attention(query, memory_of(key, key, score, VISIBLE["right"]))
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(query, memory_of(key, key, score, VISIBLE["right"]))
    assert (found.context.dtype, found.weights.dtype) == (torch.bfloat16, torch.float32)
    assert (found.weights - true.weights).square().mean().sqrt() <= 2e-2
    assert all(x.isfinite().all() for x in gradients(found, [query, key]))


@each_variant
def test_derivatives(name: str) -> None:
    score, attention = regard.Additive(DIM, DIM, 3).double(), made(name, regard.Additive(DIM, DIM, 3)).double()
    query, key, value = (torch.randn(2, n, DIM).double().requires_grad_() for n in (3, 4, 4))
    visible = torch.tensor([[True, True, True, False], [False] * 4])

    def run(query: Tensor, key: Tensor, value: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        step = attention(query, memory_of(key, value, score, visible))
        return step.context, step.weights

    leaves = (query, key, value, *score.parameters(), *attention.parameters())
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@each_variant
def test_copies_and_pickles(name: str) -> None:
    query, key = torch.randn(BATCH, DIM), torch.randn(BATCH, KEYS, DIM)
    attention = made(name)
    memory = memory_of(key, key, additive(), VISIBLE["right"])
    with torch.no_grad():
        state = attention.step(query, memory, attention.start(memory)).state
        true = attention.step(query, memory, state)
        for twins in (
            copy.deepcopy((attention, memory, state)),
            pickle.loads(pickle.dumps((attention, memory, state))),
        ):
            assert_same_step(twins[0].step(query, *twins[1:]), true)


@each_variant
def test_a_compiled_step(name: str) -> None:
    torch._dynamo.reset()
    score, query, key, value = additive(), draw(BATCH, DIM), draw(BATCH, KEYS, DIM), draw(BATCH, KEYS, VALUE)
    attention, visible = made(name), VISIBLE["right"]

    def two(query: Tensor, key: Tensor, value: Tensor) -> Step:
        memory = memory_of(key, value, score, visible)
        return attention.step(query, memory, attention.step(query, memory, attention.start(memory)).state)

    found, true = torch.compile(two, fullgraph=True, backend="aot_eager")(query, key, value), two(query, key, value)
    assert_same_step(found, true)
    leaves = [query, key, value, *attention.parameters()]
    assert_close(gradients(found, leaves), gradients(true, leaves))


# --- Errors.


@each_variant
def test_errors_name_what_was_wrong(name: str) -> None:
    attention, query, key = made(name), torch.randn(BATCH, BATCH, DIM), torch.randn(BATCH, KEYS, DIM)
    memory = memory_of(key, key, additive())
    state = attention.start(memory)
    with pytest.raises(ValueError, match=r"query has shape \(3, 3, 5\); for this memory it must be \(3, Dq\)"):
        attention.step(query, memory, state)
    with pytest.raises(ValueError, match=r"query has shape \(3, 5\); for this memory it must be \(3, Lq, Dq\)"):
        attention(query[0], memory)
    with pytest.raises(ValueError, match=r"query has shape \(2, 5\); for this memory it must be \(3, Dq\)"):
        attention.step(query[0, :2], memory, state)
    with pytest.raises(ValueError, match=r"query has shape \(3.*, 4\), of size 4; W was made for size 5"):
        attention.step(query[0, :, :4], memory, state)
    for call in (attention, lambda query, memory: attention.step(query, memory, state)):
        with pytest.raises(TypeError, match="query is a list; it must be a Tensor"):
            call(query.tolist(), memory)
    if len(state):
        with pytest.raises(
            ValueError, match=r"state has leading dimensions \(3,\); for this memory they must be \(2,\)"
        ):
            attention.step(query[0, :2], memory.select(torch.tensor([0, 1])), state)
    if any(x.shape[-1:] == (KEYS,) for x in state):
        with pytest.raises(ValueError, match="state is of 9 keys; this memory has 8"):
            attention.step(query[0], memory_of(key[:, :8], key[:, :8], additive()), state)


@pytest.mark.parametrize("size", [7, 9])
@pytest.mark.parametrize("name", ["location", "cumulative", "coverage"])
def test_keys_of_another_size_are_refused(name: str, size: int) -> None:
    attention, query, key = VARIANTS[name](size), torch.randn(BATCH, DIM), torch.randn(BATCH, KEYS, DIM)
    memory = memory_of(key, key, additive())
    with pytest.raises(ValueError, match=f"shift moves 9 keys of size {size}; here are 9 of size 8"):
        attention.step(query, memory, attention.start(memory))
