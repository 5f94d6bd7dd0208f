"""The operators behind the kernels, `regard::attend`, `regard::scores`, `regard::shifted_scores` and
`regard::weighted`: schemas, shapes, derivatives.

A backend registers what computes them on its device. Their gradients are operators in turn, whose own derivatives
are the reference's. Tensors are (batch, heads, length, size); key and value may have fewer heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.dropout import Dropout
from regard.intervals import Bound, Diagonal, Interval, Intervals
from regard.normalizers import Softmax
from regard.problem import Problem, Shift, batch_heads
from regard.reference import AdditivePair, L1Pair, Pair, product, widened
from regard.transforms import transforming

LIBRARY = torch.library.Library("regard", "DEF")
_SIDES = "Tensor query, Tensor key, Tensor? v, str activation, float negative_slope"
_REST = (
    "Tensor value, Tensor? low, Tensor? high, Tensor? low2, Tensor? high2, SymInt[] offsets, int[] diagonals, "
    "Tensor? keep, Tensor? seed, float dropout_p, int first_row"
)
LIBRARY.define(f"attend({_SIDES}, {_REST}, Tensor? prepared) -> (Tensor out, Tensor lse)")
LIBRARY.define(
    f"attend_backward({_SIDES}, {_REST}, Tensor out, Tensor lse, Tensor grad_out, Tensor grad_lse, bool by_sides, "
    "bool by_value) -> (Tensor query, Tensor key, Tensor v, Tensor value)"
)
LIBRARY.define(f"scores({_SIDES}) -> Tensor")
LIBRARY.define(f"shifted_scores({_SIDES}, Tensor seen, Tensor weight, Tensor? filters) -> Tensor")
LIBRARY.define("weighted(Tensor weights, Tensor value) -> Tensor")
LIBRARY.define(f"scores_backward({_SIDES}, Tensor grad) -> (Tensor query, Tensor key, Tensor v)")


class Sides(NamedTuple):
    """What `scores` takes: the projections and their pair."""

    query: Tensor  # (B, H, Lq, D)
    key: Tensor  # (B, H / group, Lk, D)
    v: Tensor | None  # float32, (1, D) for all heads or (heads, D); None: the L1 pair
    activation: str
    negative_slope: float

    def pair(self) -> Pair:
        if self.v is None:
            return L1Pair()
        v = self.v if self.v.shape[0] == 1 else self.v[:, None, None]
        return AdditivePair(v, self.activation, self.negative_slope)


class Rest(NamedTuple):
    """What `attend` takes beside that."""

    value: Tensor  # (B, H / group, Lk, Dv)
    low: Tensor | None  # of the first interval: (B, H, Lq, 1) int64, or None for 0
    high: Tensor | None
    low2: Tensor | None  # of the second
    high2: Tensor | None
    offsets: Sequence[int]  # added to each of them, two for each interval,
    diagonals: Sequence[int]  # and, where this is 1, the number of the row
    keep: Tensor | None  # bool, (B, H, Lq, Lk)
    seed: Tensor | None
    dropout_p: float
    first_row: int

    @property
    def bounds(self) -> tuple[Tensor | None, ...]:
        return (self.low, self.high, self.low2, self.high2)[: len(self.offsets)]

    def intervals(self) -> Intervals | None:
        bounds: list[Bound] = []
        for tensor, offset, diagonal in zip(self.bounds, self.offsets, self.diagonals, strict=True):
            bounds.append(tensor if tensor is not None else Diagonal(offset) if diagonal else offset)
        return tuple(map(Interval, bounds[::2], bounds[1::2])) or None

    def dropout(self) -> Dropout | None:
        return None if self.seed is None else Dropout(self.dropout_p, self.seed, self.first_row)


def lowered(pair: Pair, query: Tensor, key: Tensor) -> Sides:
    """An additive or L1 pair of laid out projections."""
    if isinstance(pair, AdditivePair):
        slope = pair.negative_slope if pair.activation == "leaky_relu" else 0.0
        return Sides(query, key, pair.v.float().flatten(0, -2), pair.activation, slope)
    return Sides(query, key, None, "l1", 0.0)


def arguments(problem: Problem) -> tuple[Sides, Rest]:
    """A problem as `attend` takes it."""
    leading, dropout = _with_batch(problem.leading, problem.pair), problem.dropout
    grouped = leading
    if leading and problem.key.dim() > 2 and problem.key.shape[-3] != 1:
        grouped = (*leading[:-1], problem.key.shape[-3])
    bounds: list[Tensor | None] = []
    offsets: list[int] = []
    diagonals: list[int] = []
    for bound in (each for interval in problem.intervals or () for each in interval[:2]):
        if isinstance(bound, Tensor):
            bounds.append(batch_heads(bound.long().expand(*leading, problem.queries, 1), leading))
            offsets.append(0)
        else:
            bounds.append(None)
            offsets.append(bound.offset if isinstance(bound, Diagonal) else bound)
        diagonals.append(int(isinstance(bound, Diagonal)))
    low, high, low2, high2 = (*bounds, None, None, None, None)[:4]
    keep = problem.keep
    query, key = batch_heads(problem.query, leading), batch_heads(problem.key, grouped)
    return lowered(problem.pair, query, key), Rest(
        value=batch_heads(problem.value, grouped),
        low=low,
        high=high,
        low2=low2,
        high2=high2,
        offsets=offsets,
        diagonals=diagonals,
        keep=None if keep is None else batch_heads(keep.expand(*leading, problem.queries, problem.keys), leading),
        seed=None if dropout is None else dropout.seed,
        dropout_p=0.0 if dropout is None else dropout.p,
        first_row=0 if dropout is None else dropout.first_row,
    )


def attend(problem: Problem, prepared: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out (*leading, Lq, Dv) and log-sum-exp (*leading, Lq) of a problem, by the operator."""
    sides, rest = arguments(problem)
    out, lse = torch.ops.regard.attend.default(*sides, *rest, prepared)
    return out.reshape(*problem.leading, *out.shape[-2:]), lse.reshape(*problem.leading, lse.shape[-1])


def scores(pair: Pair, a: Tensor, b: Tensor) -> Tensor:
    """pair(a, b), by the operator."""
    leading = _leading(pair, a, b)
    laid = _with_batch(leading, pair)
    s = torch.ops.regard.scores.default(*lowered(pair, batch_heads(a, laid), batch_heads(b, laid)))
    return s.reshape(*leading, *s.shape[-2:])


def shifted_scores(shift: Shift, pair: Pair, a: Tensor, b: Tensor) -> Tensor:
    """pair(a, shift.of(b)) of an additive pair and one query a, by the operator."""
    leading = _leading(pair, a, b, shift.seen)
    laid = _with_batch(leading, pair)
    a, b, seen, weight = (batch_heads(x, laid) for x in (a, b, shift.seen, shift.weight))
    s = torch.ops.regard.shifted_scores.default(*lowered(pair, a, b), seen, weight, shift.filters)
    return s.reshape(*leading, *s.shape[-2:])


def weighted(weights: Tensor, value: Tensor) -> Tensor:
    """(..., 1, Dv) of one row of weights (..., 1, Lk) and values (..., Lk, Dv), by the operator."""
    leading = weights.shape[:-2]
    out = torch.ops.regard.weighted.default(batch_heads(weights, leading), batch_heads(value, leading))
    return out.reshape(*leading, 1, value.shape[-1])


def _leading(pair: Pair, *sides: Tensor) -> tuple[int, ...]:
    shapes = {x.shape[:-2] for x in sides}
    if isinstance(pair, AdditivePair) and pair.v.dim() > 2:
        shapes.add(pair.v.shape[:-3])
    return shapes.pop() if len(shapes) == 1 else torch.broadcast_shapes(*shapes)  # which takes longer than a small call


def _with_batch(leading: tuple[int, ...], pair: Pair) -> tuple[int, ...]:
    """The leading dimensions, and a batch of one where the only one there is counts the pair's own heads."""
    return (1, *leading) if len(leading) == 1 and isinstance(pair, AdditivePair) and pair.v.dim() > 2 else leading


class _Fused:
    """Makes a pair the operator's, which makes nothing of size Lq × Lk × D; its own under transforms."""

    fused = True

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        pair: Any = self
        return super().__call__(a, b) if transforming() else scores(pair, a, b)  # pyright: ignore[reportAttributeAccessIssue]


class FusedAdditivePair(_Fused, AdditivePair):
    """The additive pair by the operator."""


class FusedL1Pair(_Fused, L1Pair):
    """The L1 pair by the operator."""


# --- Shapes.


def split(given: Sequence[Any]) -> tuple[Sides, Rest]:
    """The arguments that all operators on values begin with."""
    sides = len(Sides._fields)
    return Sides(*given[:sides]), Rest(*given[sides : sides + len(Rest._fields)])


@torch.library.register_fake("regard::attend", lib=LIBRARY)
def _(*given: Any) -> tuple[Tensor, Tensor]:
    sides, rest = split(given)
    rows = sides.query.shape[:-1]
    return rest.value.new_empty(*rows, rest.value.shape[-1]), sides.query.new_empty(rows, dtype=torch.float32)


@torch.library.register_fake("regard::attend_backward", lib=LIBRARY)
def _(*given: Any) -> tuple[Tensor, ...]:
    sides, rest = split(given)
    by_sides, by_value = given[-2:]
    return *gradients_of(sides, by_sides), gradient_of(rest.value, by_value)


@torch.library.register_fake("regard::scores", lib=LIBRARY)
def _(*given: Any) -> Tensor:
    sides = Sides(*given)
    return sides.query.new_empty(*sides.query.shape[:-1], sides.key.shape[-2], dtype=torch.float32)


@torch.library.register_fake("regard::shifted_scores", lib=LIBRARY)
def _(*given: Any) -> Tensor:
    sides = Sides(*given[:-3])
    return sides.query.new_empty(*sides.query.shape[:-1], sides.key.shape[-2], dtype=torch.float32)


@torch.library.register_fake("regard::weighted", lib=LIBRARY)
def _(weights: Tensor, value: Tensor) -> Tensor:
    return value.new_empty(*weights.shape[:-1], value.shape[-1])


@torch.library.register_fake("regard::scores_backward", lib=LIBRARY)
def _(*given: Any) -> tuple[Tensor, ...]:
    return gradients_of(Sides(*given[:-1]), True)


def gradients_of(sides: Sides, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Where the gradients of query, key and v go."""
    v = sides.query.new_empty(0, dtype=torch.float32) if sides.v is None else sides.v
    return gradient_of(sides.query, wanted), gradient_of(sides.key, wanted), gradient_of(v, wanted)


def gradient_of(x: Tensor, wanted: bool) -> Tensor:
    """Where the gradient of x goes: of no size if it is not wanted."""
    return x.new_empty(x.shape if wanted else 0)


# --- Derivatives. Each operator calls itself again below autograd, and saves all it was given.


class Saving(torch.autograd.Function):
    """An operator whose inputs are kept for its derivative, and its results if that wants them."""

    operator: Any
    wants_results = False

    @classmethod
    def call(cls, *given: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given):
            return cls.apply(*given)
        with torch._C._AutoDispatchBelowAutograd():
            return cls.operator(*given)

    @classmethod
    def forward(cls, ctx: Any, *given: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            results = cls.operator(*given)
        ctx.plain = [None if isinstance(x, Tensor) else x for x in given]
        tensors = [x if isinstance(x, Tensor) else None for x in given]
        ctx.save_for_backward(*tensors, *(results if cls.wants_results else ()))
        return results

    @staticmethod
    def saved(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
        """What the operator was given, and its results."""
        saved, count = ctx.saved_tensors, len(ctx.plain)
        given = [plain if tensor is None else tensor for plain, tensor in zip(ctx.plain, saved, strict=False)]
        return given, saved[count:]


class _Attend(Saving):
    operator = torch.ops.regard.attend.default
    wants_results = True

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given, results = _Attend.saved(ctx)
        sides, rest = split(given)
        needed = dict(zip((*Sides._fields, *Rest._fields), ctx.needs_input_grad, strict=False))
        by_sides = needed["query"] or needed["key"] or needed["v"]
        query, key, v, value = _AttendBackward.call(*sides, *rest, *results, *grads, by_sides, needed["value"])
        found = {"query": query, "key": key, "v": v, "value": value}
        return *(found.get(name) if need else None for name, need in needed.items()), None


class _AttendBackward(Saving):
    operator = torch.ops.regard.attend_backward.default

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        given, _ = _AttendBackward.saved(ctx)
        sides, rest = split(given)
        grad_out, grad_lse, by_sides, by_value = given[-4:]

        def compute(query: Tensor, key: Tensor, v: Tensor | None, value: Tensor) -> tuple[Tensor, Tensor]:
            pair = sides._replace(v=v).pair()
            problem = Problem(query, key, value, pair, Softmax(), query.shape[:-2], rest.intervals(), rest.keep)
            problem = problem._replace(dropout=rest.dropout())
            return problem.attend(), problem.log_sum_exp().squeeze(-1)

        wanted = (by_sides, by_sides, by_sides, by_value)
        inputs = (sides.query, sides.key, sides.v, rest.value)
        query, key, v, value, grad_out, grad_lse = of_gradients(
            compute, inputs, (grad_out, grad_lse), wanted, cotangents
        )
        blanks = [None] * (len(given) - 10)
        return query, key, v, None, None, value, *blanks, grad_out, grad_lse, None, None


class _Scores(Saving):
    operator = torch.ops.regard.scores.default

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given, _ = _Scores.saved(ctx)
        found = _ScoresBackward.call(*given, *grads)
        return *(x if need else None for x, need in zip(found, ctx.needs_input_grad, strict=False)), None, None


class _ShiftedScores(Saving):
    """Its derivative moves all keys at once; of a step is kept for it what was seen."""

    operator = torch.ops.regard.shifted_scores.default

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given, _ = _ShiftedScores.saved(ctx)
        sides, shift = Sides(*given[:-3]), Shift(*given[-3:])
        by_query, by_key, by_v, _, _, *by_shift = ctx.needs_input_grad
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views, so that no way leads from what was seen to filters of earlier steps.
            shift = shift.each(lambda x: x.view_as(x))
            key = shift.each(widened).of(widened(sides.key))
        leaves = [x for x, need in zip(shift, by_shift, strict=True) if need and x is not None]
        query, moved, v = _ScoresBackward.call(*sides._replace(key=key), *grads)
        moves = iter(torch.autograd.grad(key, leaves, moved, create_graph=create_graph) if leaves else ())
        return (
            query if by_query else None,
            moved.to(sides.key.dtype) if by_key else None,
            v if by_v else None,
            None,
            None,
            *(next(moves) if need else None for need in by_shift),
        )


class _Weighted(Saving):
    operator = torch.ops.regard.weighted.default

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weights, value), _ = _Weighted.saved(ctx)
        by_weights, by_value = ctx.needs_input_grad
        return (
            product(grads[0], value.mT) if by_weights else None,
            product(weights.mT, grads[0]) if by_value else None,
        )


class _ScoresBackward(Saving):
    operator = torch.ops.regard.scores_backward.default

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        *given, grad = _ScoresBackward.saved(ctx)[0]
        sides = Sides(*given)

        def compute(query: Tensor, key: Tensor, v: Tensor | None) -> tuple[Tensor]:
            return (sides._replace(v=v).pair()(query, key),)

        query, key, v, grad = of_gradients(compute, sides[:3], (grad,), (True,) * 3, cotangents)
        return query, key, v, None, None, grad


def of_gradients(
    compute: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    wanted: Sequence[bool],
    cotangents: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """The gradients, by inputs and grads, of Σ cotangents · (gradients of compute(*inputs) by the wanted inputs)."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [
            None if x is None else x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            for x in (*inputs, *grads)
        ]
        results = compute(*leaves[: len(inputs)])
        by = [(x, cotangent) for x, want, cotangent in zip(leaves, wanted, cotangents, strict=False) if want]
        by = [(x, cotangent) for x, cotangent in by if x is not None]
        present = [x for x in leaves if x is not None]
        first = torch.autograd.grad(
            results, [x for x, _ in by], present[-len(grads) :], create_graph=True, materialize_grads=True
        )
        found = iter(
            torch.autograd.grad(first, present, [c for _, c in by], create_graph=create_graph, allow_unused=True)
        )
    return tuple(None if x is None else next(found) for x in leaves)


# --- Registration.


def _one_by_one(operator: Any) -> Callable[..., Any]:
    """vmap of an operator, as a loop."""

    def rule(info: Any, in_dims: Sequence[Any], *given: Any) -> tuple[Any, Any]:
        results = [
            operator(*(x.select(dim, n) if type(dim) is int else x for x, dim in zip(given, in_dims, strict=True)))
            for n in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


def register(function: type[Saving]) -> None:
    """Makes an operator's derivative and vmap known."""
    LIBRARY.impl(function.operator, function.call, "Autograd")
    torch.library.register_vmap(function.operator, _one_by_one(function.operator), lib=LIBRARY)


for _each in (_Attend, _AttendBackward, _Scores, _ShiftedScores, _Weighted, _ScoresBackward):
    register(_each)
