"""Who is compared by `cpu` and `gpu`, and on what: each readies what outlasts a call, and returns the call."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import regard
from benchmarks.toy import Naive
from regard.intervals import Grid

IMPL = "cpu"
FORWARD, RECORDED, BACKWARD = "forward", "forward, recorded", "forward + backward"


@dataclass(frozen=True)
class Case:
    """Sizes, and who runs them: each a contestant's name and, after a comma, a variation's."""

    name: str
    batch: int
    queries: int
    keys: int
    hidden: int  # of queries, keys and values too
    entries: tuple[str, ...]
    passes: tuple[str, ...] = (FORWARD, BACKWARD)
    score: str = "additive"
    heads: int = 1
    note: str = ""
    constants: bool = False  # whether inputs are, so that gradients are of parameters alone

    def __str__(self) -> str:
        sizes = f"{self.batch} × {self.queries:,} × {self.keys:,}, hidden {self.hidden}"
        return (
            sizes
            + f", {self.heads} heads" * (self.heads > 1)
            + f", {self.score}" * (self.score != "additive")
            + self.note
        )

    @property
    def elements(self) -> int:
        return self.batch * self.heads * self.queries * self.keys * self.hidden


# --- What they are given.


@dataclass(frozen=True)
class Given:
    case: Case
    score: regard.Score
    query: Tensor
    key: Tensor
    value: Tensor
    lens: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gradients are taken by."""
        inputs = {"query": self.query, "key": self.key, "value": self.value}
        return {name: x for name, x in inputs.items() if x.requires_grad} | dict(self.score.named_parameters())

    def to(self, target: torch.dtype | torch.device) -> Given:
        """The same numbers, as leaves of their own."""
        inputs = (self.query, self.key, self.value)
        query, key, value = (x.detach().to(target, copy=True).requires_grad_(x.requires_grad) for x in inputs)
        lens = self.lens.to(query.device)
        return Given(self.case, copy.deepcopy(self.score).to(target), query, key, value, lens)


def draw(case: Case) -> Given:
    torch.manual_seed(0)
    n, lens = case.hidden, torch.arange(1, case.batch + 1) * case.keys // (case.batch + 1)
    scores: dict[str, Callable[[], regard.Score]] = {
        "additive": lambda: regard.Additive(n, n, n, heads=case.heads),
        "GATv2": lambda: regard.GATv2(n, n, n, heads=case.heads),
        "L1": lambda: regard.Laplace(math.sqrt(n)),
        "location-sensitive": lambda: Located(n, case.batch, case.keys),
        "scaled dot": regard.ScaledDot,
    }
    score = scores[case.score]()
    lengths = (case.queries, case.keys, case.keys)
    query, key, value = (torch.randn(case.batch, each, n, requires_grad=not case.constants) for each in lengths)
    return Given(case, score, query, key, value, lens.clamp(min=1))


class Located(regard.Additive):
    """An additive score of keys that are moved by where earlier steps looked, as in location-sensitive attention."""

    def __init__(self, size: int, batch: int, keys: int) -> None:
        super().__init__(size, size, size)
        self.location = regard.LocationSensitive(size, cumulative=True)  # 32 filters of 31 keys, as in Tacotron 2
        self.looked: Tensor  # the last weights and the sum of all
        self.register_buffer("looked", torch.rand(batch, 2, keys))

    def project_key(self, key: Tensor) -> Tensor:
        return super().project_key(key) + self.location.U(self.location.filters(self.looked).mT)


class Variation(NamedTuple):
    mask: Callable[[Given], regard.Mask | None] = lambda given: None
    dropout_p: float = 0.0
    dtype: torch.dtype = torch.float32
    precision: str = "highest"  # of torch's float32 products

    def allowed(self, given: Given, rows: Tensor) -> Tensor | None:
        """Bool, broadcasting to (batch, [heads,] rows, keys); None allows all."""
        mask, case, device = self.mask(given), given.case, given.query.device
        grid = Grid((case.batch, case.heads) if case.heads > 1 else (case.batch,), case.queries, case.keys, device)
        return None if mask is None else mask.allow(rows.unsqueeze(-1), torch.arange(case.keys, device=device), grid)


VARIATIONS = {
    "": Variation(),
    "ragged": Variation(lambda given: regard.Lengths(given.lens)),
    "half the keys": Variation(lambda given: regard.Lengths(torch.full_like(given.lens, given.case.keys // 2))),
    "causal": Variation(lambda given: regard.Causal()),
    "window of 128": Variation(lambda given: regard.Window(128, 0)),
    "dropout 0.1": Variation(dropout_p=0.1),
    "tf32": Variation(precision="high"),
    "bf16": Variation(dtype=torch.bfloat16),
    "bf16, causal": Variation(lambda given: regard.Causal(), dtype=torch.bfloat16),
    "bf16, ragged": Variation(lambda given: regard.Lengths(given.lens), dtype=torch.bfloat16),
}


# --- The contestants.

Call = Callable[[], Tensor]


def by_regard(given: Given, variation: Variation, impl: str) -> Call:
    """The mask is made in each call, since the lengths of a batch come with it."""
    query, key, value, score, mask, p = given.query, given.key, given.value, given.score, *variation[:2]
    return lambda: regard.attend(query, key, value, score, mask(given), dropout_p=p, impl=impl)


class Projected(regard.Additive):
    """An additive score of what is projected already."""

    def project_query(self, query: Tensor) -> Tensor:
        return query

    def project_key(self, key: Tensor) -> Tensor:
        return key


def projected(given: Given) -> Given:
    """The same, its queries and keys projected already."""
    score = Projected(1, 1, given.case.hidden)
    assert isinstance(given.score, regard.Additive)
    score.w_v = given.score.w_v
    query, key = given.score.project_query(given.query), given.score.project_key(given.key)
    return replace(given, score=score, query=query.detach(), key=key.detach())


def by_memory(given: Given, variation: Variation) -> Call:
    kept = regard.Memory(given.score, given.key.detach(), given.value.detach())
    return lambda: kept.attend(given.query[:, 0]).unsqueeze(1)


def by_sdpa(given: Given, variation: Variation) -> Call:
    """Dot products of the same projections; causal by its flag, other masks made before, as small as they can be."""
    score, heads = given.score, given.case.heads
    causal = isinstance(variation.mask(given), regard.Causal)
    allowed = None if causal else variation.allowed(given, torch.arange(given.case.queries, device=given.query.device))
    if allowed is not None and allowed.dim() == 3:
        allowed = allowed.unsqueeze(1)

    def call() -> Tensor:
        query, key = score.project_query(given.query), score.project_key(given.key)
        value = given.value.unsqueeze(1)
        if heads > 1:
            return F.scaled_dot_product_attention(query, key, value.expand(-1, heads, -1, -1))
        query, key = query.unsqueeze(1), key.unsqueeze(1)  # with fewer than four dimensions it takes a slower path
        return F.scaled_dot_product_attention(query, key, value, allowed, is_causal=causal).squeeze(1)

    return call


def by_textbook(given: Given, variation: Variation) -> Call:
    """The textbook's class, which masks by lengths: where there is no mask, those of all keys."""
    mask, score, naive = variation.mask(given), given.score, Naive(1, 1, 1)
    assert isinstance(score, regard.Additive)
    naive.W_q, naive.W_k, naive.w_v = score.W_q, score.W_k, score.w_v
    lens = given.lens if isinstance(mask, regard.Lengths) else torch.full_like(given.lens, given.case.keys)
    return lambda: naive(given.query, given.key, given.value, lens)


def by_expression(given: Given, variation: Variation) -> Call:
    """(activation(q + k) · v).sum(-1): what graph libraries do on a dense graph, and compilers fuse best."""
    score, heads = given.score, given.case.heads
    assert isinstance(score, regard.Additive)
    activation = torch.tanh if score.activation == "tanh" else partial(F.leaky_relu, negative_slope=0.2)

    def call() -> Tensor:
        query, key = score.project_query(given.query), score.project_key(given.key)
        v, value = score.w_v.weight, given.value
        if heads > 1:
            v, value = v[:, None, None], value.unsqueeze(1)
        return torch.softmax((activation(query.unsqueeze(-2) + key.unsqueeze(-3)) * v).sum(-1), -1) @ value

    return call


def by_flex(given: Given, variation: Variation) -> Call:
    """FlexAttention of queries and keys of zeros: the sum over hidden units is what it is told to add to their product.

    To be compiled.
    """
    score, hidden = given.score, given.case.hidden
    assert isinstance(score, regard.Additive)

    def call() -> Tensor:
        a = score.project_query(given.query).permute(2, 0, 1).contiguous()  # a hidden unit's values lie side by side
        b = score.project_key(given.key).permute(2, 0, 1).contiguous()
        v = score.w_v.weight[0]

        def add(s: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            for h in range(hidden):
                s = s + v[h] * torch.tanh(a[h, batch, i] + b[h, batch, j])
            return s

        query, key = (x.new_zeros(len(x), 1, x.shape[1], 16) for x in (given.query, given.key))
        out = flex_attention(query, key, given.value.unsqueeze(1), score_mod=add)
        assert isinstance(out, Tensor)
        return out.squeeze(1)

    return call


def by_cdist(given: Given, variation: Variation) -> Call:
    def call() -> Tensor:
        query, key = given.score.project_query(given.query), given.score.project_key(given.key)
        return torch.softmax(-torch.cdist(query, key, p=1.0), -1) @ given.value

    return call


def by_dot_step(given: Given, variation: Variation) -> Call:
    """One query a sample against projected keys that were kept, transposed and with 1 / √hidden in them."""
    score, key = given.score, given.score.project_key(given.key).detach() / math.sqrt(given.case.hidden)
    key = key.mT.contiguous()  # the faster layout
    return lambda: torch.softmax(score.project_query(given.query) @ key, -1) @ given.value


def by_textbook_step(given: Given, variation: Variation) -> Call:
    """One query a sample against projected keys that were kept."""
    score, key = given.score, given.score.project_key(given.key).detach().unsqueeze(1)
    assert isinstance(score, regard.Additive)

    def call() -> Tensor:
        features = torch.tanh(score.W_q(given.query).unsqueeze(2) + key)
        return torch.softmax(score.w_v(features).squeeze(-1), -1) @ given.value

    return call


def by_location(given: Given, variation: Variation) -> Call:
    located = given.score
    assert isinstance(located, Located)
    score = regard.Additive(1, 1, 1)
    score.W_q, score.W_k, score.w_v = located.W_q, located.W_k, located.w_v
    kept, location = regard.Memory(score, given.key.detach(), given.value.detach()), located.location
    state = location.start(kept)._replace(weights=located.looked[:, 0], total=located.looked[:, 1])
    return lambda: location.step(given.query[:, 0], kept, state).context.unsqueeze(1)


def by_tacotron_step(given: Given, variation: Variation) -> Call:
    """The usual code: convolve and project where was looked, add, tanh, project, mask, softmax; projected keys kept."""
    located = given.score
    assert isinstance(located, Located)
    key, location = located.W_k(given.key).detach(), located.location
    last, total = located.looked.unbind(1)
    hidden = torch.zeros(given.case.batch, given.case.keys, dtype=torch.bool)

    def call() -> Tensor:
        moves = location.U(location.filters(torch.stack([last, total], 1)).transpose(1, 2))
        energies = located.w_v(torch.tanh(located.W_q(given.query) + moves + key)).squeeze(-1)
        weights = torch.softmax(energies.masked_fill(hidden, -math.inf), 1)
        return torch.bmm(weights.unsqueeze(1), given.value)

    return call


class Contestant(NamedTuple):
    kind: str
    ready: Callable[[Given, Variation], Call]


CONTESTANTS = {
    "regard": Contestant("regard", partial(by_regard, impl=IMPL)),
    "auto": Contestant("regard", partial(by_regard, impl="auto")),
    "regard alone": Contestant("regard", lambda given, variation: by_regard(projected(given), variation, IMPL)),
    "Memory": Contestant("regard", by_memory),
    "LocationSensitive": Contestant("regard", by_location),
    "SDPA": Contestant("dot products", by_sdpa),
    "SDPA alone": Contestant("dot products", lambda given, variation: by_sdpa(projected(given), variation)),
    "softmax(q·Kᵀ)·V": Contestant("dot products", by_dot_step),
    "textbook": Contestant("as written", by_textbook),
    "textbook step": Contestant("as written", by_textbook_step),
    "Tacotron 2 step": Contestant("as written", by_tacotron_step),
    "expression": Contestant("as written", by_expression),
    "cdist": Contestant("as written", by_cdist),
    "B": Contestant("regard", partial(by_regard, impl="gpu")),
    "E": Contestant("regard", partial(by_regard, impl="gpu")),
    "compiled textbook": Contestant("compiled", by_textbook),
    "compiled expression": Contestant("compiled", by_expression),
    "compiled Tacotron 2 step": Contestant("compiled", by_tacotron_step),
    "FlexAttention": Contestant("compiled", by_flex),
}


def parts(entry: str) -> tuple[Contestant, Variation]:
    name, _, variation = entry.partition(", ")
    return CONTESTANTS[name], VARIATIONS[variation]
