"""Monotonic attention: the recursion by both ways, its mass and its gradients, and what the two modules make of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import regard
from regard.decoding.monotonic import Aligned, InChunks, Monotonic, MonotonicChunkwise, _shared_out
from regard.kernels import cpu, monotonic

needs_library = pytest.mark.skipif(cpu.LIBRARY is None, reason="regard was installed without its C++ library")
WAYS = ["plain", pytest.param("kernel", marks=needs_library)]
DIM = 5


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which way the recursion went, each time."""
    ways: list[str] = []

    def noted(way: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            ways.append(way)
            return function(*given)

        return run

    monkeypatch.setattr(monotonic, "_call", noted("kernel", monotonic._call))
    monkeypatch.setattr(monotonic, "plain", noted("plain", monotonic.plain))
    return ways


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> Any:
    """Both ways, of which no other may run."""
    if request.param == "plain":
        monkeypatch.setattr(cpu, "takes", lambda *_: False)
    yield request.param
    assert set(ran) == {request.param}


def odds(p: list[float]) -> Tensor:
    return torch.tensor([p]).logit()


def at_first(logits: Tensor) -> Tensor:
    """The weights before the first row."""
    return torch.zeros_like(logits[..., 0, :]).index_fill(-1, torch.tensor(0), 1.0)


def by_keys(logits: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, key by key."""
    rows, gone = [], []
    for x in logits.unbind(-2):
        weights, moving = [], torch.zeros_like(previous[..., 0])
        for j in range(x.shape[-1]):
            moving = moving + previous[..., j]
            weights.append(x[..., j].sigmoid() * moving)
            moving = (-x[..., j]).sigmoid() * moving
        previous = torch.stack(weights, -1)
        rows.append(previous)
        gone.append(moving)
    return torch.stack(rows, -2), torch.stack(gone, -1)


# --- The recursion.


@pytest.mark.parametrize(
    ("p", "previous", "weights"),
    [([0.9, 1.0, 0.5], [0.2, 0.3, 0.5], [0.18, 0.32, 0.25]), ([0.3, 0.6, 0.9], [1.0, 0.0, 0.0], [0.3, 0.42, 0.252])],
)
def test_known_numbers(way: str, p: list[float], previous: list[float], weights: list[float]) -> None:
    found, gone = monotonic.run(odds(p), torch.tensor(previous))
    torch.testing.assert_close(found, torch.tensor([weights]))
    torch.testing.assert_close(gone, torch.tensor([1 - sum(weights)]))


def test_it_is_the_probability_of_all_paths(way: str) -> None:
    rows, keys, logits = 3, 4, torch.randn(3, 4)
    p, true = logits.sigmoid().tolist(), torch.zeros(3, 5)  # of which the last is past all keys
    for path in product(range(keys + 1), repeat=rows):
        probability = 1.0
        for row, (start, stop) in enumerate(zip((0, *path), path, strict=False)):
            for j in range(start, stop):
                probability *= 1 - p[row][j]
            probability *= 0 if stop < start else p[row][stop] if stop < keys else 1
        for row, stop in enumerate(path):
            true[row, stop] += probability
    weights, gone = monotonic.run(logits, at_first(logits))
    torch.testing.assert_close(weights, true[:, :-1])
    torch.testing.assert_close(gone.cumsum(-1), true[:, -1])


LONG = {
    "spread": lambda: torch.randn(2, 100, 2000) * 2 - 4,
    "decided": lambda: torch.randn(2, 100, 2000) * 10 - 25,
    "even": lambda: torch.full((2, 100, 2000), -7.77),  # errors of rounding 1 − p add up where they are all one
    "certain": lambda: torch.where(torch.rand(2, 100, 2000) < 0.01, inf, -inf),
}


@pytest.mark.parametrize("name", LONG)
def test_no_mass_is_lost_at_2000_keys(way: str, name: str) -> None:
    logits = LONG[name]()
    weights, gone = monotonic.run(logits, at_first(logits))
    mass = weights.double().sum(-1) + gone.double().cumsum(-1)
    assert float((mass - 1).abs().max()) < 1e-6
    assert weights.ge(0).all()


def test_the_closed_form_loses_it() -> None:
    """By cumulative products and a division, as elsewhere, which must be kept from dividing by 0."""
    logits = torch.zeros(1, 100)
    previous = torch.zeros(100).index_fill(-1, torch.tensor(90), 1.0)
    p = logits.sigmoid()
    passed = torch.cumprod(torch.cat([torch.ones(1, 1), 1 - p[:, :-1]], -1), -1)
    closed = p * passed * torch.cumsum(previous / passed.clamp(1e-10, 1.0), -1)
    weights, gone = monotonic.run(logits, previous)
    assert float(closed.sum()) < 1e-16
    torch.testing.assert_close(weights.sum(-1) + gone, torch.ones(1))


def test_a_product_of_rounded_factors_loses_some() -> None:
    """What keeps the logarithms in `plain`, and the smaller of two probabilities in the kernel."""
    go = torch.full((2000,), 7.77).sigmoid()
    true = float(go.double().mean() * 0 + torch.full((), 7.77, dtype=torch.float64).sigmoid() ** 2000)
    assert abs(float(go.prod()) / true - 1) > 1e-5


@pytest.mark.parametrize("name", ["spread", "even"])
def test_gradients_at_2000_keys(way: str, name: str) -> None:
    logits = LONG[name]()[:, :3].requires_grad_()
    previous = torch.rand(2, 2000).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (logits, previous)]
    found, true = monotonic.run(logits, previous), by_keys(*exact)
    cotangents = [torch.randn_like(x) for x in found]
    ours = torch.autograd.grad(found, (logits, previous), cotangents)
    theirs = torch.autograd.grad(true, exact, [x.double() for x in cotangents])
    for x, y in zip(ours, theirs, strict=True):
        assert float((x - y).abs().max()) < 1e-5 * float(y.abs().max())


SHAPES = [(1, 1, 1), (3, 2, 0), (0, 2, 3), (1, 1, 2), (4, 1, 7), (5, 3, 8), (9, 4, 33), (2, 5, 64)]


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_the_plain_form(shape: tuple[int, int, int], ran: list[str]) -> None:
    logits, previous = torch.randn(shape) * 3, torch.rand(shape[0], shape[2])
    logits[torch.rand(shape) < 0.2] = -inf
    logits[torch.rand(shape) < 0.1] = inf
    leaves = logits.requires_grad_(), previous.requires_grad_()
    ours, theirs = monotonic.run(*leaves), monotonic.plain(*leaves)
    assert ran == ["kernel", "plain"]
    cotangents = [torch.randn_like(x) for x in ours]
    found, true = (torch.autograd.grad(x, leaves, cotangents) for x in (ours, theirs))
    for x, y in zip((*ours, *found), (*theirs, *true), strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_the_plain_form_is_the_definition() -> None:
    for keys in range(1, 20):
        logits, previous = torch.randn(2, 3, keys, dtype=torch.float64), torch.rand(2, keys, dtype=torch.float64)
        for x, y in zip(monotonic.run(logits, previous), by_keys(logits, previous), strict=True):
            torch.testing.assert_close(x, y)


def test_strides_and_leading_dimensions(way: str) -> None:
    logits, previous = torch.randn(7, 3, 2, 4).permute(2, 3, 1, 0), torch.rand(2, 1, 14)[..., ::2]
    true = by_keys(logits, previous.expand(2, 4, 7))
    for x, y in zip(monotonic.run(logits, previous), true, strict=True):
        torch.testing.assert_close(x, y)
    for x, y in zip(monotonic.run(logits[0, 0], previous[0, 0]), true, strict=True):
        torch.testing.assert_close(x, y[0, 0])
    for x, y in zip(monotonic.run(logits[:1], previous), by_keys(logits[:1], previous), strict=True):
        torch.testing.assert_close(x, y)


# --- Derivatives and transforms.


def drawn(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits, previous = torch.randn(2, 3, 5, dtype=dtype), torch.rand(2, 5, dtype=dtype)
    return logits.requires_grad_(), previous.requires_grad_()


def test_derivatives_of_the_plain_form() -> None:
    torch.autograd.gradcheck(monotonic.run, drawn(torch.float64), check_forward_ad=True)
    torch.autograd.gradgradcheck(monotonic.run, drawn(torch.float64))


@needs_library
def test_second_and_third_derivatives_of_the_kernel(ran: list[str]) -> None:
    def third(leaves: tuple[Tensor, Tensor]) -> list[Tensor]:
        weights, gone = monotonic.run(*leaves)
        energy, results = weights.square().sum() + gone.square().sum(), []
        for _ in range(3):
            grads = torch.autograd.grad(energy, leaves, create_graph=True)
            results += grads
            energy = torch.stack([grad.square().sum() for grad in grads]).sum()
        return results

    leaves = drawn()
    ours = third(leaves)
    assert ran[:2] == ["kernel", "kernel"]
    exact = third((leaves[0].detach().double().requires_grad_(), leaves[1].detach().double().requires_grad_()))
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-5 * float(y.detach().abs().max()), rtol=0)


@needs_library
def test_operators_are_registered_rightly() -> None:
    logits, previous = drawn()
    torch.library.opcheck(torch.ops.regard.monotonic.default, (logits, previous))
    results = [x.detach() for x in torch.ops.regard.monotonic(logits, previous)]
    grads = [torch.randn_like(x) for x in results]
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")  # its own gradient takes long to trace
    torch.library.opcheck(
        torch.ops.regard.monotonic_backward.default, (logits, previous, *results, *grads), test_utils=kinds
    )
    several = torch.randn(4, 2, 3, 5)
    weights, gone = torch.vmap(torch.ops.regard.monotonic, in_dims=(0, None))(several, previous)
    for n in range(4):
        each = torch.ops.regard.monotonic(several[n], previous)
        assert weights[n].equal(each[0])
        assert gone[n].equal(each[1])


def test_which_way_it_goes(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    logits, previous = (x.detach() for x in drawn())

    def went(logits: Tensor, previous: Tensor) -> str:
        monotonic.run(logits, previous)
        return ran.pop()

    if cpu.LIBRARY is not None:
        assert went(logits, previous) == "kernel"
    assert went(logits.double(), previous.double()) == "plain"
    assert went(logits.double(), previous) == "plain"
    assert went(logits.to("meta"), previous.to("meta")) == "plain"
    torch.vmap(went_under := lambda x: monotonic.run(x, previous[0]))(logits)
    torch.func.grad(lambda x: went_under(x)[0].sum())(logits)
    with forward_ad.dual_level():
        weights = monotonic.run(forward_ad.make_dual(logits, torch.ones_like(logits)), previous)[0]
        assert forward_ad.unpack_dual(weights).tangent is not None
    assert ran == ["plain"] * 3
    ran.clear()
    monkeypatch.setattr(cpu, "LIBRARY", None)
    assert went(logits, previous) == "plain"


def test_transforms_are_those_of_the_definition() -> None:
    logits, previous = (x.detach() for x in drawn(torch.float64))

    def energy(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, y: function(x, y)[0].square().sum()

    found, true = (torch.func.hessian(energy(each))(logits, previous) for each in (monotonic.run, by_keys))
    torch.testing.assert_close(found, true)
    tangents = torch.randn_like(logits), torch.randn_like(previous)
    found, true = (torch.func.jvp(each, (logits, previous), tangents)[1] for each in (monotonic.run, by_keys))
    torch.testing.assert_close(found, true)
    for x, y in zip(torch.vmap(monotonic.run)(logits, previous), by_keys(logits, previous), strict=True):
        torch.testing.assert_close(x, y)


# --- The modules.

LENS = torch.tensor([11, 4, 0])
MASKS = {
    "none": None,
    "lengths": regard.Lengths(LENS),
    "left_padding": regard.Lengths(start=11 - LENS),
    "scattered": torch.arange(11) % 3 == 1,
    "nothing": regard.Lengths(0),
}
MODULES: dict[str, Callable[..., Any]] = {
    "monotonic": Monotonic,
    "chunkwise": lambda *given, **named: MonotonicChunkwise(3, *given, **named),
}
by_module = pytest.mark.parametrize("module", MODULES)
by_mask = pytest.mark.parametrize("mask", MASKS)


def ask(
    mask: str = "none", heads: int = 1, keys: int = 11, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, regard.Memory]:
    """Four queries of each of three samples, and the keys."""
    score = regard.Additive(DIM, DIM, 8, heads=heads).to(dtype)
    torch.nn.init.normal_(score.w_v.weight)
    encoded, query = torch.randn(3, keys, DIM, dtype=dtype), torch.randn(3, 4, DIM, dtype=dtype)
    return query.requires_grad_(), regard.Memory(score, encoded.requires_grad_(), encoded, MASKS[mask])


def stepped(attention: Any, query: Tensor, memory: regard.Memory, state: Any) -> tuple[Tensor, Tensor, Any]:
    contexts, weights = [], []
    for each in query.unbind(-2):
        context, p, state = attention.step(each, memory, state)
        contexts.append(context)
        weights.append(p)
    return torch.stack(contexts, -2), torch.stack(weights, -2), state


@by_module
@by_mask
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_stepping_is_the_whole_sequence(way: str, module: str, mask: str, heads: int, training: bool) -> None:
    (query, memory), attention = ask(mask, heads), MODULES[module](-0.5).train(training)
    whole = attention(query, memory)
    steps = stepped(attention, query, memory, attention.start(memory))
    assert whole.context.shape == ((3, 2) if heads == 2 else (3,)) + (4, DIM)
    leaves, found = [query, *memory.score.parameters(), attention.r], []
    for context, weights, state in (whole, steps):
        results = context, weights, state.weights, state.ended
        energy = context.square().sum() + state.ended.sum()
        found.append((*results, *torch.autograd.grad(energy, leaves, retain_graph=True)))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


@by_module
@by_mask
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_hidden_gets_nothing(module: str, mask: str, training: bool, dtype: torch.dtype) -> None:
    (query, memory), attention = ask(mask, dtype=dtype), MODULES[module](noise=1.0).train(training)
    context, weights, state = attention(query, memory)
    assert context.dtype == dtype
    assert weights.dtype == torch.promote_types(dtype, torch.float32)
    visible = memory.visible()
    assert weights.masked_select(~visible.unsqueeze(-2)).eq(0).all()
    torch.testing.assert_close(state.weights.sum(-1) + state.ended, torch.ones(3, dtype=weights.dtype))
    torch.testing.assert_close(weights[..., -1, :].sum(-1), state.weights.sum(-1))
    empty = ~visible.any(-1)
    assert state.ended[empty].eq(1).all()
    assert context[empty].eq(0).all()
    for x in torch.autograd.grad(context.float().sum(), [query, *memory.score.parameters(), attention.r]):
        assert x.isfinite().all()


@by_module
def test_left_padding_is_passed_over(way: str, module: str) -> None:
    (query, memory), attention = ask(), MODULES[module]()
    garbage = torch.full((3, 4, DIM), torch.nan)
    encoded = torch.randn(3, 7, DIM)
    padded = torch.cat([garbage, encoded], 1)
    bare = regard.Memory(memory.score, encoded, encoded)
    after = regard.Memory(memory.score, padded, padded, regard.Lengths(start=torch.tensor([4, 4, 4])))
    true, found = attention(query, bare), attention(query, after)
    torch.testing.assert_close(found.context, true.context)
    torch.testing.assert_close(found.weights[..., 4:], true.weights)
    torch.testing.assert_close(found.state.ended, true.state.ended)


@by_mask
def test_hard_is_the_process(way: str, mask: str) -> None:
    (query, memory), attention = ask(mask, keys=11), Monotonic(-0.7).eval()
    scores, values = memory.scores(query), memory.read(torch.eye(11).expand(3, 11, 11))
    context, weights, state = attention(query, memory)
    ran_off = 0
    for n in range(3):
        at = 0
        for row in range(4):
            while at < 11 and not scores[n, row, at] - 0.7 > 0:
                at += 1
            true = torch.arange(11) == at
            assert weights[n, row].equal(true.float())
            assert context[n, row].equal(values[n, at] if at < 11 else torch.zeros(DIM))
        assert state.ended[n] == (at == 11)
        ran_off += at == 11
    assert mask != "none" or 0 < ran_off < 3  # both ends of it were seen


def test_hard_is_of_evaluation_alone() -> None:
    query, memory = ask()
    for attention in (Monotonic(-0.7), Monotonic(-0.7, hard=False).eval()):
        torch.testing.assert_close(
            attention(query, memory).weights, monotonic.run(memory.scores(query) - 0.7, attention.start(memory)[0])[0]
        )
    assert set(Monotonic(-0.7).eval()(query, memory).weights.unique().tolist()) == {0.0, 1.0}


def test_a_score_that_is_no_number_is_seen() -> None:
    memory = regard.Memory(regard.Dot(), torch.tensor([[torch.nan], [1.0]]), torch.ones(2, 1))
    assert Monotonic().eval().step(torch.ones(1), memory, Monotonic().start(memory)).weights.isnan().any()


@by_module
def test_noise_is_of_training_and_of_the_seed(module: str) -> None:
    (query, memory), attention = ask(), MODULES[module](noise=1.0, hard=False)

    def weights() -> Tensor:
        torch.manual_seed(1)
        return attention(query, memory).weights

    noisy = weights()
    assert noisy.equal(weights())
    assert not noisy.equal(attention(query, memory).weights)
    attention.noise = 0.0
    quiet = weights()
    assert not quiet.equal(noisy)
    attention.noise = 1.0
    assert attention.eval()(query, memory).weights.equal(quiet)


def test_noise_has_its_standard_deviation() -> None:
    encoded = torch.zeros(20000, 1, 1)
    weights = Monotonic(noise=0.5)(encoded, regard.Memory(regard.Dot(), encoded, encoded)).weights
    assert float(weights.detach().logit().std()) == pytest.approx(0.5, rel=0.05)


@by_module
@by_mask
@pytest.mark.parametrize("heads", [1, 2])
def test_selected_beams_are_those_computed_anew(module: str, mask: str, heads: int) -> None:
    (query, memory), attention, index = ask(mask, heads), MODULES[module](), torch.tensor([2, 0, 0, 1])
    state = attention.start(memory)
    if module == "chunkwise":
        state = attention.start(memory, regard.Memory(memory.score, torch.randn(3, 11, DIM), torch.randn(3, 11, DIM)))
    _, _, state = attention.step(query[:, 0], memory, state)
    true = attention.step(query[:, 1], memory, state)
    found = attention.step(query[index, 1], memory.select(index), attention.select(state, index))
    torch.testing.assert_close(found.context, true.context[index])
    torch.testing.assert_close(found.weights, true.weights[index])
    for x, y in zip(found.state[:2], true.state[:2], strict=True):
        torch.testing.assert_close(x, y[index])


@by_module
def test_the_history_ends_where_it_is_detached(module: str) -> None:
    (query, memory), attention = ask(), MODULES[module]()
    _, _, state = attention.step(query[:, 0], memory, attention.start(memory))
    for kept, given in ((True, state), (False, attention.detach(state))):
        context = attention.step(query[:, 1], memory, given).context
        (grad,) = torch.autograd.grad(context.square().sum(), query, retain_graph=True)
        assert grad[:, 0].any() == kept
        assert grad[:, 1].any()


@by_module
def test_keys_are_appended(module: str) -> None:
    (query, memory), attention = ask(keys=6), MODULES[module](-2.0)
    state = attention(query[:, :2], memory).state
    more = torch.randn(3, 2, DIM)
    found = attention.step(query[:, 2], memory.append(more, more), state)
    padded = torch.cat([state.weights, torch.zeros(3, 2)], -1)
    true = attention.step(query[:, 2], memory.append(more, more), state._replace(weights=padded))
    assert found.weights.equal(true.weights)
    assert found.weights[:, 6:].gt(0).all()
    torch.testing.assert_close(found.state.weights.sum(-1) + found.state.ended, torch.ones(3))


@by_module
def test_a_memory_without_keys(module: str) -> None:
    (query, memory), attention = ask(keys=0), MODULES[module]()
    context, weights, state = attention(query, memory)
    assert weights.shape == (3, 4, 0)
    assert context.eq(0).all()
    assert state.ended.eq(1).all()


@by_module
@pytest.mark.parametrize("training", [False, True])
def test_without_samples_and_with_many(module: str, training: bool) -> None:
    (query, memory), attention = ask(), MODULES[module]().train(training)
    true = attention(query, memory)
    for n in range(3):
        key = torch.randn(11, DIM)
        alone = regard.Memory(memory.score, key, key)
        assert attention(query[n], alone).weights.shape == (4, 11)
        assert attention.step(query[n, 0], alone, attention.start(alone)).state.ended.shape == ()
    grid = query.unsqueeze(1)
    keys, values = (memory.read(torch.eye(11).expand(3, 11, 11)).unsqueeze(1) for _ in range(2))
    found = attention(grid, regard.Memory(memory.score, keys, values))
    torch.testing.assert_close(found.weights.squeeze(1), true.weights)


@by_module
@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_step(module: str, training: bool) -> None:
    torch._dynamo.reset()
    encoded, query = torch.randn(3, 11, DIM), torch.randn(3, DIM, requires_grad=True)
    with torch.no_grad():
        memory = regard.Memory(regard.Additive(DIM, DIM, 8), encoded, encoded, MASKS["lengths"])
    attention = MODULES[module]().train(training)
    state = attention.start(memory)
    true = attention.step(query, memory, state)
    found = torch.compile(attention.step, fullgraph=True, backend="aot_eager")(query, memory, state)
    torch.testing.assert_close(found.weights, true.weights)
    torch.testing.assert_close(found.state.ended, true.state.ended)
    expected, gradient = (torch.autograd.grad(x.context.square().sum(), query)[0] for x in (true, found))
    torch.testing.assert_close(gradient, expected)


@needs_library
def test_compiled_it_is_the_operator() -> None:
    torch._dynamo.reset()
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    logits, previous = drawn()
    torch.compile(monotonic.run, fullgraph=True, backend=backend)(logits, previous)
    assert any("regard.monotonic" in target for target in targets)


@needs_library
def test_compiled_at_any_length() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(monotonic.run, fullgraph=True, dynamic=True, backend="aot_eager")
    for keys in (5, 6, 13):
        logits, previous = torch.randn(2, 3, keys), torch.rand(2, keys)
        for x, y in zip(compiled(logits, previous), by_keys(logits, previous), strict=True):
            torch.testing.assert_close(x, y)


@by_module
def test_it_is_exported_without_regard(module: str, ran: list[str]) -> None:
    (query, memory), attention = ask(), MODULES[module]()

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.score = attention, memory.score

        def forward(self, query: Tensor, encoded: Tensor) -> Tensor:
            return self.attention(query, regard.Memory(self.score, encoded, encoded)).weights

    encoded, model = torch.randn(3, 11, DIM), Whole()
    program = torch.export.export(model, (query, encoded))
    assert "regard" not in program.graph_module.code
    torch.testing.assert_close(program.module()(query, encoded), model(query, encoded))


# --- Chunks.


def chunked(stops: Tensor, scores: Tensor, size: int) -> Tensor:
    """The definition, key by key, in float64."""
    found = torch.zeros_like(stops, dtype=torch.float64)
    for k in range(stops.shape[-1]):
        chunk = slice(max(0, k - size + 1), k + 1)
        visible = (scores[..., chunk] > -inf).any(-1, keepdim=True)
        found[..., chunk] += torch.where(visible, stops[..., k : k + 1] * scores[..., chunk].double().softmax(-1), 0)
    return found


@by_mask
@pytest.mark.parametrize("size", [1, 2, 3, 11, 15])
@pytest.mark.parametrize("training", [False, True])
def test_chunks_are_the_definition(mask: str, size: int, training: bool) -> None:
    (query, memory), plain = ask(mask), Monotonic(-0.7).train(training)
    key = torch.randn(3, 11, DIM)
    chunks = regard.Memory(regard.Additive(DIM, DIM, 4), key, key, MASKS[mask])
    attention = MonotonicChunkwise(size, -0.7).train(training)
    stops = plain(query, memory)
    for given, of in ((None, memory), (chunks, chunks)):
        context, weights, state = attention(query, memory, attention.start(memory, given))
        true = chunked(stops.weights, of.scores(query), size)
        torch.testing.assert_close(weights.double(), true, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(context, memory.read(weights))
        for x, y in zip(state[:2], stops.state, strict=True):
            torch.testing.assert_close(x, y)
        if size == 1:
            torch.testing.assert_close(weights, stops.weights)


def test_chunks_of_far_scores() -> None:
    stops = torch.rand(1, 8)
    scores = torch.tensor([[1e4, -1e4, 3e4, -inf, -inf, -inf, 0.0, -3e4]]).requires_grad_()
    weights = _shared_out(stops, scores, 3)
    torch.testing.assert_close(weights.double(), chunked(stops, scores.detach(), 3), check_dtype=False)
    assert weights[0, 3:6].eq(0).all()
    (grad,) = torch.autograd.grad(weights.square().sum(), scores)
    assert grad.isfinite().all()


def test_gradients_of_chunks() -> None:
    leaves = torch.rand(2, 8).requires_grad_(), torch.randn(2, 8).requires_grad_()
    found, true = (
        torch.autograd.grad(x.square().sum(), leaves) for x in (_shared_out(*leaves, 3), chunked(*leaves, 3))
    )
    torch.testing.assert_close(found, true)


def test_chunks_that_are_appended_to() -> None:
    (query, memory), attention = ask(keys=6), MonotonicChunkwise(3)
    more, key = torch.randn(3, 2, DIM), torch.randn(3, 6, DIM)
    state = attention.start(memory, regard.Memory(memory.score, key, key))
    assert isinstance(state, InChunks)
    longer = state._replace(chunks=state.chunks.append(more, more))
    assert attention.step(query[:, 0], memory.append(more, more), longer).weights.shape == (3, 8)


# --- Errors.


def called(attention: Any = None, query: Tensor | None = None, state: Any = None) -> Any:
    given, memory = ask()
    return (attention or Monotonic())(given if query is None else query, memory, state)


def of(keys: int, samples: int = 3) -> regard.Memory:
    x = torch.randn(samples, keys, DIM)
    return regard.Memory(regard.Additive(DIM, DIM, 4), x, x)


def in_chunks(chunks: regard.Memory) -> Any:
    attention, memory = MonotonicChunkwise(2), of(11)
    return called(attention, state=attention.start(memory, chunks))


ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Monotonic(noise=-1.0), ValueError, r"noise is -1\.0; it must be a standard deviation, 0 or more"),
    (lambda: MonotonicChunkwise(0), ValueError, "chunk_size is 0; it must be 1 or more"),
    (lambda: called(query=torch.randn(3, 0, DIM)), ValueError, r"query has shape \(3, 0, 5\); .* one query or more"),
    (lambda: called(query=torch.randn(3, DIM)), ValueError, r"query has shape \(3, 5\); .* \(3, Lq, Dq\)"),
    (lambda: called(state=Aligned(torch.ones(3, 12), torch.zeros(3))), ValueError, "state is of 12 keys; .* 11"),
    (lambda: called(state=Aligned(torch.ones(2, 11), torch.zeros(2))), ValueError, r"state has leading .* \(2,\)"),
    (lambda: in_chunks(of(10)), ValueError, "chunks is Memory.* 10 keys .* as many .* 11 keys"),
    (lambda: in_chunks(of(11, 2)), ValueError, r"chunks is .*\(2,\), .* as .*\(3,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), ERRORS, ids=[match for *_, match in ERRORS])
def test_errors_name_what_was_wrong(call: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_repr() -> None:
    assert repr(Monotonic(noise=0.5)) == "Monotonic(noise=0.5, hard=True)"
    assert repr(MonotonicChunkwise(3, hard=False)) == "MonotonicChunkwise(chunk_size=3, noise=0.0, hard=False)"
