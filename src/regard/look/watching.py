"""Watching a model run for its attention: which calls there were, and what made their weights.

A fused attention operator says what it was given. Else attention is a softmax whose result, perhaps cast or dropped
out in between, is multiplied with values; queries and keys are what was multiplied to make its scores. Tensors are
followed by the memory they view, so that views of all kinds need no rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import get_ident
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from regard import reference
from regard.attended import Attended
from regard.kernels import Run
from regard.look.maps import AttentionMap
from regard.masks import And, Causal, Keep, Lengths, Mask
from regard.problem import Problem, batch_heads

MASKED = -9e3  # scores from here down hide a key; of the constants in use BERT's −10000, in bfloat16, is the nearest
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead")  # as modules call how many they have
OWN_PAIRS = (reference.DotPair, reference.AdditivePair, reference.L1Pair, reference.L2Pair)
Kind = Literal["self", "cross"]
COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
T = TypeVar("T")
aten = torch.ops.aten


class Call(NamedTuple):
    """One attention call. Its tensors are the model's own, to be read before the model goes on."""

    maps: tuple[AttentionMap, ...]  # of the same weights; the first is the least to keep, the last is right
    value: Tensor | None  # (B or 1, H or fewer, Lk, Dv); None where it is not known by heads
    out: Tensor | None  # (B, H, Lq, Dv); None where dropout changed it


class Watch(TorchDispatchMode):
    """Tells `seen` of every attention call of this thread, in their order; `unseen` are sentences on the others."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, seen: Callable[[Call], None]) -> None:
        super().__init__()
        self.model, self.seen, self.missed = model, seen, dict[str, None]()
        inner = getattr(model, "_orig_mod", model)  # of torch.compile's wrapper
        self.whole: str = getattr(inner, "original_name", type(inner).__name__)  # of a scripted module
        self.working: list[tuple[str, nn.Module]] = []  # modules, the innermost last
        self.parameters = {x.untyped_storage().data_ptr() for x in model.parameters()}
        self.paused = False
        self.sources = _Sources()
        self.products: _Known[_Product] = _Known()
        self.softmaxes: _Known[_Place] = _Known()
        self.noise: _Known[bool] = _Known()  # what dropout multiplies with
        self.waiting: dict[int, str] = {}  # softmaxes of products that no values followed, by number
        self.softmax_count = 0

    @property
    def name(self) -> str:
        """Of the module at work."""
        name = self.working[-1][0] if self.working else ""
        return ".".join(part for part in name.split(".") if part not in ("", "_orig_mod")) or self.whole

    @property
    def unseen(self) -> list[str]:
        waiting = [f"{name}: a softmax of products, which multiplied no values" for name in self.waiting.values()]
        return list(dict.fromkeys([*self.missed, *waiting]))

    @contextmanager
    def naming(self) -> Iterator[None]:
        """While it lasts, modules say when they are at work."""
        hooks = []

        thread = get_ident()  # others may run the model as well

        def entering(name: str) -> Callable[[nn.Module, Any], None]:
            return lambda module, args: self.working.append((name, module)) if get_ident() == thread else None

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            if get_ident() == thread and self.working and self.working[-1][1] is module:
                self.working.pop()

        try:
            for name, module in self.model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                    continue
                hooks.append(module.register_forward_pre_hook(entering(name)))
                hooks.append(module.register_forward_hook(leave, always_call=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def observe(self, problem: Problem, run: Run) -> tuple[Tensor, Tensor | None]:
        """Run a problem of regard's own, and tell of it: an observer as `kernels.run` wants it."""
        self.paused = True
        try:
            out, lse = run(problem)
            if out.numel() and problem.keys:
                with torch.no_grad():
                    self._solved(problem, out.detach(), None if lse is None else lse.detach())
        finally:
            self.paused = False
        return out, lse

    def _solved(self, problem: Problem, out: Tensor, lse: Tensor | None) -> None:
        kind, leading = self.sources.kind(problem.query, problem.key), problem.leading
        if isinstance(problem.pair, OWN_PAIRS):
            seen = AttentionMap.of(Attended.of(problem, out, lse), self.name, kind)
        else:  # a function of the user's, which nobody can keep as it is
            plain, allowed = problem.select(None, None), problem.allowed()
            visible = None if allowed is None else batch_heads(allowed.expand(*leading, -1, -1), leading)
            weights = batch_heads(plain.weights(), leading)
            seen = AttentionMap.from_weights(weights, self.name, visible=visible, kind=kind)
        value = batch_heads(reference.per_query_head(problem.value, problem.query).detach(), leading)
        self.seen(Call((seen,), value, None if problem.dropout is not None else batch_heads(out, leading)))

    # --- What an operator means.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or torch._C._current_graph_task_id() != -1:  # the latter while gradients are computed
            return func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):
            if "attention" in func.name():
                self._miss(func.name())
            return func(*args, **kwargs)
        if any(map(_opaque, _tensors(args))):
            if re.search("attention|attn|softmax", func.name()):
                self._miss(f"{func.name()} of nested or sparse tensors")
            return func(*args, **kwargs)
        if _composite(func):  # which arrive whole in inference mode only
            with self:
                return func.decompose(*args, **kwargs)
        with torch.no_grad():
            if func is aten.mul_.Tensor and isinstance(args[1], Tensor) and self.noise.get(args[1]):
                self._save(args[0])
            results = func(*args, **kwargs)
            self._look(func, args, kwargs, results)
            self.sources.follow(func, args, results)
        return results

    def _look(self, func: Any, args: Any, kwargs: dict[str, Any], results: Any) -> None:
        if func in FUSED:
            self._fused(_by_name(func, args, kwargs), results)
        elif func in PRODUCTS:
            self._multiplied(*PRODUCTS[func](*args, **kwargs), results)
        elif func is aten.mv.default:
            self._multiplied(args[0], args[1].unsqueeze(-1), 1.0, None, results.unsqueeze(-1))
        elif func in SOFTMAXES:
            self._normalized(args[0], args[1], results)
        elif func in DROPOUTS:
            self._derived(args[0], results[0], dropped=True)
        elif func in NOISE:
            self.noise.put(results, True)
        elif re.search("attention|attn", func.name()) and "backward" not in func.name():
            self._miss(func.name())
        elif isinstance(results, Tensor) and not _is_view(func) and not re.search("_like$|::new_", func.name()):
            self._changed(func, args, kwargs, results)

    def _miss(self, what: str) -> None:
        self.missed[f"{self.name}: {what}, whose weights cannot be read"] = None

    def _fused(self, given: dict[str, Any], results: Sequence[Any]) -> None:
        """Attention by one operator, which returns the log-sum-exp with the output."""
        query, key, value = (given[name].detach() for name in ("query", "key", "value"))
        out, lse, (batch, heads, queries, _) = results[0].detach(), results[1], query.shape
        if not out.numel() or not key.numel():
            return
        if lse is not None:
            known = lse.numel() and given.get("compute_log_sumexp", True)
            lse = lse.detach().reshape(batch, heads, -1)[..., :queries] if known else None
        mask, bias = read_mask(given.get("attn_mask", given.get("attn_bias")), batch)
        if given["is_causal"]:
            causal = Causal(align="upper_left")
            mask = causal if mask is None else And(mask, causal)
        kind = self.sources.kind(query, key)
        seen = AttentionMap.from_qk(
            query, grouped(key), self.name, scale=given["scale"], mask=mask, bias=bias, lse=lse, kind=kind
        )
        self.seen(Call((seen,), value, None if given["dropout_p"] else out))

    def _multiplied(self, left: Tensor, right: Tensor, scale: float, added: Tensor | None, out: Tensor) -> None:
        """A product of matrices: of weights and values, from either side, or else perhaps of queries and keys."""
        for weights, value, result in ((left, right, out), (right.mT, left.mT, out.mT)):
            place = self.softmaxes.get(weights)
            if place is not None and place.softmax.scores is not None and place.has_keys_last(weights):
                return self._attended(place, *(x if x.dim() == 3 else x.unsqueeze(0) for x in (weights, value, result)))
        if right.untyped_storage().data_ptr() not in self.parameters:  # else a linear layer, at best a classifier
            bias = () if added is None else (added.expand(out.shape),)
            self.products.put(out, _Product(left.detach(), right.detach().mT, scale, bias))
        return None

    def _changed(self, func: Any, args: Any, kwargs: dict[str, Any], results: Tensor) -> None:
        """Perhaps scores or weights, element by element."""
        others = list(_tensors(args))
        for x in others:
            if (product := self.products.get(x)) is not None:
                rule = CHANGES.get(func) if product.whole(x) and results.shape == x.shape else None
                after = None if rule is None else rule(product, x, *args, **kwargs)
                known = after if after is not None else product._replace(plain=False)
                return self.products.put(results, known if results.shape[:-1] == x.shape[:-1] else None)
            if self.softmaxes.get(x) is not None:
                dropped = any(self.noise.get(y) for y in others)
                if dropped or func in COPIES or func in ADJUSTING or results is x:
                    self._derived(x, results, dropped, adjusted=not dropped and func not in COPIES)
                return None
        return None

    def _normalized(self, scores: Tensor, dim: int, weights: Tensor) -> None:
        if scores.dim() == 0 or not scores.numel():
            return
        product = self.products.get(scores)
        if product is not None and not (product.whole(scores) and dim % scores.dim() == scores.dim() - 1):
            product = product._replace(plain=False)
        if product is not None:
            self.waiting[self.softmax_count] = self.name
        scores = scores.detach() if _parallel(scores, weights) else torch.empty_like(weights).copy_(scores)
        softmax = _Softmax(self.softmax_count, scores, product)
        self.softmax_count += 1
        shift = weights.storage_offset() - scores.storage_offset()
        self.softmaxes.put(weights, _Place(softmax, weights.stride(dim), weights.shape[dim], shift))

    def _derived(self, x: Tensor, results: Tensor, dropped: bool, adjusted: bool = False) -> None:
        """Weights made of weights: copied, dropped out, or others in their place."""
        place = self.softmaxes.get(x)
        dim = None if place is None else place.keys_of(x)
        if place is None or dim is None or place.softmax.scores is None or results.shape != x.shape:
            return
        saved = None if adjusted else place.saved or _Saved(x.detach(), place.shift)
        self.softmaxes.put(
            results,
            place._replace(
                stride=results.stride(dim),
                keys=results.shape[dim],
                shift=_shifted(place.shift, x, results),
                saved=saved,
                dropped=place.dropped or dropped,
                adjusted=place.adjusted or adjusted,
            ),
        )

    def _save(self, weights: Tensor) -> None:
        """Weights that are about to be dropped out in place."""
        place = self.softmaxes.get(weights)
        if place is not None and place.saved is None:
            copy = torch.empty_like(weights).copy_(weights)
            saved = _Saved(copy, _shifted(place.shift, weights, copy))
            self.softmaxes.put(weights, place._replace(saved=saved))

    def _attended(self, place: _Place, left: Tensor, value: Tensor, out: Tensor) -> None:
        """Weights (N, Lq, Lk) as they were multiplied with values (N, Lk, Dv)."""
        softmax, saved = place.softmax, place.saved
        scores, product = softmax.scores, softmax.product
        softmax.scores = softmax.product = None  # one softmax is one call
        self.waiting.pop(softmax.number, None)
        assert scores is not None
        weights = left
        if saved is not None and saved.shift is not None and place.shift is not None:
            weights = _read(saved.weights, left, saved.shift - place.shift)
        elif place.dropped:
            return self._miss("a softmax that was rearranged after dropout")
        batch, heads, queries, ordered = self._heads(scores, left)
        shape = batch, heads, queries, left.shape[-1]
        visible = None
        if place.shift is not None:
            visible = common(~hidden(_read(scores, left, -place.shift)).reshape(shape))
        kind: Kind = "self" if queries == shape[-1] else "cross"
        if product is not None:
            kind = self.sources.kind(product.query, product.key)
        maps = [AttentionMap.from_weights(weights.reshape(shape), self.name, visible=visible, kind=kind)]
        if product is not None and ordered and not place.adjusted and product.makes(shape):
            query, key, bias = product.by_heads(batch, heads, visible)
            lse = scores.to(maps[0].weights(rows=[0]).dtype).logsumexp(-1).reshape(shape[:3])
            mask = as_mask(visible, batch)
            seen = AttentionMap.from_qk(
                query, grouped(key), self.name, scale=product.scale, mask=mask, bias=bias, lse=lse, kind=kind
            )
            maps.insert(0, seen)
        by_heads = value.reshape(batch, heads, *value.shape[-2:]) if len(value) == batch * heads else None
        by_heads = value.unsqueeze(0) if len(value) == 1 else by_heads
        self.seen(Call(tuple(maps), by_heads, None if place.dropped else out.reshape(*shape[:3], -1)))
        return None

    def _heads(self, scores: Tensor, left: Tensor) -> tuple[int, int, int, bool]:
        """B, H and Lq of weights (N, Lq, Lk), and whether their rows come in the order of the scores'."""
        n, queries, _ = left.shape
        width = scores.shape[-1]
        ordered = (
            scores.is_contiguous()
            and scores.numel() == n * queries * width
            and (queries == 1 or left.stride(1) == width)
            and (n == 1 or left.stride(0) == queries * width)
        )
        if ordered and scores.dim() > 2:
            n, queries = scores.shape[:-2].numel(), scores.shape[-2]
            if scores.dim() > 3:
                return len(scores), n // len(scores), queries, ordered
        for _, module in reversed(self.working):
            for heads in (getattr(module, name, None) for name in HEADS):
                if isinstance(heads, int) and heads > 0 and n % heads == 0:
                    return n // heads, heads, queries, ordered
        return n, 1, queries, ordered


# --- What is known of tensors.


class _Known(Generic[T]):
    """Facts about tensors, by the memory they view; forgotten when that is freed."""

    def __init__(self) -> None:
        self.facts: dict[int, tuple[StorageWeakRef, T]] = {}
        self.limit = 1

    def get(self, x: Tensor) -> T | None:
        fact = None if _opaque(x) else self.facts.get(x.untyped_storage()._cdata)
        return None if fact is None else fact[1]

    def put(self, x: Tensor, fact: T | None) -> None:
        if _opaque(x):
            return
        storage = x.untyped_storage()
        if fact is None:
            self.facts.pop(storage._cdata, None)
            return
        if len(self.facts) >= self.limit:
            self.facts = {address: each for address, each in self.facts.items() if not each[0].expired()}
            self.limit = 2 * len(self.facts) + 1
        self.facts[storage._cdata] = StorageWeakRef(storage), fact


class _Product(NamedTuple):
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


class _Saved(NamedTuple):
    """Weights as they were before dropout or a cast."""

    weights: Tensor
    shift: int | torch.SymInt | None  # as in _Place


@dataclass
class _Softmax:
    """A softmax that values may follow."""

    number: int
    scores: Tensor | None  # what it was taken of; None once values have followed
    product: _Product | None


class _Place(NamedTuple):
    """Memory that holds the weights of a softmax, or what became of them."""

    softmax: _Softmax
    stride: int  # from key to key
    keys: int
    shift: int | torch.SymInt | None  # element n is of the score at n − shift in their memory; None: in another order
    saved: _Saved | None = None  # the weights, where this is what dropout or a cast left of them
    dropped: bool = False
    adjusted: bool = False  # the weights are no longer what the softmax returned

    def keys_of(self, x: Tensor) -> int | None:
        """The dimension of keys in a view."""
        fits = (dim for dim in range(x.dim()) if x.shape[dim] == 1 or x.stride(dim) == self.stride)
        return max((dim for dim in fits if x.shape[dim] <= self.keys), key=lambda dim: x.shape[dim], default=None)

    def has_keys_last(self, x: Tensor) -> bool:
        return x.shape[-1] <= self.keys and (x.stride(-1) == self.stride or self.keys == 1)


class _Sources:
    """Of which tensors others were projected: queries and keys of one make self attention."""

    def __init__(self) -> None:
        self.numbers: _Known[int] = _Known()
        self.projected: _Known[int] = _Known()  # the number of what a linear map was applied to, last
        self.count = 0

    def number(self, x: Tensor) -> int:
        number = self.numbers.get(x)
        if number is None:
            number = self.count = self.count + 1
            self.numbers.put(x, number)
        return number

    def follow(self, func: Any, args: Any, results: Any) -> None:
        result = results[0] if isinstance(results, (tuple, list)) and results else results
        if _is_view(func) or not isinstance(result, Tensor):
            return
        source = None
        if func in LINEAR:
            source = self.number(args[LINEAR[func]])
        else:
            for x in _tensors(args):
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


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from (y for y in x if isinstance(y, Tensor))


def _opaque(x: Tensor) -> bool:
    """Whether a tensor has no memory of its own to follow it by."""
    return x.is_nested or x.is_sparse or x.layout in COMPRESSED


def _parallel(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory in the same order."""
    return all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), y.stride(), strict=True))


def _shifted(shift: int | torch.SymInt | None, x: Tensor, y: Tensor) -> int | torch.SymInt | None:
    """The shift of y, of the same elements as x, which has this one; None where they lie in another order."""
    return None if shift is None or not _parallel(x, y) else shift + y.storage_offset() - x.storage_offset()


def _read(x: Tensor, like: Tensor, shift: int | torch.SymInt) -> Tensor:
    """What stands in the memory of x where `like` stands in its own, so many elements further on."""
    return x.detach().as_strided(like.shape, like.stride(), like.storage_offset() + shift)


def _by_name(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, those that were left out too."""
    arguments = func._schema.arguments
    defaults = {each.name: each.default_value for each in arguments if each.has_default_value()}
    return {**defaults, **dict(zip((each.name for each in arguments), args, strict=False)), **kwargs}


def _is_view(func: Any) -> bool:
    return func.is_view or func is aten._unsafe_view.default


@cache
def _composite(func: Any) -> bool:
    """Whether an operator is made of others on every device."""
    return func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def _number(x: Any) -> float | None:
    """A number, or a tensor of one."""
    return float(x) if not isinstance(x, Tensor) or x.numel() == 1 else None


def _hides(x: Any) -> bool:
    number = _number(x)
    return number is not None and number <= MASKED


# What is left of a product x of queries and keys after an operator, if that is one still.


def _scaled(product: _Product, x: Tensor, a: Any, b: Any) -> _Product | None:
    factor = _number(b if x is a else a)
    return None if factor is None or product.added else product._replace(scale=product.scale * factor)


def _divided(product: _Product, x: Tensor, a: Any, b: Any) -> _Product | None:
    number = _number(b) if x is a else None
    return None if number is None or product.added else product._replace(scale=product.scale / number)


def _added(product: _Product, x: Tensor, a: Any, b: Any, *, alpha: float = 1) -> _Product | None:
    other = b if x is a else a
    if not isinstance(other, Tensor) or alpha != 1:
        return None
    return product._replace(added=(*product.added, other.detach().expand(x.shape)))


def _filled(product: _Product, x: Tensor, a: Tensor, mask: Tensor, value: Any) -> _Product | None:
    return product if x is a and _hides(value) else None


def _chosen(product: _Product, x: Tensor, mask: Tensor, a: Any, b: Any) -> _Product | None:
    return product if _hides(b if x is a else a) else None


def _put(product: _Product, x: Tensor, a: Tensor, at: Any, value: Tensor, accumulate: bool = False) -> _Product | None:
    return product if x is a and not accumulate and _hides(value) else None


def _copied(product: _Product, x: Tensor, *args: Any, **kwargs: Any) -> _Product:
    return product


COPIES = (aten.clone.default, aten._to_copy.default)
CHANGES: dict[Any, Callable[..., _Product | None]] = {
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
