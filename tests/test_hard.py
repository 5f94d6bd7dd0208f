"""Hard attention: it draws by the weights, and its gradients are on average what they are said to be."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from math import inf, log

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import regard
from regard.decoding.hard import Glimpse, HardAttention, Reinforce, gumbel_like

BATCH, KEYS, DIM = 3, 5, 4
LENS = torch.tensor([KEYS, 0, 2])
DRAWS = 20_000
ESTIMATORS = [pytest.param(None, id="reinforce"), pytest.param(0.7, id="gumbel")]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def a_memory(
    score: regard.Score, dtype: torch.dtype = torch.float32, mask: regard.Mask | None = regard.Lengths(LENS)
) -> regard.Memory:
    key, value = torch.randn(BATCH, KEYS, DIM, dtype=dtype), torch.randn(BATCH, KEYS, 2, dtype=dtype)
    return regard.Memory(score.to(dtype), key, value, mask)


# --- What it draws, and what it says of it.


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_keys_are_drawn_by_their_weights(estimator: float | None) -> None:
    memory, query = a_memory(regard.Dot()), torch.randn(BATCH, 1, DIM)
    seen = HardAttention(estimator)(query.expand(-1, DRAWS, -1), memory)
    share = F.one_hot(seen.chosen + 1, KEYS + 1).double().mean(-2)[:, 1:]
    p = memory.weights(query[:, 0]).double()
    assert ((share - p).abs() <= 4 * (p * (1 - p) / DRAWS).sqrt()).all()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_all_that_it_says(dtype: torch.dtype, rows: bool, heads: int, estimator: float | None, train: bool) -> None:
    score = regard.Additive(DIM, DIM, 8, heads=heads).to(dtype)
    key, value = torch.randn(BATCH, KEYS, DIM, dtype=dtype), torch.randn(BATCH, KEYS, 2, dtype=dtype)
    memory, query = regard.Memory(score, key, value, regard.Lengths(LENS)), torch.randn(BATCH, DIM, dtype=dtype)
    if rows:
        query = query.unsqueeze(-2).expand(-1, 7, -1)
    seen = HardAttention(estimator).train(train)(query, memory)
    p, wide = memory.weights(query), torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(seen.weights, p)
    leading = (BATCH, *[2] * (heads > 1), *[7] * rows)
    assert seen.chosen.shape == seen.log_prob.shape == seen.entropy.shape == leading
    assert (seen.context.dtype, seen.log_prob.dtype, seen.entropy.dtype, seen.weights.dtype) == (dtype, *[wide] * 3)
    assert seen.chosen[1].eq(-1).all()  # there is nothing to see
    for nothing in (seen.context[1], seen.log_prob[1], seen.entropy[1], seen.weights[1]):
        assert nothing.eq(0).all()
    some = [0, 2]
    assert (seen.chosen[some] < LENS[some].reshape(2, *[1] * (len(leading) - 1))).all()
    if not train:
        assert torch.equal(seen.chosen[some], p.argmax(-1)[some])
    every = value.reshape(BATCH, *[1] * (len(leading) - 1), KEYS, 2).expand(*leading, KEYS, 2)
    at = seen.chosen.clamp(min=0).unsqueeze(-1)
    assert torch.equal(seen.context[some], every.gather(-2, at.unsqueeze(-1).expand(*at.shape, 2)).squeeze(-2)[some])
    torch.testing.assert_close(seen.log_prob[some], p.gather(-1, at).squeeze(-1).log()[some])
    torch.testing.assert_close(seen.entropy, torch.special.entr(p).sum(-1))


def test_of_equals_the_first_in_eval() -> None:
    key = torch.zeros(1, KEYS, DIM)
    memory = regard.Memory(regard.Dot(), key, key, regard.Lengths(start=torch.tensor([2])))
    seen = HardAttention().eval()(torch.randn(1, DIM), memory)
    assert seen.chosen.item() == 2
    torch.testing.assert_close(seen.log_prob, torch.tensor([-log(3)]))
    torch.testing.assert_close(seen.entropy, torch.tensor([log(3)]))


def test_a_mask_of_the_step() -> None:
    memory, query = a_memory(regard.Dot(), mask=None), torch.randn(BATCH, 9, DIM)
    allowed = torch.rand(BATCH, 9, KEYS) < 0.4
    seen = HardAttention()(query, memory, allowed)
    torch.testing.assert_close(seen.weights, memory.weights(query, allowed))
    assert torch.equal(seen.chosen == -1, ~allowed.any(-1))
    assert (F.one_hot(seen.chosen + 1, KEYS + 1)[..., 1:].bool() <= allowed).all()


def test_rows_are_steps() -> None:
    memory, query = a_memory(regard.Dot()), torch.randn(BATCH, 9, DIM)
    attention = HardAttention().eval()
    rows, steps = attention(query, memory), [attention(each, memory) for each in query.unbind(-2)]
    for row, *each in zip(rows, *steps, strict=True):
        torch.testing.assert_close(row, torch.stack(each, 1))


def test_the_same_seed_draws_the_same() -> None:
    memory, query = a_memory(regard.Dot()), torch.randn(BATCH, 99, DIM)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(HardAttention()(query, memory).chosen)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_no_keys_at_all() -> None:
    none = torch.randn(BATCH, 0, DIM)
    seen = HardAttention(1.0)(torch.randn(BATCH, DIM), regard.Memory(regard.Dot(), none, none))
    assert torch.equal(seen.context, torch.zeros(BATCH, DIM))
    assert seen.chosen.eq(-1).all()
    assert seen.log_prob.eq(0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_are_finite_and_padding_gets_none(estimator: float | None) -> None:
    score, query = regard.Additive(DIM, DIM, 8), torch.randn(BATCH, DIM)
    key, value = torch.randn(BATCH, KEYS, DIM), torch.randn(BATCH, KEYS, 2)
    hidden = torch.arange(KEYS) >= LENS[:, None]
    key[hidden], value[hidden], query[1] = torch.nan, torch.inf, torch.nan
    leaves = [x.requires_grad_() for x in (query, key, value)]
    seen = HardAttention(estimator)(query, regard.Memory(score, key, value, regard.Lengths(LENS)))
    for part in (seen.context, seen.weights, seen.log_prob, seen.entropy):
        wanted = [*leaves, *score.parameters()]
        grads = torch.autograd.grad(part.sum(), wanted, retain_graph=True, materialize_grads=True)
        assert all(grad.isfinite().all() for grad in grads)
        by_query, by_key, by_value, *_ = grads
        for padding in (by_query[1], by_key[hidden], by_value[hidden]):
            assert padding.eq(0).all()


def test_scores_have_a_gradient_by_the_context_only_straight_through() -> None:
    memory_of, value = regard.Dot(), torch.randn(BATCH, KEYS, 2)
    for estimator in (None, 0.7):
        query = torch.randn(BATCH, DIM, requires_grad=True)
        memory = regard.Memory(memory_of, torch.randn(BATCH, KEYS, DIM), value)
        assert HardAttention(estimator)(query, memory).context.requires_grad == (estimator is not None)


def test_it_is_pickled_and_copied() -> None:
    memory, query = a_memory(regard.Dot()), torch.randn(BATCH, DIM)
    attention = HardAttention(0.5).eval()
    for other in (pickle.loads(pickle.dumps(attention)), copy.deepcopy(attention)):
        assert torch.equal(other(query, memory).context, attention(query, memory).context)


@pytest.mark.parametrize("train", [False, True])
def test_it_compiles(train: bool) -> None:
    torch._dynamo.reset()
    score, normalizer, mask = regard.Additive(DIM, DIM, 8), regard.Softmax(), regard.Lengths(LENS)
    attention, key, query = HardAttention(0.5).train(train), torch.randn(BATCH, KEYS, DIM), torch.randn(BATCH, DIM)

    def looked(query: Tensor, key: Tensor) -> Glimpse:
        return attention(query, regard.Memory(score, key, key, mask, normalizer=normalizer))

    found = torch.compile(looked, fullgraph=True, backend="aot_eager")(query, key)
    if train:
        assert torch.equal(found.context, key[torch.arange(BATCH), found.chosen] * (found.chosen >= 0).unsqueeze(-1))
    else:
        for x, exact in zip(found, looked(query, key), strict=True):
            torch.testing.assert_close(x, exact)


def test_under_autocast() -> None:
    score, key, query = regard.Additive(DIM, DIM, 8), torch.randn(BATCH, KEYS, DIM), torch.randn(BATCH, DIM)
    with torch.autocast("cpu"):
        seen = HardAttention(0.5)(query, regard.Memory(score, key, key))
    assert seen.context.dtype == torch.bfloat16
    assert seen.weights.dtype == seen.log_prob.dtype == torch.float32


def test_bad_arguments() -> None:
    for temperature in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"straight_through is .*; it must be a temperature above 0, or None"):
            HardAttention(temperature)
    with pytest.raises(ValueError, match=r"decay is 1\.5; it must lie in 0 \.\. 1"):
        Reinforce(1.5)
    with pytest.raises(ValueError, match=r"reward has shape \(3, 1\) and log_prob \(3,\); they must be of one shape"):
        Reinforce()(torch.zeros(3, 1), torch.zeros(3))


# --- Estimators against enumeration. A case is one query against five keys, of which one is padding; the reward is
# nonlinear in the context, and far from 0.

Estimate = Callable[[Glimpse, Tensor], Tensor]  # from what was drawn, and its rewards, to a loss


class Case:
    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(7)
        self.score = regard.Bilinear(3, DIM).double()
        with torch.no_grad():
            self.score.W.weight.copy_(torch.randn(DIM, 3, generator=draw, dtype=torch.float64))
        self.query = torch.randn(3, generator=draw, dtype=torch.float64)
        self.key = torch.randn(KEYS, DIM, generator=draw, dtype=torch.float64)
        self.value = torch.randn(KEYS, 2, generator=draw, dtype=torch.float64)
        self.mask = regard.Lengths(KEYS - 1)

    def reward(self, context: Tensor) -> Tensor:
        return 8 - (context - 1).square().sum(-1)

    def exact(self) -> Tensor:
        """The gradient of −E[reward] by query and keys, of all keys that may be drawn."""
        query, key = (x.clone().requires_grad_() for x in (self.query, self.key))
        p = regard.weights(query.unsqueeze(0), key, self.score, self.mask).squeeze(0)
        return _flat(torch.autograd.grad(-(p * self.reward(self.value)).sum(), (query, key)), 0)

    def drawn(self, attention: HardAttention, estimate: Estimate, draws: int = DRAWS) -> Tensor:
        """(draws, ·): the gradient of each draw alone, as it has a query and keys of its own."""
        query, key = (x.expand(draws, *x.shape).clone().requires_grad_() for x in (self.query, self.key))
        seen = attention(query, regard.Memory(self.score, key, self.value, self.mask))
        loss = estimate(seen, self.reward(seen.context))
        return draws * _flat(torch.autograd.grad(loss, (query, key)), 1)

    def deviations(self, gradients: Tensor) -> Tensor:
        """How many standard errors the mean of each component is from the exact one; 0 where both are 0."""
        mean, error = gradients.mean(0), gradients.std(0) / len(gradients) ** 0.5
        off = (mean - self.exact()).abs()
        return torch.where(error > 0, off / error, torch.where(off > 1e-12, inf, 0.0))


def _flat(gradients: tuple[Tensor, ...], start: int) -> Tensor:
    return torch.cat([x.flatten(start) for x in gradients], -1)


def test_the_mean_of_reinforce_is_the_exact_gradient() -> None:
    case = Case()
    reinforce = Reinforce().eval()  # its baseline stays 0
    gradients = case.drawn(HardAttention(), lambda seen, reward: reinforce(reward, seen.log_prob))
    assert case.exact().abs().max() > 0.1
    assert case.deviations(gradients).max() <= 3


def test_and_so_it_is_with_a_moving_baseline_which_takes_noise_away() -> None:
    case, reinforce, attention = Case(), Reinforce(decay=0.9), HardAttention()

    def estimate(seen: Glimpse, reward: Tensor) -> Tensor:
        return reinforce(reward, seen.log_prob)

    for _ in range(50):
        case.drawn(attention, estimate, draws=50)
    gradients = torch.cat([case.drawn(attention, estimate, draws=50) for _ in range(DRAWS // 50)])
    assert case.deviations(gradients).max() <= 3
    plain = case.drawn(attention, lambda seen, reward: -(reward * seen.log_prob).mean())
    assert gradients.var(0).sum() < plain.var(0).sum() / 2


WRONG: dict[str, Estimate] = {
    "wrong sign": lambda seen, reward: (reward * seen.log_prob).mean(),
    "a tenth less": lambda seen, reward: -0.9 * (reward * seen.log_prob).mean(),
    "weights not detached": lambda seen, reward: -(reward * seen.log_prob * seen.weights.amax(-1)).mean(),
    "baseline of the same draw": lambda seen, reward: -((reward - 0.2 * reward) * seen.log_prob).mean(),
    "entropy left in": lambda seen, reward: -(reward * seen.log_prob + 0.5 * seen.entropy).mean(),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_and_the_proof_of_it_can_fail(wrong: str) -> None:
    case = Case()
    assert case.deviations(case.drawn(HardAttention(), WRONG[wrong])).max() > 5


def test_gumbel_is_biased_the_less_the_colder_and_the_noisier() -> None:
    case, exact = Case(), Case().exact()
    bias, noise = {}, {}
    for temperature in (2.0, 1.0, 0.5):
        gradients = case.drawn(HardAttention(straight_through=temperature), lambda seen, reward: -reward.mean())
        assert case.deviations(gradients).max() > 10
        bias[temperature] = ((gradients.mean(0) - exact).norm() / exact.norm()).item()
        noise[temperature] = gradients.std(0).norm().item()
    assert bias[2.0] > bias[1.0] > bias[0.5] > 0.05
    assert noise[2.0] < noise[1.0] < noise[0.5]


def test_gumbel_noise_is_gumbels() -> None:
    noise = gumbel_like(torch.empty(200_000, dtype=torch.float64))
    assert abs(noise.mean().item() - 0.577216) < 4 * noise.std().item() / 200_000**0.5
    assert abs(noise.var().item() - 1.644934) < 0.05


# --- Reinforce.


def test_loss_and_baseline_are_the_formulas() -> None:
    reinforce = Reinforce(decay=0.75)
    log_prob = torch.tensor([-1.0, -2.0], requires_grad=True)
    baseline = 0.0
    for reward in (torch.tensor([3.0, 1.0]), torch.tensor([0.0, -4.0])):
        loss = reinforce(reward, log_prob)
        expected = -((reward - baseline) * log_prob).mean()
        torch.testing.assert_close(loss, expected)
        found, true = torch.autograd.grad(loss, log_prob), torch.autograd.grad(expected, log_prob)
        torch.testing.assert_close(found, true)
        baseline = 0.75 * baseline + 0.25 * reward.mean().item()
        assert reinforce.baseline.item() == pytest.approx(baseline)
    reinforce.eval()(torch.tensor([9.0, 9.0]), log_prob)
    assert reinforce.baseline.item() == pytest.approx(baseline)
    assert not reinforce.baseline.requires_grad


def test_no_gradient_goes_through_the_reward() -> None:
    reward, log_prob = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    Reinforce()(reward, log_prob).backward()
    assert reward.grad is None
    assert log_prob.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool], ids=str)
def test_rewards_of_any_type(dtype: torch.dtype) -> None:
    reinforce = Reinforce(decay=0.5)
    assert reinforce(torch.tensor([1, 0]).to(dtype), torch.tensor([-1.0, -1.0])).item() == 0.5
    assert reinforce.baseline.item() == 0.25


def test_the_baseline_is_saved_with_the_model() -> None:
    reinforce, other = Reinforce(), Reinforce()
    reinforce(torch.ones(2), torch.zeros(2))
    other.load_state_dict(reinforce.state_dict())
    assert other.baseline == reinforce.baseline > 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_both_find_the_key_that_pays(estimator: float | None) -> None:
    query, reinforce, attention = torch.zeros(1, DIM, requires_grad=True), Reinforce(), HardAttention(estimator)
    key = torch.randn(1, KEYS, DIM)
    optimizer = torch.optim.Adam([query], lr=0.05)
    for _ in range(150):
        seen = attention(query.unsqueeze(1).expand(-1, 32, -1), regard.Memory(regard.Dot(), key, torch.eye(KEYS)))
        reward = seen.context[..., 3]
        loss = reinforce(reward, seen.log_prob) if estimator is None else -reward.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert regard.weights(query, key[0], regard.Dot())[0, 3] > 0.8
