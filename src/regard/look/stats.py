"""Statistics of attention maps, in one pass over blocks of rows: what each head looked at, in numbers.

A cell that is not visible counts as nothing, whatever it holds. A NaN weight makes NaN of every number that it is
part of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, nan
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.problem import Indices, indices

if TYPE_CHECKING:
    from regard.look.maps import AttentionMap

NEAR = 5  # places to either side that are called local


class Statistics(NamedTuple):
    """Statistics of a map (B, H, Lq, Lk), in the dtype of its weights p.

    Row i stands at place_i among the keys: at i + Lk − Lq in self attention, where the last query stands at the last
    key, and at i (Lk − 1) / (Lq − 1) in cross attention, where both ends meet. Shares are of all weight of a head, NaN
    where it has none.

    >>> from regard.look.maps import AttentionMap
    >>> found = AttentionMap.from_weights(torch.eye(4)).stats()
    >>> found.diagonal.item(), found.entropy.sum().item(), found.coverage.item()
    (1.0, 0.0, 1.0)
    """

    entropy: Tensor  # (B, H, Lq): −Σ_j p_ij log p_ij, in nats
    largest: Tensor  # (B, H, Lq): max_j p_ij
    total: Tensor  # (B, H, Lq): Σ_j p_ij, which a sink outside the keys makes less than 1
    visible: Tensor  # (B, H, Lq) int64: how many keys the row may attend
    distance: Tensor  # (B, H, Lq): Σ_j p_ij |j − place_i|
    mass: Tensor  # (B, H, Lk): the mean weight of a key among the rows that may attend it, 0 for none
    viewers: Tensor  # (B, H, Lk) int64: how many rows those are
    local: Tensor  # (B, H): share of the keys at most `NEAR` places from round(place_i)
    previous: Tensor  # (B, H): share of the keys at round(place_i) − 1
    diagonal: Tensor  # (B, H): share of the keys at round(place_i)
    coverage: Tensor  # (B, H): mean over the visible keys of min(Σ_i p_ij, 1), as in Wu et al. 2016; NaN for no keys
    overlap: Tensor  # (B, H, H): Σ_ij p_ij p'_ij of two heads

    @property
    def normalized_entropy(self) -> Tensor:
        """(B, H, Lq): entropy / log(visible), 1 for even weights; NaN where fewer than two keys are visible."""
        return self.entropy / torch.where(self.visible > 1, self.visible, nan).to(self.entropy.dtype).log()

    @property
    def similarity(self) -> Tensor:
        """(B, H, H): the cosine of the weights of two heads; NaN where one has none."""
        norm = self.overlap.diagonal(dim1=-2, dim2=-1).sqrt()
        return self.overlap / (norm.unsqueeze(-1) * norm.unsqueeze(-2))

    def sinks(self, threshold: float = 0.3) -> Tensor:
        """(B, H, Lk) bool: keys of mass ≥ threshold. Gu et al. 2025, *When attention sink emerges in language models*.

        A key that is visible to fewer than half as many rows as the most visible one is none: the few last rows of a
        causal map, each looking at its own token, make no sink.
        """
        return are_sinks(self.mass, self.viewers, threshold)

    def sink_share(self, threshold: float = 0.3) -> Tensor:
        """(B, H): share of the weight that went to sinks."""
        received = self.mass * self.viewers
        taken = received.masked_fill(~self.sinks(threshold), 0.0)
        return taken.sum(-1) / received.sum(-1)

    def sample(self, n: int) -> Statistics:
        """The statistics of one sample, in a batch of 1; IndexError where there is none."""
        return Statistics(*(x[[n]] for x in self))

    def table(self, sinks: float = 0.3) -> Table:
        """A row for each head of each sample, its rows that see nothing left out.

        Columns: sample, head; entropy, normalized_entropy and largest, means over rows; sink_share of the threshold
        `sinks`; distance, the mean of a unit of weight; local, previous, diagonal, coverage.
        """
        batch, heads, _ = self.entropy.shape
        sample, head = torch.meshgrid(torch.arange(batch), torch.arange(heads), indexing="ij")
        columns = {
            "sample": sample,
            "head": head,
            "entropy": _mean(self.entropy, self.visible > 0),
            "normalized_entropy": _mean(self.normalized_entropy, self.visible > 1),
            "largest": _mean(self.largest, self.visible > 0),
            "sink_share": self.sink_share(sinks),
            "distance": self.distance.sum(-1) / self.total.sum(-1),
            "local": self.local,
            "previous": self.previous,
            "diagonal": self.diagonal,
            "coverage": self.coverage,
        }
        return Table({name: column.flatten().cpu().numpy() for name, column in columns.items()})


class Table(dict[str, Any]):
    """Columns by name, each a one-dimensional NumPy array."""

    def to_pandas(self) -> Any:
        """The same as a pandas.DataFrame; ModuleNotFoundError where pandas is not installed."""
        try:
            from pandas import DataFrame
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "to_pandas needs pandas, which `pip install pandas` brings", name=error.name
            ) from error
        return DataFrame(dict(self))


def table(maps: Iterable[AttentionMap], sinks: float = 0.3) -> Table:
    """The tables of several maps in one, behind the columns name and layer, the map's number from 0.

    >>> from regard.look.maps import AttentionMap
    >>> found = table(AttentionMap.from_weights(torch.rand(8, 5, 5).softmax(-1), name) for name in ("early", "late"))
    >>> len(found["head"]), found["name"][8].item(), found["layer"][8].item()
    (16, 'late', 1)
    """
    import numpy as np

    maps = list(maps)
    if not maps:
        raise ValueError("maps is empty; a table takes one map at least")
    each = [seen.stats().table(sinks) for seen in maps]
    rows = [len(one["head"]) for one in each]
    columns = {name: np.concatenate([one[name] for one in each]) for name in each[0]}
    return Table(name=np.repeat([seen.name for seen in maps], rows), layer=np.repeat(range(len(maps)), rows), **columns)


def statistics(seen: AttentionMap) -> Statistics:
    """The statistics of a map whose weights can be read, in memory linear in its sides."""
    batch, heads, queries, keys = seen.shape
    like = seen.weights(rows=[0], keys=[0])  # results are laid out once: kept pieces would lie between freed blocks
    entropy, largest, total, distance = like.new_empty(4, batch, heads, queries)
    visible = like.new_empty(batch, heads, queries, dtype=torch.int64)
    viewers = visible.new_zeros(batch, heads, keys)
    received = like.new_zeros(batch, heads, keys, dtype=torch.float64)  # a long map adds up many small weights
    overlap, band = received.new_zeros(batch, heads, heads), received.new_zeros(batch, heads, 2 * NEAR + 1)
    place, key = places(seen.kind, queries, keys, like.device), torch.arange(keys, device=like.device)
    for rows, p, seen_cells in seen.blocks():
        away = (key - place[rows].unsqueeze(-1)).abs().to(p.dtype)
        entropy[..., rows] = torch.special.entr(p).sum(-1)
        largest[..., rows] = p.amax(-1)
        total[..., rows] = p.sum(-1)
        visible[..., rows] = seen_cells.sum(-1)
        distance[..., rows] = (p * away).sum(-1)
        band += _band(p, (place[rows] + 0.5).floor().long()).double().sum(-2)
        viewers += seen_cells.sum(-2)
        p = p.double()
        received += p.sum(-2)
        overlap += p.flatten(2) @ p.flatten(2).mT
    shares = band / received.sum(-1, keepdim=True)
    of_heads = {
        "mass": received / viewers.clamp(min=1),
        "local": shares.sum(-1),
        "previous": shares[..., NEAR - 1],
        "diagonal": shares[..., NEAR],
        "coverage": received.clamp(max=1.0).sum(-1) / (viewers > 0).sum(-1),
        "overlap": overlap,
    }
    of_heads = {name: x.to(like.dtype) for name, x in of_heads.items()}
    return Statistics(entropy, largest, total, visible, distance, viewers=viewers, **of_heads)


def rollout(maps: Sequence[AttentionMap], rows: Indices | None = None) -> Tensor:
    """(B, rows, L): how much of each token of the first layer is in each, or in some, of the tokens after the last.

    The product Â_n ⋯ Â_1, where Â = ½ A + ½ I with rows divided by their sums, and A is the mean over heads. Abnar &
    Zuidema 2020, *Quantifying attention flow in transformers*. A few rows take memory linear in L.

    ValueError unless the maps, first layer first, are of self attention with one batch and one length.

    >>> from regard.look.maps import AttentionMap
    >>> layers = [AttentionMap.from_weights(torch.rand(2, 8, 6, 6).softmax(-1)) for _ in range(3)]
    >>> rollout(layers).sum(-1).allclose(torch.ones(2, 6))
    True
    """
    if not maps:
        raise ValueError("maps is empty; rollout takes the map of one layer at least")
    for seen in maps:
        batch, _, queries, keys = seen.shape
        if seen.kind != "self" or queries != keys or (batch, keys) != (maps[0].shape[0], maps[0].shape[-1]):
            raise ValueError(
                f"{seen.name!r} is {seen.kind} attention of shape {seen.shape}; rollout takes self attention, "
                f"each map with the batch and the length of the first, whose shape is {maps[0].shape}"
            )
    flow: Tensor | None = None
    for seen in reversed(maps):
        after = None
        for block, p, _ in seen.blocks():
            if flow is None:  # of the tokens after the last layer, each is all of itself
                chosen = indices(slice(None) if rows is None else rows, seen.shape[2], "rows", p.device)
                flow = F.one_hot(chosen, seen.shape[2]).to(p.dtype).expand(seen.shape[0], -1, -1)
            attended = p.mean(1)
            here = flow[..., block] / (1 + attended.sum(-1)).unsqueeze(-2)
            after = torch.zeros_like(flow) if after is None else after
            after.baddbmm_(here, attended)
            after[..., block] += here
        flow = after
    assert flow is not None  # no map has a side of 0
    return flow


def alignment(seen: AttentionMap, head: int | None = None, sample: int = 0) -> set[tuple[int, int]]:
    """(query, key) of every query that sees a key: the key of its largest weight, the first of equals.

    Weights are of one head of one sample, or the mean of all its heads. IndexError where there is no such head or
    sample, ValueError for NaN.
    """
    one = seen.sample(sample)
    one = one if head is None else one.head(head)
    found = set()
    for rows, p, visible in one.blocks():
        p, visible = p[0].mean(0), visible[0].any(0)
        if p.isnan().any():
            raise ValueError(f"{seen.name!r} holds NaN between rows {rows.start} and {rows.stop}; nothing aligns to it")
        keys = p.masked_fill(~visible, -inf).argmax(-1).tolist()
        found |= {(rows.start + n, key) for n, key in enumerate(keys) if visible[n].any()}
    return found


def alignment_error_rate(
    found: Iterable[tuple[int, ...]], sure: Iterable[tuple[int, ...]], possible: Iterable[tuple[int, ...]] = ()
) -> float:
    """1 − (|A ∩ S| + |A ∩ P|) / (|A| + |S|) of the pairs A found, S sure and P possible, which the sure are too.

    Och & Ney 2003, *A systematic comparison of various statistical alignment models*. For many sentences at once put
    the sentence's number in front of each pair. ValueError where nothing is found and nothing is sure.

    >>> alignment_error_rate([(0, 0), (1, 1), (2, 1)], sure=[(0, 0), (1, 1)], possible=[(2, 2)])
    0.19999999999999996
    """
    a, s = set(found), set(sure)
    if not a and not s:
        raise ValueError("found and sure are both empty; an error rate takes one pair at least")
    return 1 - (len(a & s) + len(a & (s | set(possible)))) / (len(a) + len(s))


def are_sinks(mass: Tensor, viewers: Tensor, threshold: float) -> Tensor:
    """(..., Lk) bool: which keys are sinks; see `Statistics.sinks`."""
    enough = 2 * viewers >= viewers.amax(-1, keepdim=True)
    return (mass >= threshold) & enough & (viewers > 0)


def places(kind: str, queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """(Lq,) float64: where among the keys each query stands; see `Statistics`."""
    rows = torch.arange(queries, dtype=torch.float64, device=device)
    return rows + (keys - queries) if kind == "self" and queries <= keys else rows * (keys - 1) / max(1, queries - 1)


def _band(p: Tensor, place: Tensor) -> Tensor:
    """(B, H, rows, 2 NEAR + 1): the weights around each row's place, 0 beyond the keys."""
    keys = place.unsqueeze(-1) + torch.arange(-NEAR, NEAR + 1, device=p.device)
    inside = (keys >= 0) & (keys < p.shape[-1])
    keys = keys.clamp(0, p.shape[-1] - 1).expand(*p.shape[:2], -1, -1)
    return p.gather(-1, keys).masked_fill(~inside, 0.0)


def _mean(x: Tensor, where: Tensor) -> Tensor:
    """The mean over the last dimension of what `where` says; NaN for nothing."""
    return x.masked_fill(~where, 0.0).sum(-1) / where.sum(-1)
