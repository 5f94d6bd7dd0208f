"""Additive and L1 attention on the CPU, by the C library that is built of csrc/: exact, and in linear memory.

The library is optional: without it this implementation refuses, and says why.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import partial
from importlib.resources import files
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.kernels import ops
from regard.normalizers import Softmax
from regard.problem import Problem, Shift
from regard.reference import AdditivePair, L1Pair, Pair, product, widened
from regard.transforms import transforming

NAME = {"win32": "regard_kernels.dll", "darwin": "libregard_kernels.dylib"}.get(sys.platform, "libregard_kernels.so")
LEVELS = ("baseline", "avx2", "avx512")
PAIRS = {"tanh": 0, "sigmoid": 1, "relu": 2, "leaky_relu": 2, "l1": 3}  # as in csrc/regard.h
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def refuses(problem: Problem) -> str | None:
    if type(problem.normalizer) is not Softmax:
        return f"it normalizes by softmax, not {type(problem.normalizer).__name__}"
    if problem.bias is not None:
        return "it adds no bias to the scores"
    if problem.value.dtype not in DTYPES:
        return f"it computes in float32, not {problem.value.dtype}"
    return refuses_scores(problem)


def refuses_scores(problem: Problem) -> str | None:
    """Why it will not compute the bare scores."""
    if LIBRARY is None:
        return "its C++ library is not installed: no compiler worked when regard was"
    if torch.compiler.is_exporting():
        return "a program that is exported is to run without regard"
    if type(problem.pair) not in (AdditivePair, L1Pair):
        return "it computes additive and L1 scores only"
    if problem.query.device.type != "cpu":
        return f"it runs on the CPU, not on {problem.query.device.type}"
    if problem.query.dtype not in DTYPES:
        return f"it computes in float32, not {problem.query.dtype}"
    if problem.query.shape[-1] == 0:
        return "there is nothing to compare"
    return None


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    return ops.attend(problem, problem.prepared)


def memory(problem: Problem) -> int:
    """Of backward, which needs more: the keys and their gradients laid out anew, and the values'."""
    key, value = problem.key, problem.value
    return 4 * (3 * key.numel() + 2 * value.numel()) + 2**20


def scored(problem: Problem) -> Problem:
    """The problem with its scores computed here, if it is one of those."""
    if refuses_scores(problem) is not None:
        return problem
    pair = problem.pair
    fused = ops.FusedAdditivePair(*pair) if isinstance(pair, AdditivePair) else ops.FusedL1Pair()
    return problem._replace(pair=fused)


def refuses_shifted(problem: Problem, shift: Shift) -> str | None:
    """Why it will not compute the bare scores of keys while it moves them."""
    if type(problem.pair) is not AdditivePair:
        return "it moves keys for additive scores only"
    if problem.queries != 1:
        return f"it moves keys for one query, not for {problem.queries}"
    if shift.weight.shape[-1] == 0:
        return "there is nothing to move keys by"
    for x in shift:
        if x is not None and x.dtype not in DTYPES:
            return f"it computes in float32, not {x.dtype}"
    if transforming():
        return "under torch.func transforms and forward-mode AD only the reference is differentiated rightly"
    return refuses_scores(problem)


def shifted(problem: Problem, shift: Shift) -> Problem:
    """The problem of moved keys, its scores computed here, if it is one of those."""
    if refuses_shifted(problem, shift) is not None:
        return scored(problem._replace(key=shift.of(problem.key), prepared=None))
    return problem._replace(pair=partial(ops.shifted_scores, shift, problem.pair))


def takes(*tensors: Tensor) -> bool:
    """Whether the operators that take float32 alone take these; a program that is exported is to run without regard."""
    return (
        LIBRARY is not None
        and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
        and not torch.compiler.is_exporting()
        and not transforming()
    )


def weighted(weights: Tensor, value: Tensor) -> Tensor:
    """weights @ value, in float32 at least, and by the operator where there is one row of weights and much to read."""
    if weights.shape[-2] == 1 and value.numel() >= 2**16 and takes(weights, value):
        return ops.weighted(weights, value)
    value = widened(value)
    return product(weights.to(value.dtype), value)


# --- The library.


_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _fields(*of_a_kind: tuple[type, str]) -> list[tuple[str, type]]:
    return [(name, kind) for kind, names in of_a_kind for name in names.split()]


class _Tensor(ctypes.Structure):
    _fields_ = _fields((_P, "data"), (_I, "outer inner row column dtype"))


class _Bound(ctypes.Structure):
    _fields_ = _fields((_P, "data"), (_I, "outer inner row offset slope"))


class _Problem(ctypes.Structure):
    """struct regard_problem of csrc/regard.h."""

    _fields_ = _fields(
        (_I, "pair"),
        (_F, "negative_slope"),
        (_I, "outer inner group queries keys hidden width v_heads"),
        (_P, "v"),
        (_Tensor, "query key value out"),
        (_P, "lse prepared"),
        (_I, "prepared_outer prepared_inner intervals"),
        (_Bound * 2, "low high"),
        (_P, "keep"),
        (_I, "keep_outer keep_inner keep_row keep_column"),
        (_P, "seed"),
        (_I, "first_row"),
        (ctypes.c_uint64, "dropped_below"),
        (_F, "kept_factor"),
        (_P, "scores"),
        (_I, "channels"),
        (_Tensor, "weight seen"),
        (_P, "filters"),
        (_I, "seen_channels taps"),
        (_P, "grad_out grad_lse grad_scores grad_query grad_key grad_value grad_v"),
    )


def load(path: Path) -> ctypes.CDLL:
    """The library at path, on torch's threads where this torch says how to come by them.

    ImportError where it was built of other sources than these.
    """
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "regard_problem_size") or library.regard_problem_size() != ctypes.sizeof(_Problem):
        raise ImportError(f"{path} was built of other sources than regard's here; install regard again")
    library.regard_level_name.restype = ctypes.c_char_p
    library.regard_prepared_count.restype = ctypes.c_int64
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
    if hasattr(torch_cpu, "torch_parallel_for") and hasattr(torch_cpu, "torch_get_num_threads"):
        library.regard_use_threads(torch_cpu.torch_parallel_for, torch_cpu.torch_get_num_threads)
    if hasattr(os, "register_at_fork"):  # threads are not there in a child, whose first parallel region would hang
        os.register_at_fork(after_in_child=lambda: library.regard_set_serial(1))
    return library


def find() -> Path | None:
    """Where the library is installed, if it is."""
    path = Path(str(files("regard.kernels") / NAME))
    return path if path.is_file() else None


LIBRARY = None if (_path := find()) is None else load(_path)


def level(force: str | None = None) -> str:
    """The instruction set in use, of LEVELS; after `force`, the lower of that and the processor's best."""
    library = installed()
    if force is not None:
        library.regard_set_level(LEVELS.index(force))
    return library.regard_level_name().decode()


def paths() -> tuple[int, int, int]:
    """How many groups of hidden units, in how many tiles, ran fast, capped and directly so far: see csrc/pairs.hpp."""
    fast, capped, direct = ctypes.c_int64(), ctypes.c_int64(), ctypes.c_int64()
    installed().regard_paths(ctypes.byref(fast), ctypes.byref(capped), ctypes.byref(direct))
    return fast.value, capped.value, direct.value


# --- The operators.


def _attend(*given: Any) -> tuple[Tensor, Tensor]:
    sides, rest = ops.split(given)
    prepared = given[-1]
    out = rest.value.new_empty(*sides.query.shape[:-1], rest.value.shape[-1])
    lse = torch.empty(sides.query.shape[:-1])
    problem = _problem(sides, rest)
    problem.out, problem.lse = _tensor(out), lse.data_ptr()
    if prepared is not None:
        problem.prepared = prepared.data_ptr()
        problem.prepared_outer, problem.prepared_inner = prepared.stride()[:2]
    _call("regard_forward", problem)
    return out, lse


def _attend_backward(*given: Any) -> tuple[Tensor, ...]:
    sides, rest = ops.split(given)
    out, lse, grad_out, grad_lse, by_sides, by_value = given[-6:]
    grad_out, grad_lse = grad_out.float().contiguous(), grad_lse.contiguous()
    problem = _problem(sides, rest)
    problem.out, problem.lse = _tensor(out), lse.data_ptr()
    problem.grad_out, problem.grad_lse = grad_out.data_ptr(), grad_lse.data_ptr()
    return _gradients(problem, sides, rest.value, by_sides, by_value)


def _scores(*given: Any) -> Tensor:
    sides = ops.Sides(*given)
    scores = torch.empty(*sides.query.shape[:-1], sides.key.shape[-2])
    problem = _problem(sides)
    problem.scores = scores.data_ptr()
    _call("regard_scores", problem)
    return scores


def _scores_backward(*given: Any) -> tuple[Tensor, ...]:
    sides, grad = ops.Sides(*given[:-1]), given[-1].float().contiguous()
    if not grad.numel():
        grad = torch.empty(1)  # somewhere to point to, which says that these are gradients of scores
    problem = _problem(sides)
    problem.grad_scores = grad.data_ptr()
    return _gradients(problem, sides, sides.key[..., :0], True, False)[:3]


def _shifted_scores(*given: Any) -> Tensor:
    sides, (seen, weight, filters) = ops.Sides(*given[:-3]), given[-3:]
    scores = torch.empty(*sides.query.shape[:-1], sides.key.shape[-2])
    problem = _problem(sides)
    problem.channels, problem.weight, problem.seen = weight.shape[-1], _tensor(weight), _tensor(seen)
    if filters is not None:
        filters = filters.float().contiguous()
        problem.filters, (_, problem.seen_channels, problem.taps) = filters.data_ptr(), filters.shape
    problem.scores = scores.data_ptr()
    _call("regard_shifted_scores", problem)
    return scores


def _weighted(weights: Tensor, value: Tensor) -> Tensor:
    weights, out = weights.contiguous(), value.new_empty(*weights.shape[:-1], value.shape[-1])
    problem = _Problem()
    problem.outer, problem.inner, problem.queries, problem.keys = weights.shape
    problem.group, problem.width = max(1, weights.shape[1] // max(1, value.shape[1])), value.shape[-1]
    problem.scores, problem.value, problem.out = weights.data_ptr(), _tensor(value), _tensor(out)
    _call("regard_read", problem)
    return out


def prepare(pair: Pair, key: Tensor, room: int = 0, prepared: Tensor | None = None, first: int = 0) -> Tensor:
    """(B, H, size): projected keys (B, H, Lk, D) as the kernels read them, with room for so many keys.

    What earlier keys were prepared in is written to, from key `first` on, where it has the room.
    """
    sides = ops.lowered(pair, key, key)
    problem = _problem(sides)
    problem.keys = max(room, key.shape[2])
    size = installed().regard_prepared_count(ctypes.byref(problem))
    problem.keys = key.shape[2]
    if prepared is None or prepared.shape[2] < size:
        prepared, first = torch.empty(*key.shape[:2], size), 0
    problem.prepared = prepared.data_ptr()
    problem.prepared_outer, problem.prepared_inner = prepared.stride()[:2]
    _call("regard_prepare", problem, ctypes.c_int64(first))
    return prepared


def _gradients(
    problem: _Problem, sides: ops.Sides, value: Tensor, by_sides: bool, by_value: bool
) -> tuple[Tensor, ...]:
    """Of query, key, v and value: each summed over what shares it, in its own dtype."""
    batch, heads = sides.query.shape[:2]
    v = torch.empty(0, 0) if sides.v is None else sides.v
    inputs = {"query": sides.query, "key": sides.key, "v": v, "value": value}
    wanted = {"query": by_sides, "key": by_sides, "v": by_sides, "value": by_value}
    each = {
        name: torch.empty(batch, heads, *x.shape[2 if x.dim() == 4 else 1 :])
        for name, x in inputs.items()
        if wanted[name]
    }
    for name, gradient in each.items():
        if gradient.numel():
            setattr(problem, f"grad_{name}", gradient.data_ptr())
    _call("regard_backward", problem)

    def summed(name: str, x: Tensor) -> Tensor:
        if not wanted[name]:
            return x.new_empty(0)
        gradient = each[name]
        if name == "v":
            gradient = gradient.sum(0).unflatten(0, (-1, len(v))).sum(0) if v.numel() else gradient.new_empty(0)
        elif x.shape[1] != heads:
            gradient = gradient.unflatten(1, (x.shape[1], -1)).sum(2)
        return gradient.to(x.dtype)

    return tuple(summed(name, x) for name, x in inputs.items())


def _problem(sides: ops.Sides, rest: ops.Rest | None = None) -> _Problem:
    query, key, v = sides.query, sides.key, sides.v
    problem = _Problem()
    problem.pair, problem.negative_slope = PAIRS[sides.activation], sides.negative_slope
    problem.outer, problem.inner, problem.queries, problem.hidden = query.shape
    problem.keys, problem.group = key.shape[2], max(1, query.shape[1] // max(1, key.shape[1]))
    problem.query, problem.key = _tensor(query), _tensor(key)
    if v is not None:
        problem.kept = v.contiguous()  # an attribute of the object, which lives as long as it is pointed into
        problem.v, problem.v_heads = problem.kept.data_ptr(), v.shape[0]
    if rest is None:
        return problem
    problem.value, problem.width = _tensor(rest.value), rest.value.shape[-1]
    problem.intervals = len(rest.offsets) // 2
    for n, (bound, offset, diagonal) in enumerate(zip(rest.bounds, rest.offsets, rest.diagonals, strict=True)):
        side = problem.high if n % 2 else problem.low
        pointer, strides = (None, (0, 0, 0)) if bound is None else (bound.data_ptr(), bound.stride()[:3])
        side[n // 2] = _Bound(pointer, *strides, offset, diagonal)
    if rest.keep is not None:
        problem.keep = rest.keep.data_ptr()
        problem.keep_outer, problem.keep_inner, problem.keep_row, problem.keep_column = rest.keep.stride()
    if rest.seed is not None:
        problem.seed, problem.first_row = rest.seed.data_ptr(), rest.first_row
        problem.dropped_below = ceil(rest.dropout_p * 2**32)
        problem.kept_factor = 1 / (1 - rest.dropout_p) if rest.dropout_p < 1 else 0.0
    return problem


def _tensor(x: Tensor) -> _Tensor:
    return _Tensor(x.data_ptr(), *x.stride(), DTYPES[x.dtype])


def installed() -> ctypes.CDLL:
    if LIBRARY is None:
        raise RuntimeError("the C++ library of regard is not installed")
    return LIBRARY


def _call(name: str, problem: _Problem, *more: ctypes.c_int64) -> None:
    if getattr(installed(), name)(ctypes.byref(problem), *more):
        raise MemoryError(f"{name} found no memory to work in")


ops.LIBRARY.impl("attend", _attend, "CPU")
ops.LIBRARY.impl("attend_backward", _attend_backward, "CPU")
ops.LIBRARY.impl("scores", _scores, "CPU")
ops.LIBRARY.impl("scores_backward", _scores_backward, "CPU")
ops.LIBRARY.impl("shifted_scores", _shifted_scores, "CPU")
ops.LIBRARY.impl("weighted", _weighted, "CPU")
