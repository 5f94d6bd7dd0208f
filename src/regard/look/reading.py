"""Maps from files of arrays: NumPy's, PyTorch's and safetensors. Nothing in a file is ever executed."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from regard.look.maps import AttentionMap
from regard.look.saved import load

FORMATS = (".npy", ".npz", ".pt", ".pth", ".safetensors")
LIKELY = re.compile(r"attn|attention|weights", re.IGNORECASE)


def read(
    path: str | PathLike[str],
    *,
    weights: str | None = None,
    query: str | None = None,
    key: str | None = None,
    visible: str | None = None,
    scale: float | None = None,
) -> list[AttentionMap]:
    """The maps in a file: .npy, .npz, .pt, .pth, or .safetensors (what `regard.look.save` wrote, too).

    Args:
        path: the file.
        weights: name of the array of weights, (Lq, Lk), (H, Lq, Lk) or (B, H, Lq, Lk); `*` matches several, a map
            each. Not needed where one array is all there is, or has attn, attention or weights in its name.
        query: name of the queries (B, H, Lq, D), given instead of weights, together with the keys.
        key: name of the keys (B, H or fewer, Lk, D).
        visible: name of a bool array, True = may be attended, that broadcasts to the weights.
        scale: what q·k is multiplied by; None is 1/√D.

    Raises:
        ValueError: naming what is in the file, where it is broken or hostile, or has no such array.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and _is_ours(path):
        return load(path)
    arrays = _arrays(path)
    mask = None if visible is None else _as_bool(_named(arrays, visible, path), visible)
    if query is not None or key is not None:
        if query is None or key is None or weights is not None:
            raise ValueError("query and key go together, and instead of weights")
        q, k = (_named(arrays, name, path) for name in (query, key))
        for name, x in ((query, q), (key, k)):
            if not x.is_floating_point():
                raise ValueError(f"{name} has dtype {x.dtype}; queries and keys are of a floating type")
        return [AttentionMap.from_qk(q, k, path.stem, scale=scale, mask=mask)]
    names = _matching(arrays, weights, path)
    return [AttentionMap.from_weights(_checked(arrays[name], name), name, visible=mask) for name in names]


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return "regard" in (file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None


def _arrays(path: Path) -> dict[str, Tensor]:
    """Every array of a file, by name."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} is a {path.suffix or 'nameless'} file; {', '.join(FORMATS)} fit")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        if path.suffix in (".pt", ".pth"):
            return dict(_tensors_in(torch.load(path, map_location="cpu", weights_only=True), ""))
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            several = {path.stem: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
            numeric = {name: array for name, array in several.items() if array.dtype.kind in "biuf"}
            return {name: torch.from_numpy(x.astype(x.dtype.newbyteorder("="))) for name, x in numeric.items()}
    except UnpicklingError as error:
        said = str(error).partition("\n")[0]
        raise ValueError(f"{path} was not read, for it holds more than tensors, or is broken: {said}") from None
    except (ValueError, TypeError, RuntimeError, EOFError, KeyError, MemoryError, zipfile.BadZipFile) as error:
        said = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read as a {path.suffix} file: {said}") from None


def _tensors_in(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors in dicts, lists and tuples, named by the way to them."""
    if isinstance(value, Tensor):
        yield name or "tensor", value
    elif isinstance(value, Mapping | list | tuple):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for step, inner in pairs:
            yield from _tensors_in(inner, f"{name}.{step}" if name else str(step))


def _matching(arrays: dict[str, Tensor], pattern: str | None, path: Path) -> list[str]:
    if pattern is not None:
        names = [name for name in arrays if name == pattern or fnmatchcase(name, pattern)]
    elif len(arrays) == 1 or all(name.isdigit() for name in arrays):
        names = list(arrays)
    else:
        names = [name for name, x in arrays.items() if LIKELY.search(name) and x.is_floating_point() and x.dim() > 1]
    if not names:
        sought = "named attn, attention or weights" if pattern is None else f"{pattern!r}"
        raise ValueError(f"{path} has no array {sought}; it has {_contents(arrays)}")
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _named(arrays: dict[str, Tensor], name: str, path: Path) -> Tensor:
    if name not in arrays:
        raise ValueError(f"{path} has no array {name!r}; it has {_contents(arrays)}")
    return arrays[name]


def _as_bool(x: Tensor, name: str) -> Tensor:
    """A mask of bools, or of zeros and ones; one to be added to scores would say the opposite."""
    if x.dtype != torch.bool and not ((x == 0) | (x == 1)).all():
        raise ValueError(f"{name} has dtype {x.dtype}, and other values than 0 and 1; bools, True = visible, fit")
    return x.bool()


def _contents(arrays: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in arrays.items()) or "none"


def _checked(weights: Tensor, name: str) -> Tensor:
    """Weights as they are, unless they can be none."""
    if weights.dtype == torch.bool or not weights.is_floating_point():
        raise ValueError(f"{name} has dtype {weights.dtype}; weights are of a floating type")
    if weights.layout != torch.strided or weights.itemsize == 1:
        raise ValueError(f"{name} is {weights.dtype}, {weights.layout}; dense float16, bfloat16, 32 and 64 fit")
    low, high = (
        (weights.nan_to_num(0.0, torch.inf, -torch.inf).aminmax())
        if weights.numel()
        else (torch.zeros(()), torch.zeros(()))
    )
    if low < 0 or high == torch.inf:
        raise ValueError(
            f"{name} holds {low if low < 0 else high:.3g}, and weights are finite and at least 0; are these scores? "
            "Their softmax fits"
        )
    return weights
