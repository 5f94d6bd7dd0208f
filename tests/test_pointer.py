"""Pointing at keys, and copying the words that stand at them: what naive float64 loops give, and never NaN."""

from __future__ import annotations

from math import exp, inf, log

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import regard
from regard.decoding.pointer import log_weights, pointer, pointer_generator

BATCH, KEYS, DIM, WORDS, SIZE = 3, 6, 4, 5, 8
LENS = torch.tensor([KEYS, 0, 2])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def a_memory(score: regard.Score, dtype: torch.dtype = torch.float32) -> regard.Memory:
    key = torch.randn(BATCH, KEYS, DIM, dtype=dtype)
    return regard.Memory(score.to(dtype), key, key, regard.Lengths(LENS))


# --- pointer.


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_is_the_logarithm_of_the_weights(dtype: torch.dtype, rows: bool, heads: int) -> None:
    memory = a_memory(regard.Additive(DIM, DIM, 8, heads=heads), dtype)
    query = torch.randn(BATCH, *[7] * rows, DIM, dtype=dtype)
    found = pointer(query, memory)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found, memory.weights(query).log())
    hidden = (torch.arange(KEYS) >= LENS[:, None]).reshape(BATCH, *[1] * (heads - 1), *[1] * rows, KEYS)
    assert torch.equal(found == -inf, hidden.expand_as(found))


def test_it_is_finite_where_the_weights_underflow() -> None:
    key = torch.tensor([[2e6], [2e6 - 1], [-2e6], [0.0]])
    memory = regard.Memory(regard.Dot(), key, key, regard.Lengths(3))
    found = pointer(torch.ones(1, 1), memory)
    one = log(1 + exp(-1))
    torch.testing.assert_close(found, torch.tensor([[-one, -1 - one, -4e6 - one, -inf]]))


def test_a_mask_of_the_step_hides_what_was_pointed_at() -> None:
    memory, query = a_memory(regard.ScaledDot()), torch.randn(BATCH, DIM)
    free, pointed = memory.visible(), []
    for _ in range(KEYS):
        log_p = pointer(query, memory, free.unsqueeze(-2))
        assert torch.equal(log_p == -inf, ~free)
        pointed.append(log_p.argmax(-1))
        free = free.scatter(-1, pointed[-1].unsqueeze(-1), False)
    assert torch.equal(torch.stack(pointed, -1)[0].sort().values, torch.arange(KEYS))
    assert pointed[0][2] != pointed[1][2]
    rows = torch.stack([memory.visible(), memory.visible() & (torch.arange(KEYS) > 0)], -2)
    found = pointer(query.unsqueeze(-2).expand(-1, 2, -1), memory, rows)
    torch.testing.assert_close(found[:, 1].exp(), regard.Softmax()(memory.scores(query).masked_fill(~rows[:, 1], -inf)))


def test_cross_entropy_is_safe_with_empty_rows() -> None:
    score, query = regard.Additive(DIM, DIM, 8), torch.randn(BATCH, DIM, requires_grad=True)
    key = torch.randn(BATCH, KEYS, DIM, requires_grad=True)
    memory = regard.Memory(score, key, key, regard.Lengths(LENS))
    leaves = [query, key, *score.parameters()]
    loss = F.nll_loss(pointer(query, memory), torch.tensor([3, -100, 1]))
    assert loss.isfinite()
    of_two = F.cross_entropy(memory.scores(query)[::2], torch.tensor([3, 1]))
    grads = torch.autograd.grad(loss, leaves, retain_graph=True)
    for found, true in zip(grads, torch.autograd.grad(of_two, leaves, retain_graph=True), strict=True):
        torch.testing.assert_close(found, true)
    assert grads[0][1].eq(0).all()
    every = torch.autograd.grad(pointer(query, memory).exp().sum(), leaves)
    assert all(x.isfinite().all() for x in every)


def test_no_keys_at_all() -> None:
    none = torch.randn(BATCH, 0, DIM)
    assert pointer(torch.randn(BATCH, DIM), regard.Memory(regard.Dot(), none, none)).shape == (BATCH, 0)


def test_gradients_of_both_orders() -> None:
    memory_of = regard.Bilinear(DIM, DIM).double()
    query = torch.randn(BATCH, DIM, dtype=torch.float64, requires_grad=True)
    key = torch.randn(BATCH, KEYS, DIM, dtype=torch.float64, requires_grad=True)

    def visible(query: Tensor, key: Tensor) -> Tensor:
        log_p = pointer(query, regard.Memory(memory_of, key, key, regard.Lengths(LENS)))
        return log_p.masked_fill(log_p == -inf, 0.0)

    assert torch.autograd.gradcheck(visible, (query, key))
    assert torch.autograd.gradgradcheck(visible, (query, key))


@pytest.mark.parametrize("normalizer", [regard.Sparsemax(), regard.Sigmoid()], ids=str)
def test_other_normalizers_are_refused(normalizer: regard.Normalizer) -> None:
    key = torch.randn(BATCH, KEYS, DIM)
    memory = regard.Memory(regard.Dot(), key, key, normalizer=normalizer)
    with pytest.raises(ValueError, match=r"memory has the normalizer .*; to be pointed at it must be Softmax"):
        pointer(torch.randn(BATCH, DIM), memory)


# --- log_weights.


def test_log_weights_has_no_gradient_at_zero() -> None:
    weights = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]], requires_grad=True)
    found = log_weights(weights)
    assert torch.equal(found, weights.log())
    (grad,) = torch.autograd.grad(F.nll_loss(found, torch.tensor([2, -100])), weights)
    assert torch.equal(grad, torch.tensor([[0.0, 0.0, -2.0], [0.0, 0.0, 0.0]]))
    assert log_weights(weights.half()).dtype == torch.float32


# --- pointer_generator.


def naive(logits: Tensor, copy: Tensor, gate: Tensor, ids: Tensor, size: int) -> Tensor:
    """P(w) in float64, one word at a time."""
    rows = []
    for scores, log_p, g, words in zip(logits.tolist(), copy.tolist(), gate.tolist(), ids.tolist(), strict=True):
        generate, point = 1 / (1 + exp(-g)), 1 / (1 + exp(g))
        total = sum(exp(s) for s in scores)
        p = [generate * exp(s) / total for s in scores] + [0.0] * (size - len(scores))
        for log_weight, word in zip(log_p, words, strict=True):
            if log_weight > -inf:
                p[word] += point * exp(log_weight)
        rows.append(p)
    return torch.tensor(rows, dtype=torch.float64)


def a_draw(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, copy, gate and ids of four rows: plain, all of one word, padded, and without keys."""
    logits, gate = torch.randn(4, WORDS, dtype=dtype), torch.randn(4, dtype=dtype)
    scores = torch.randn(4, KEYS, dtype=dtype)
    scores[2, 2:], scores[3] = -inf, -inf
    ids = torch.tensor([[0, 4, 5, 7, 5, 0], [6] * 6, [1, 1, -1, 99, 0, 3], [0] * 6])
    return logits, log_weights(regard.Softmax()(scores)).to(dtype), gate, ids


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_is_the_naive_loop(dtype: torch.dtype) -> None:
    logits, copy, gate, ids = a_draw(dtype)
    found = pointer_generator(logits, copy, gate, ids, SIZE)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert found.shape == (4, SIZE)
    true = naive(logits.double(), copy.double(), gate.double(), ids, SIZE)
    torch.testing.assert_close(found.double().exp(), true, rtol=1e-6, atol=0)
    assert torch.equal(found == -inf, true == 0)


def test_it_sums_to_1_or_to_the_gate_where_there_is_nothing_to_copy() -> None:
    logits, copy, gate, ids = a_draw()
    sums = pointer_generator(logits, copy, gate, ids, SIZE).exp().sum(-1)
    torch.testing.assert_close(sums, torch.tensor([1.0, 1.0, 1.0, gate[3].sigmoid()], dtype=torch.float64))


def test_many_draws_in_float64() -> None:
    for _ in range(50):
        logits, gate = 3 * torch.randn(4, WORDS, dtype=torch.float64), 5 * torch.randn(4, dtype=torch.float64)
        copy, ids = (5 * torch.randn(4, KEYS, dtype=torch.float64)).log_softmax(-1), torch.randint(SIZE, (4, KEYS))
        found = pointer_generator(logits, copy, gate, ids, SIZE)
        torch.testing.assert_close(found.exp(), naive(logits, copy, gate, ids, SIZE), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("gate", [inf, -inf, 1e4, -1e4, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_finite_at_gates_of_0_and_1(dtype: torch.dtype, gate: float) -> None:
    logits, copy, _, ids = a_draw(dtype)
    gates = torch.full((4,), gate, dtype=dtype)
    leaves = [x.requires_grad_() for x in (logits, copy, gates)]
    found = pointer_generator(logits, copy, gates, ids, SIZE)
    some = found.detach() > -inf
    alone = torch.zeros_like(some)
    if gate > -inf:
        alone[:, :WORDS] = True
    if gate < inf:
        for row, words in enumerate(ids.tolist()):
            alone[row, [word for word, log_p in zip(words, copy[row].tolist(), strict=True) if log_p > -inf]] = True
    assert torch.equal(some, alone)
    assert not found.isnan().any()
    for target in (0, 4, 6):  # which some of these cannot say
        for grad in torch.autograd.grad(found[:, target].sum(), leaves, retain_graph=True):
            assert grad.isfinite().all()


def test_copies_below_the_smallest_float_count() -> None:
    copy = torch.tensor([[-300.0, -300.0, 0.0]], requires_grad=True)
    found = pointer_generator(torch.zeros(1, 1), copy, torch.tensor([-inf]), torch.tensor([[1, 1, 2]]), 3)
    torch.testing.assert_close(found, torch.tensor([[-inf, log(2) - 300, 0.0]]))
    (grad,) = torch.autograd.grad(found[0, 1], copy)
    torch.testing.assert_close(grad, torch.tensor([[0.5, 0.5, 0.0]]))


def test_gradients_are_exact() -> None:
    logits, copy, gate, ids = (x[:3] for x in a_draw())
    some = naive(logits, copy, gate, ids, SIZE) > 0

    def words(logits: Tensor, scores: Tensor, gate: Tensor) -> Tensor:
        log_p = scores.log_softmax(-1)
        return pointer_generator(logits, log_p, gate, ids, SIZE)[some]

    leaves = tuple(x.clone().requires_grad_() for x in (logits, copy, gate))
    leaves[1].data[2, 2:] = -50.0  # finite, as numeric differences need it
    ids = ids.clamp(0, SIZE - 1)
    assert torch.autograd.gradcheck(words, leaves)
    assert torch.autograd.gradgradcheck(words, leaves)


def test_second_derivatives_are_finite_where_nothing_is_said() -> None:
    logits, copy, gate, ids = a_draw()
    leaves = [x.requires_grad_() for x in (logits, copy, gate)]
    found = pointer_generator(logits, copy, gate, ids, SIZE)
    grads = torch.autograd.grad(found[found > -inf].sum(), leaves, create_graph=True)
    for grad in torch.autograd.grad(sum((g.square().sum() for g in grads), torch.zeros(())), leaves):
        assert grad.isfinite().all()


def test_it_copies_by_coverage_and_by_pointers() -> None:
    score, query = regard.Additive(DIM, DIM, 8), torch.randn(BATCH, DIM)
    memory, gate = a_memory(score), nn.Linear(DIM, 1)(query).squeeze(-1)
    logits, ids = torch.randn(BATCH, WORDS), torch.randint(SIZE, (BATCH, KEYS))
    by_pointer = pointer_generator(logits, pointer(query, memory), gate, ids, SIZE)
    by_weights = pointer_generator(logits, log_weights(memory.weights(query)), gate, ids, SIZE)
    torch.testing.assert_close(by_pointer, by_weights)
    one = pointer_generator(logits[0], pointer(query, memory)[0], gate[0], ids[0], SIZE)
    torch.testing.assert_close(one, by_pointer[0])
    rows = pointer_generator(logits[:, None], pointer(query[:, None], memory), gate[:, None], ids[:, None], SIZE)
    torch.testing.assert_close(rows[:, 0], by_pointer)
    shared = pointer_generator(logits, pointer(query, memory), gate, ids[0], SIZE)
    torch.testing.assert_close(shared[0], by_pointer[0])


def test_log_probabilities_of_the_vocabulary_are_logits() -> None:
    logits, copy, gate, ids = a_draw()
    found = pointer_generator(logits.log_softmax(-1), copy, gate, ids, SIZE)
    torch.testing.assert_close(found, pointer_generator(logits, copy, gate, ids, SIZE))


def test_under_autocast() -> None:
    logits, copy, gate, ids = a_draw(torch.float32)
    with torch.autocast("cpu"):
        found = pointer_generator(logits, copy, gate, ids, SIZE)
    torch.testing.assert_close(found, pointer_generator(logits, copy, gate, ids, SIZE))


def test_it_compiles() -> None:
    torch._dynamo.reset()
    logits, copy, gate, ids = a_draw(torch.float32)
    ids = ids.clamp(0, SIZE - 1)
    compiled = torch.compile(pointer_generator, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(logits, copy, gate, ids, SIZE), pointer_generator(logits, copy, gate, ids, SIZE)
    )


def test_nothing_of_the_callers_is_written_to() -> None:
    given = a_draw()
    before = [x.clone() for x in given]
    pointer_generator(*given, SIZE)
    assert all(map(torch.equal, given, before))


def test_bad_arguments() -> None:
    logits, copy, gate, ids = a_draw()
    for found, bad in (("-1 .. 7", -1), ("0 .. 8", 8)):
        with pytest.raises(ValueError, match=rf"ids lie in {found}; they must lie in 0 .. 7"):
            pointer_generator(logits, copy, gate, ids.index_fill(1, torch.tensor([0]), bad), SIZE)
    with pytest.raises(ValueError, match=r"size is 4; it must be an int, at least the 5 of the vocabulary"):
        pointer_generator(logits, copy, gate, ids, 4)
    with pytest.raises(ValueError, match=r"shapes \(4, 5\), \(4, 6\), \(4, 1\); they must be \(\.\.\., V\)"):
        pointer_generator(logits, copy, gate.unsqueeze(-1), ids, SIZE)
    with pytest.raises(ValueError, match=r"ids has shape \(3, 6\); it must broadcast to \(4, 6\)"):
        pointer_generator(logits, copy, gate, ids[:3], SIZE)
    with pytest.raises(TypeError, match=r"ids is torch\.int32; it must be int64"):
        pointer_generator(logits, copy, gate, ids.int(), SIZE)
    with pytest.raises(TypeError, match=r"gate is torch\.bool; it must be a Tensor of a floating type"):
        pointer_generator(logits, copy, gate > 0, ids, SIZE)
    with pytest.raises(TypeError, match="copy is list; it must be a Tensor of a floating type"):
        pointer_generator(logits, copy.tolist(), gate, ids, SIZE)  # pyright: ignore[reportArgumentType]
