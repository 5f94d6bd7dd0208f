"""Maps in files: what was recorded once is looked at later, or elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regard import reference
from regard.files import replacing
from regard.intervals import Bound, Diagonal, Interval
from regard.look.maps import AttentionMap, Scores, Summary, Weights
from regard.look.stats import Statistics
from regard.normalizers import Entmax15, Sigmoid, Softmax, Sparsemax
from regard.problem import Problem

_KNOWN = (reference.DotPair, reference.AdditivePair, reference.L1Pair, reference.L2Pair)
_PAIRS = {pair.__name__: pair for pair in _KNOWN}
_NORMALIZERS = {normalizer.__name__: normalizer for normalizer in (Softmax, Sparsemax, Entmax15, Sigmoid)}


def save(maps: AttentionMap | Iterable[AttentionMap], path: str | PathLike[str]) -> None:
    """Write maps to a safetensors file; `load` reads them as they were.

    ValueError for a scoring function or normalizer of the user's own, which no file can hold: save its weights.
    """
    maps = [maps] if isinstance(maps, AttentionMap) else list(maps)
    tensors: dict[str, Tensor] = {}
    described = [_describe(each, f"{n}.", tensors) for n, each in enumerate(maps)]
    with replacing(Path(path)) as part:
        save_file(
            {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()},
            part,
            {"regard": json.dumps(described)},
        )


def load(path: str | PathLike[str]) -> list[AttentionMap]:
    """The maps that `save` wrote; ValueError for a file that it did not write."""
    try:
        with safe_open(path, "pt") as file:
            described = json.loads((file.metadata() or {}).get("regard", "null"))
            if described is None:
                raise ValueError(f"{path} holds no maps of regard; {', '.join(file.keys())} are in it")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} holds no maps of regard: {error}") from None
    try:
        if not isinstance(described, list):
            raise TypeError(f"its description is {type(described).__name__}")
        return [_described(each, f"{n}.", tensors) for n, each in enumerate(described)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} holds no maps of regard, or not all of them: {error!r}") from error


def _describe(each: AttentionMap, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What of a map is no tensor, as JSON; its tensors are added to `tensors`."""

    def put(**named: Tensor | None) -> None:
        tensors.update({prefix + name: x for name, x in named.items() if x is not None})

    fields = ("name", "kind", "key_heads", "error", "query_tokens", "key_tokens")
    said: dict[str, Any] = {name: getattr(each, name) for name in fields}
    match each.kept:
        case Weights(weights, visible):
            put(weights=weights, visible=visible)
        case Summary(stats, thumbnail, shape):
            put(thumbnail=thumbnail, **stats._asdict())
            said["shape"] = shape
        case Scores(problem, lse):
            pair, normalizer = problem.pair, type(problem.normalizer).__name__
            if not isinstance(pair, _KNOWN) or normalizer not in _NORMALIZERS:
                of = f"{type(pair).__name__} and {normalizer}"
                raise ValueError(f"{each.name!r} is of {of}; save AttentionMap.from_weights instead")
            put(query=problem.query, key=problem.key, keep=problem.keep, bias=problem.bias, lse=lse)
            settings = pair._asdict()
            put(v=settings.pop("v", None))
            said.update(pair=type(pair).__name__, settings=settings, normalizer=normalizer)
            if problem.intervals is not None:
                said["intervals"] = []
                for n, interval in enumerate(problem.intervals):
                    for name, bound in (("low", interval.low), ("high", interval.high)):
                        if isinstance(bound, Tensor):
                            put(**{f"{name}{n}": bound})
                    said["intervals"].append([_bound_as_json(interval.low), _bound_as_json(interval.high)])
    return said


def _bound_as_json(bound: Bound) -> int | list[int] | None:
    return None if isinstance(bound, Tensor) else [bound.offset] if isinstance(bound, Diagonal) else bound


def _described(said: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> AttentionMap:
    """The map of a description and its tensors."""

    def get(name: str) -> Tensor | None:
        return tensors.get(prefix + name)

    def bound(number: int | list[int] | None, name: str) -> Bound:
        return tensors[prefix + name] if number is None else Diagonal(number[0]) if isinstance(number, list) else number

    if "pair" in said:
        query, key = tensors[prefix + "query"], tensors[prefix + "key"]
        settings = said["settings"] if get("v") is None else {"v": get("v"), **said["settings"]}
        intervals = None
        if "intervals" in said:
            intervals = tuple(
                Interval(bound(low, f"low{n}"), bound(high, f"high{n}"))
                for n, (low, high) in enumerate(said["intervals"])
            )
        problem = Problem(
            query,
            key,
            key[..., :0],
            _PAIRS[said["pair"]](**settings),
            _NORMALIZERS[said["normalizer"]](),
            (query.shape[0], query.shape[1]),
            intervals,
            get("keep"),
            bias=get("bias"),
        )
        kept = Scores(problem, get("lse"))
    elif "shape" in said:
        stats = Statistics(**{name: tensors[prefix + name] for name in Statistics._fields})
        kept = Summary(stats, tensors[prefix + "thumbnail"], tuple(said["shape"]))
    else:
        kept = Weights(tensors[prefix + "weights"], get("visible"))
    tokens = (None if (each := said[side]) is None else tuple(each) for side in ("query_tokens", "key_tokens"))
    return AttentionMap(said["name"], kept, said["kind"], said["key_heads"], said["error"], *tokens)
