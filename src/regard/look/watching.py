"""Watching a model run for its attention: which calls there were, and what made their weights.

A fused attention operator says what it was given. Else attention is a softmax whose result, perhaps cast or dropped
out in between, is multiplied with values; queries and keys are what was multiplied to make its scores. `tracing.py`
knows which tensors are which.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from regard import reference
from regard.attended import Attended
from regard.kernels import Run
from regard.look.maps import AttentionMap
from regard.look.tracing import (
    ADJUSTING,
    CHANGES,
    COPIES,
    DROPOUTS,
    FUSED,
    NOISE,
    PRODUCTS,
    SOFTMAXES,
    Kind,
    Known,
    Place,
    Product,
    Saved,
    Softmaxed,
    Sources,
    as_mask,
    by_name,
    common,
    composite,
    grouped,
    hidden,
    is_view,
    opaque,
    parallel,
    read_as,
    read_mask,
    shifted,
    tensors_in,
)
from regard.masks import And, Causal
from regard.problem import Problem, batch_heads

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead")  # as modules call how many they have
OWN_PAIRS = (reference.DotPair, reference.AdditivePair, reference.L1Pair, reference.L2Pair)
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
        self.sources = Sources()
        self.products: Known[Product] = Known()
        self.softmaxes: Known[Place] = Known()
        self.noise: Known[bool] = Known()  # what dropout multiplies with
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
        if any(map(opaque, tensors_in(args))):
            if re.search("attention|attn|softmax", func.name()):
                self._miss(f"{func.name()} of nested or sparse tensors")
            return func(*args, **kwargs)
        if composite(func):  # which arrive whole in inference mode only
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
            self._fused(by_name(func, args, kwargs), results)
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
        elif isinstance(results, Tensor) and not is_view(func) and not re.search("_like$|::new_", func.name()):
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
            self.products.put(out, Product(left.detach(), right.detach().mT, scale, bias))
        return None

    def _changed(self, func: Any, args: Any, kwargs: dict[str, Any], results: Tensor) -> None:
        """Perhaps scores or weights, element by element."""
        others = list(tensors_in(args))
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
        scores = scores.detach() if parallel(scores, weights) else torch.empty_like(weights).copy_(scores)
        softmax = Softmaxed(self.softmax_count, scores, product)
        self.softmax_count += 1
        shift = weights.storage_offset() - scores.storage_offset()
        self.softmaxes.put(weights, Place(softmax, weights.stride(dim), weights.shape[dim], shift))

    def _derived(self, x: Tensor, results: Tensor, dropped: bool, adjusted: bool = False) -> None:
        """Weights made of weights: copied, dropped out, or others in their place."""
        place = self.softmaxes.get(x)
        dim = None if place is None else place.keys_of(x)
        if place is None or dim is None or place.softmax.scores is None or results.shape != x.shape:
            return
        saved = None if adjusted else place.saved or Saved(x.detach(), place.shift)
        self.softmaxes.put(
            results,
            place._replace(
                stride=results.stride(dim),
                keys=results.shape[dim],
                shift=shifted(place.shift, x, results),
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
            saved = Saved(copy, shifted(place.shift, weights, copy))
            self.softmaxes.put(weights, place._replace(saved=saved))

    def _attended(self, place: Place, left: Tensor, value: Tensor, out: Tensor) -> None:
        """Weights (N, Lq, Lk) as they were multiplied with values (N, Lk, Dv)."""
        softmax, saved = place.softmax, place.saved
        scores, product = softmax.scores, softmax.product
        softmax.scores = softmax.product = None  # one softmax is one call
        self.waiting.pop(softmax.number, None)
        assert scores is not None
        weights = left
        if saved is not None and saved.shift is not None and place.shift is not None:
            weights = read_as(saved.weights, left, saved.shift - place.shift)
        elif place.dropped:
            return self._miss("a softmax that was rearranged after dropout")
        batch, heads, queries, ordered = self._heads(scores, left)
        shape = batch, heads, queries, left.shape[-1]
        visible = None
        if place.shift is not None:
            visible = common(~hidden(read_as(scores, left, -place.shift)).reshape(shape))
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
