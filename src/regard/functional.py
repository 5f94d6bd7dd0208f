"""The front door: check the arguments, blank what nothing attends, project, lower to a Problem, choose, run.

Shapes: query (..., Lq, Dq), key (..., Lk, Dk), value (..., Lk, Dv); leading dimensions (batch first, then heads)
broadcast. A score with heads = h > 1 inserts a dimension of h before the last two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard import kernels
from regard.attended import Attended
from regard.dropout import Dropout
from regard.intervals import Grid, Intervals
from regard.masks import Mask, as_mask, broadcasts
from regard.normalizers import Normalizer, Softmax
from regard.problem import Indices, Problem
from regard.reference import FunctionPair
from regard.scores import ScaledDot, Score
from regard.transforms import autocasting
from regard.visible import blank, seeing_rows, seen_keys, shared_keys


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Score = ScaledDot(),
    mask: Mask | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    normalizer: Normalizer = Softmax(),
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Attention with any scoring function: out[i] = Σ_j p_ij v_j, p_i = softmax_j(score(q_i, k_j)).

    Args:
        query: (..., Lq, Dq).
        key: (..., Lk, Dk).
        value: (..., Lk, Dv). All three of one floating dtype and device.
        score: the scoring function; `regard.scores` has the textbook's.
        mask: a Mask, or bool (True = may attend) that broadcasts to (..., Lq, Lk), or None for every key.
        bias: added to the scores; broadcasts to (..., Lq, Lk); differentiable.
        normalizer: scores to weights.
        dropout_p: probability in 0 .. 1 of dropping a weight; pass 0 outside training.
        enable_gqa: allow fewer key-value heads (dimension −3) than query heads, each serving a group of them.
        impl: "auto", or "flex", "sdpa", "cpu", "gpu", "chunked" or "reference", which then runs or raises its reason.

    Returns:
        (..., Lq, Dv) in the values' dtype; 0 for a query that may attend nothing. Under autocast the inputs are
        cast to its dtype, as scaled_dot_product_attention's are.

    Raises:
        ValueError, TypeError: naming the argument, what was passed and what would fit.

    >>> query, key, value = torch.randn(2, 3, 20), torch.ones(2, 10, 2), torch.randn(2, 10, 4)
    >>> score = Additive(query_dim=20, key_dim=2, hidden_dim=8)
    >>> attend(query, key, value, score, Lengths(torch.tensor([2, 6]))).shape
    torch.Size([2, 3, 4])
    """
    problem = lower(query, key, value, score, mask, bias, normalizer, dropout_p, enable_gqa)
    out, _ = kernels.run(problem, impl)
    return out


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Score = ScaledDot(),
    mask: Mask | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    normalizer: Normalizer = Softmax(),
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    impl: str = "auto",
) -> Attended:
    """What `attend` computes, with a view of what it looked at; same arguments, same errors.

    >>> seen = attention(torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 4))
    >>> seen.out.shape, seen.weights(rows=[0]).shape, seen.entropy().shape
    (torch.Size([2, 3, 4]), torch.Size([2, 1, 5]), torch.Size([2, 3]))
    """
    problem = lower(query, key, value, score, mask, bias, normalizer, dropout_p, enable_gqa)
    out, lse = kernels.run(problem, impl)
    return Attended.of(problem, out, lse)


def weights(
    query: Tensor,
    key: Tensor,
    score: Score = ScaledDot(),
    mask: Mask | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    normalizer: Normalizer = Softmax(),
    enable_gqa: bool = False,
    rows: Indices | None = None,
) -> Tensor:
    """(..., Lq, Lk): how much each query (or each of `rows`) attends to each key, before dropout.

    In float32 for half precision inputs; arguments and errors as in `attend`.

    >>> weights(torch.zeros(1, 4), torch.randn(3, 4), mask=Lengths(2))
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    problem = lower(query, key, key[..., :0], score, mask, bias, normalizer, 0.0, enable_gqa)
    return kernels.scored(problem.select(rows, heads=None)).weights()


@dataclass(frozen=True)
class Explanation:
    """Which implementation `attend` would run, why not the others, and about how much memory it will need."""

    implementation: str
    refused: dict[str, str]
    memory_bytes: int
    formulation: str | None = None  # how, where the implementation has several ways: its name, why, and its error

    def __str__(self) -> str:
        lines = [f"{self.implementation}, about {self.memory_bytes / 2**20:.1f} MiB beyond inputs and outputs"]
        lines += [f"  by {self.formulation}"] if self.formulation else []
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.refused.items()])


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Score = ScaledDot(),
    mask: Mask | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    normalizer: Normalizer = Softmax(),
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    impl: str = "auto",
) -> Explanation:
    """Which implementation the same call of `attend` would run, and why not the others; inputs are only projected.

    >>> x = torch.randn(1, 4096, 64)
    >>> print(explain(x, x, x, mask=Window(128, 0)))
    chunked, about 20.0 MiB beyond inputs and outputs
      not flex: it runs on CUDA devices, not on the cpu
      not sdpa: rows with keys of their own would need a float mask of Lq × Lk
      not cpu: it computes additive and L1 scores only
      not gpu: it runs on NVIDIA GPUs, not on the cpu
    """
    with torch.random.fork_rng(devices=[]):  # the seed of a dropout that does not happen
        problem = lower(query, key, value, score, mask, bias, normalizer, dropout_p, enable_gqa)
    chosen = kernels.choose(problem, impl)
    reasons = {each.name: kernels.refusal(each, problem) for each in kernels.TABLE.values()}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    formulation = None if chosen.formulation is None else str(chosen.formulation(problem))
    return Explanation(chosen.name, refused, chosen.memory(problem), formulation)


def lower(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Score,
    mask: Mask | Tensor | None,
    bias: Tensor | None,
    normalizer: Normalizer,
    dropout_p: float,
    enable_gqa: bool,
) -> Problem:
    """Check, blank, project: from what a user says to what an implementation may see."""
    query, key, value = autocast(query), autocast(key), autocast(value)
    grid = _check(query, key, value, score, bias, normalizer, dropout_p, enable_gqa)
    query, key, value, intervals, keep, shared = blanked(query, key, value, mask, grid, score.heads > 1)
    query, key, pair = score.project_query(query), score.project_key(key), score.pair()
    if query.shape[-1] != key.shape[-1] and not isinstance(pair, FunctionPair):
        sizes = f"query is projected to size {query.shape[-1]} and key to size {key.shape[-1]}"
        raise ValueError(f"{sizes} by {score}; they must be the same")
    if score.heads > 1:
        value = value.unsqueeze(-3)
    return Problem(
        query=query,
        key=key,
        value=value,
        pair=pair,
        normalizer=normalizer,
        leading=grid.leading,
        intervals=intervals,
        keep=keep,
        shared=shared,
        bias=bias,
        dropout=Dropout.drawn(dropout_p),
    )


def blanked(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask | Tensor | None, grid: Grid, heads_to_come: bool
) -> tuple[Tensor, Tensor, Tensor, Intervals | None, Tensor | None, Tensor | None]:
    """The inputs with zeros where no pair looks, and the mask as a Problem's intervals, keep and shared.

    With heads to come, the last leading dimension of the grid is one that the inputs do not have yet.
    """
    intervals, keep, shared = None, None, None
    if mask is not None:
        intervals, keep = as_mask(mask).lower(grid)
    if intervals is not None or keep is not None or grid.keys == 0 or grid.queries == 0:
        shared = shared_keys(intervals, keep, grid)
        seen = seen_keys(intervals, keep, grid) if shared is None else shared
        if seen is not None:
            column = seen.mT
            key, value = blank(key, column, heads_to_come), blank(value, column, heads_to_come)
        query = blank(query, seeing_rows(intervals, keep, grid), heads_to_come)
    return query, key, value, intervals, keep, shared


# --- Arguments.


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Score,
    bias: Tensor | None,
    normalizer: Normalizer,
    dropout_p: float,
    enable_gqa: bool,
) -> Grid:
    """The grid of a call whose arguments fit one another; else ValueError or TypeError."""
    if not (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and isinstance(value, Tensor)
        and query.dtype.is_floating_point
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
        and query.dim() > 1
        and key.dim() > 1
        and value.dim() > 1
    ):
        check_tensors(query=query, key=key, value=value)
    check_settings(score, normalizer, dropout_p)
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"key has {key.shape[-2]} rows and value {value.shape[-2]} (shapes {tuple(key.shape)} and "
            f"{tuple(value.shape)}); each key needs one value"
        )
    leading = _leading(query, key, value, enable_gqa)
    if score.heads > 1 and enable_gqa:
        raise ValueError(f"enable_gqa is for heads of the inputs; this score makes {score.heads} heads of its own")
    if score.heads > 1:
        leading = (*leading, score.heads)
    grid = Grid(leading, query.shape[-2], key.shape[-2], query.device)
    if bias is not None:
        whole = (*leading, grid.queries, grid.keys)
        if not isinstance(bias, Tensor):
            raise TypeError(f"bias is a {type(bias).__name__}; it must be a Tensor")
        if not bias.is_floating_point():
            raise TypeError(f"bias has dtype {bias.dtype}; it must be a floating type (a bool belongs in mask)")
        if not broadcasts(bias.shape, whole):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it must broadcast to {whole}")
        if bias.device != grid.device:
            raise ValueError(f"bias is on {bias.device}; it must be on {grid.device}, as the query")
    return grid


def check_settings(score: Score, normalizer: Normalizer, dropout_p: float) -> None:
    """TypeError or ValueError where one of them is not what it must be."""
    if not hasattr(type(score), "project_query"):  # at a tenth of the cost of isinstance of an abstract class
        raise TypeError(f"score is {score!r}; it must be a Score, such as ScaledDot() or FunctionScore(function)")
    if isinstance(normalizer, type) or not callable(normalizer):
        raise TypeError(f"normalizer is {normalizer!r}; it must be a Normalizer, such as Softmax()")
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is {dropout_p!r}; it must be a number in 0 .. 1")


def check_tensors(**inputs: Tensor) -> None:
    """TypeError or ValueError where one is not (..., length, size) of a floating type, or not like the others."""
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; it must be a Tensor")
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}; it must be a floating type")
        if x.dim() < 2:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (..., length, size)")
    if len({(x.dtype, x.device) for x in inputs.values()}) > 1:
        *others, last = inputs
        found = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in inputs.items())
        raise ValueError(f"{', '.join(others)} and {last} must be of one dtype and on one device; they are {found}")


def _leading(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """What the leading dimensions broadcast to, grouped heads counted as the query's."""
    shapes = query.shape[:-2], key.shape[:-2], value.shape[:-2]
    if shapes[0] == shapes[1] == shapes[2]:
        return shapes[0]
    if enable_gqa:
        heads = [shape[-1] if shape else 0 for shape in shapes]
        if heads[1] != heads[2] or heads[1] < 1 or heads[0] % heads[1]:
            raise ValueError(
                f"enable_gqa needs as many key as value heads (dimension −3), dividing the query heads; query, key "
                f"and value have shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
            )
        shapes = tuple(shape[:-1] + shapes[0][-1:] for shape in shapes)
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise ValueError(
            f"query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}, "
            "whose leading dimensions do not broadcast"
            + ("" if enable_gqa else "; for fewer key-value heads pass enable_gqa=True")
        ) from None


def autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where that is on, as scaled_dot_product_attention casts its inputs; float64 stays."""
    if not isinstance(x, Tensor) or not autocasting(x) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
