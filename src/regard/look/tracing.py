"""What is known of tensors while a model runs: products of queries and keys, softmaxes, sources; and masks.

Tensors are followed by the memory they view, so that views of all kinds need no rule. The tables at the end say what
operators make of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from regard.masks import Keep, Lengths, Mask

MASKED = -9e3  # scores from here down hide a key; of the constants in use BERT's −10000, in bfloat16, is the nearest
COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
Kind = Literal["self", "cross"]
T = TypeVar("T")
aten = torch.ops.aten


class Known(Generic[T]):
    """Facts about tensors, by the memory they view; forgotten when that is freed."""

    def __init__(self) -> None:
        self.facts: dict[int, tuple[StorageWeakRef, T]] = {}
        self.limit = 1

    def get(self, x: Tensor) -> T | None:
        fact = None if opaque(x) else self.facts.get(x.untyped_storage()._cdata)
        return None if fact is None else fact[1]

    def put(self, x: Tensor, fact: T | None) -> None:
        if opaque(x):
            return
        storage = x.untyped_storage()
        if fact is None:
            self.facts.pop(storage._cdata, None)
            return
        if len(self.facts) >= self.limit:
            self.facts = {address: each for address, each in self.facts.items() if not each[0].expired()}
            self.limit = 2 * len(self.facts) + 1
        self.facts[storage._cdata] = StorageWeakRef(storage), fact


class Product(NamedTuple):
    """Scores scale · query keyᵀ + added, but for what is masked."""

    query: Tensor  # (N, Lq, D) or (Lq, D)
    key: Tensor
    scale: float
    added: tuple[Tensor, ...] = ()  # each of the scores' shape
    plain: bool = True  # else something more was done to the scores

    def whole(self, scores: Tensor) -> bool:
        """Whether these are all of the scores, in their order."""
        keys = self.key.shape[-2]
        rows = self.query.shape[:-1].numel()
        return scores.is_contiguous() and scores.shape[-1:] == (keys,) and scores.numel() == rows * keys

    def makes(self, shape: tuple[int, int, int, int]) -> bool:
        """Whether its parts can be laid out as weights (B, H, Lq, Lk)."""
        rows, keys = (x if x.dim() == 3 else x.unsqueeze(0) for x in (self.query, self.key))
        fits = rows.shape[:2] == (shape[0] * shape[1], shape[2]) and keys.shape[:2] == (len(rows), shape[3])
        return self.plain and fits and all(each.shape[-2:] == shape[2:] for each in self.added)

    def by_heads(self, batch: int, heads: int, visible: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Query (B, H, Lq, D), key (B, H, Lk, D) and bias, 0 where nothing is visible."""

        def laid(x: Tensor) -> Tensor:
            if x.dim() < 4:
                return (x if x.dim() == 3 else x.unsqueeze(0)).unflatten(0, (batch, heads))
            return x.flatten(1, -3)

        bias = None
        for each in self.added:
            each = narrowed(laid(each))
            bias = each if bias is None else bias + each
        if bias is not None:
            bias = bias if visible is None else bias.masked_fill(~visible, 0.0)
        return laid(self.query), laid(self.key), bias if bias is not None and bias.any() else None


class Saved(NamedTuple):
    """Weights as they were before dropout or a cast."""

    weights: Tensor
    shift: int | torch.SymInt | None  # as in Place


@dataclass
class Softmaxed:
    """A softmax that values may follow."""

    number: int
    scores: Tensor | None  # what it was taken of; None once values have followed
    product: Product | None


class Place(NamedTuple):
    """Memory that holds the weights of a softmax, or what became of them."""

    softmax: Softmaxed
    stride: int  # from key to key
    keys: int
    shift: int | torch.SymInt | None  # element n is of the score at n − shift in their memory; None: in another order
    saved: Saved | None = None  # the weights, where this is what dropout or a cast left of them
    dropped: bool = False
    adjusted: bool = False  # the weights are no longer what the softmax returned

    def keys_of(self, x: Tensor) -> int | None:
        """The dimension of keys in a view."""
        fits = (dim for dim in range(x.dim()) if x.shape[dim] == 1 or x.stride(dim) == self.stride)
        return max((dim for dim in fits if x.shape[dim] <= self.keys), key=lambda dim: x.shape[dim], default=None)

    def has_keys_last(self, x: Tensor) -> bool:
        return x.shape[-1] <= self.keys and (x.stride(-1) == self.stride or self.keys == 1)


class Sources:
    """Of which tensors others were projected: queries and keys of one make self attention."""

    def __init__(self) -> None:
        self.numbers: Known[int] = Known()
        self.projected: Known[int] = Known()  # the number of what a linear map was applied to, last
        self.count = 0

    def number(self, x: Tensor) -> int:
        number = self.numbers.get(x)
        if number is None:
            number = self.count = self.count + 1
            self.numbers.put(x, number)
        return number

    def follow(self, func: Any, args: Any, results: Any) -> None:
        result = results[0] if isinstance(results, (tuple, list)) and results else results
        if is_view(func) or not isinstance(result, Tensor):
            return
        source = None
        if func in LINEAR:
            source = self.number(args[LINEAR[func]])
        else:
            for x in tensors_in(args):
                known = self.projected.get(x)
                source = source if known is None else known
        if source is not None:
            self.projected.put(result, source)
        if func in COPIES:
            self.numbers.put(result, self.number(args[0]))

    def kind(self, query: Tensor, key: Tensor) -> Kind:
        of_query, of_key = ({self.number(x), self.projected.get(x)} - {None} for x in (query, key))
        return "self" if of_query & of_key else "cross"


# --- Masks.


def read_mask(mask: Tensor | None, batch: int) -> tuple[Mask | None, Tensor | None]:
    """What an additive or bool mask, to (B, H, Lq, Lk), hides; and what it adds to the rest, if anything."""
    if mask is None:
        return None, None
    mask = narrowed(mask.detach()[(None,) * (4 - mask.dim())])
    if mask.dtype == torch.bool:
        return as_mask(common(mask), batch), None
    unseen = hidden(mask)
    bias = mask.masked_fill(unseen, 0.0)
    return as_mask(common(~unseen), batch), bias if bias.any() else None


def hidden(scores: Tensor) -> Tensor:
    """Which scores hide a key: the least that there are, or some far below 0 and below the largest of their row."""
    least = scores <= torch.finfo(scores.dtype).min / 2
    return least | ((scores <= MASKED) & (scores <= scores.amax(-1, keepdim=True) + MASKED))


def as_mask(visible: Tensor | None, batch: int) -> Mask | None:
    """Bool (B or 1, H or 1, Lq or 1, Lk) as a mask: of lengths, if the keys of each row are neighbours."""
    if visible is None:
        return None
    low = visible.to(torch.uint8).argmax(-1)
    high = low + visible.sum(-1)
    j = torch.arange(visible.shape[-1], device=visible.device)
    if visible.shape[1] > 1 or not torch.equal((j >= low.unsqueeze(-1)) & (j < high.unsqueeze(-1)), visible):
        return Keep(visible)
    start, stop = (x[:, 0, 0] if x.shape[-1] == 1 else x[:, 0] for x in (low, high))
    return Lengths(start=start.expand(batch, *start.shape[1:]), stop=stop.expand(batch, *stop.shape[1:]))


def common(visible: Tensor) -> Tensor | None:
    """Bool (B, H, Lq, Lk), with 1 for each of the first three where all are the same; None where all is visible."""
    for dim in (1, 0, 2):
        first = visible.narrow(dim, 0, 1)
        if visible.shape[dim] > 1 and bool((visible == first).all()):
            visible = first
    return None if visible.all() else visible


def grouped(key: Tensor) -> Tensor:
    """Keys (B, H, Lk, D) with one head for each group of neighbouring heads that have the same."""
    heads = key.shape[1]
    for groups in (n for n in range(1, heads) if heads % n == 0):
        split = key.unflatten(1, (groups, -1))
        if all(torch.equal(x, x[:, :, :1].expand_as(x)) for x in (split[..., :1, :], split)):
            return split[:, :, 0]
    return key


def narrowed(x: Tensor) -> Tensor:
    """x with 1 for each dimension that it was expanded along."""
    for dim, stride in enumerate(x.stride()):
        x = x.narrow(dim, 0, 1) if stride == 0 and x.shape[dim] > 1 else x
    return x


# --- Tensors and operators.


def tensors_in(args: Sequence[Any]) -> Iterator[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from (y for y in x if isinstance(y, Tensor))


def opaque(x: Tensor) -> bool:
    """Whether a tensor has no memory of its own to follow it by."""
    return x.is_nested or x.is_sparse or x.layout in COMPRESSED


def parallel(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory in the same order."""
    return all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), y.stride(), strict=True))


def shifted(shift: int | torch.SymInt | None, x: Tensor, y: Tensor) -> int | torch.SymInt | None:
    """The shift of y, of the same elements as x, which has this one; None where they lie in another order."""
    return None if shift is None or not parallel(x, y) else shift + y.storage_offset() - x.storage_offset()


def read_as(x: Tensor, like: Tensor, shift: int | torch.SymInt) -> Tensor:
    """What stands in the memory of x where `like` stands in its own, so many elements further on."""
    return x.detach().as_strided(like.shape, like.stride(), like.storage_offset() + shift)


def by_name(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, those that were left out too."""
    arguments = func._schema.arguments
    defaults = {each.name: each.default_value for each in arguments if each.has_default_value()}
    return {**defaults, **dict(zip((each.name for each in arguments), args, strict=False)), **kwargs}


def is_view(func: Any) -> bool:
    return func.is_view or func is aten._unsafe_view.default


@cache
def composite(func: Any) -> bool:
    """Whether an operator is made of others on every device."""
    return func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def _number(x: Any) -> float | None:
    """A number, or a tensor of one."""
    return float(x) if not isinstance(x, Tensor) or x.numel() == 1 else None


def _hides(x: Any) -> bool:
    number = _number(x)
    return number is not None and number <= MASKED


# What is left of a product x of queries and keys after an operator, if that is one still.


def _scaled(product: Product, x: Tensor, a: Any, b: Any) -> Product | None:
    factor = _number(b if x is a else a)
    return None if factor is None or product.added else product._replace(scale=product.scale * factor)


def _divided(product: Product, x: Tensor, a: Any, b: Any) -> Product | None:
    number = _number(b) if x is a else None
    return None if number is None or product.added else product._replace(scale=product.scale / number)


def _added(product: Product, x: Tensor, a: Any, b: Any, *, alpha: float = 1) -> Product | None:
    other = b if x is a else a
    if not isinstance(other, Tensor) or alpha != 1:
        return None
    return product._replace(added=(*product.added, other.detach().expand(x.shape)))


def _filled(product: Product, x: Tensor, a: Tensor, mask: Tensor, value: Any) -> Product | None:
    return product if x is a and _hides(value) else None


def _chosen(product: Product, x: Tensor, mask: Tensor, a: Any, b: Any) -> Product | None:
    return product if _hides(b if x is a else a) else None


def _put(product: Product, x: Tensor, a: Tensor, at: Any, value: Tensor, accumulate: bool = False) -> Product | None:
    return product if x is a and not accumulate and _hides(value) else None


def _copied(product: Product, x: Tensor, *args: Any, **kwargs: Any) -> Product:
    return product


COPIES = (aten.clone.default, aten._to_copy.default)
CHANGES: dict[Any, Callable[..., Product | None]] = {
    **dict.fromkeys((aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar), _scaled),
    **dict.fromkeys((aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar), _divided),
    **dict.fromkeys((aten.add.Tensor, aten.add_.Tensor), _added),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill_.Scalar), _filled),
    **dict.fromkeys((aten.masked_fill.Tensor, aten.masked_fill_.Tensor), _filled),
    **dict.fromkeys((aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther), _chosen),
    **dict.fromkeys((aten.index_put.default, aten.index_put_.default), _put),
    **dict.fromkeys(COPIES, _copied),
}
ADJUSTING = (  # weights stay weights
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther),
    *(aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.nan_to_num.default),
)
LINEAR = {  # the operand that is projected
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.convolution.default), 0),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default, aten._addmm_activation.default), 1),
}
PRODUCTS: dict[Any, Callable[..., tuple[Tensor, Tensor, float, Tensor | None]]] = {
    **dict.fromkeys((aten.mm.default, aten.bmm.default), lambda a, b: (a, b, 1.0, None)),
    aten.baddbmm.default: lambda m, a, b, *, beta=1, alpha=1: (a, b, float(alpha), m * beta if beta else None),
}
SOFTMAXES = (aten._softmax.default, aten._safe_softmax.default)
DROPOUTS = (aten.native_dropout.default, aten._fused_dropout.default)
NOISE = (aten.bernoulli.default, aten.bernoulli.p, aten.bernoulli_.float, aten.bernoulli_.Tensor)
FUSED = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
)
