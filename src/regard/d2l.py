"""The textbook's names, so that the code of *Dive into Deep Learning* runs after `from regard import d2l`.

The names, signatures, shapes and parameters are the textbook's, and its checkpoints load. What differs:

- A query that may attend nothing gets weights 0 and output 0, not uniform weights (NaN in half precision).
- Padding never gets weight, however low the valid scores are; NaN in padding reaches nothing.
- `masked_softmax` and `sequence_mask` do not write to their input, and take scores of any rank.
- Lengths below 0 or above the number of keys are errors.
- Queries × keys × hidden units are never stored together; `attention_weights` is computed when it is read.
- `show_heatmaps` draws all maps on the one scale of its colour bar, from a tensor of any dtype and device or an array.
"""

from __future__ import annotations

import sys
from typing import Any, overload

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from regard.attended import Attended
from regard.functional import attention, blanked
from regard.intervals import Grid
from regard.look.heatmaps import show_heatmaps
from regard.masks import Lengths
from regard.reference import softmax
from regard.scores import Additive, Gaussian, ScaledDot, Score

__all__ = [
    "AdditiveAttention",
    "DotProductAttention",
    "MultiHeadAttention",
    "NWKernelRegression",
    "masked_softmax",
    "plt",
    "sequence_mask",
    "show_heatmaps",
    "transpose_output",
    "transpose_qkv",
    "use_svg_display",
]


def use_svg_display() -> None:
    """Show figures as SVG in a notebook; elsewhere there is nothing to set."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        shell.run_line_magic("config", "InlineBackend.figure_formats = ['svg']")


def sequence_mask(X: Tensor, valid_len: Tensor, value: float = 0) -> Tensor:
    """X (N, L, ...) with `value` from place valid_len[n] on in each sequence n; valid_len is (N,).

    >>> sequence_mask(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([1, 2]))
    tensor([[1, 0, 0],
            [4, 5, 0]])
    """
    valid = torch.arange(X.shape[1], device=X.device) < valid_len[:, None]
    return torch.where(valid.reshape(*valid.shape, *[1] * (X.dim() - 2)), X, value)


def masked_softmax(X: Tensor, valid_lens: Tensor | None) -> Tensor:
    """Softmax of scores X (B, ..., Lq, Lk) over the first valid_lens keys of each sample (B,) or row (B, Lq).

    >>> masked_softmax(torch.zeros(2, 1, 4), torch.tensor([2, 0]))
    tensor([[[0.5000, 0.5000, 0.0000, 0.0000]],
    <BLANKLINE>
            [[0.0000, 0.0000, 0.0000, 0.0000]]])
    """
    if valid_lens is None:
        return softmax(X)
    allowed = Lengths(valid_lens).lay(Grid(X.shape[:-2], X.shape[-2], X.shape[-1], X.device))
    return softmax(torch.where(allowed, X, -torch.inf))


class _KeepsItsLook(nn.Module):
    """A module whose `attention_weights` are there after a call: (B, Lq, Lk), before dropout, computed when read."""

    _attended: Attended | None = None

    @property
    def attention_weights(self) -> Tensor:
        if self._attended is None:
            raise AttributeError  # which torch words as it does for the textbook's module
        return self._attended.weights()

    def _attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        score: Score,
        valid_lens: Tensor | None = None,
        dropout: nn.Dropout | None = None,
    ) -> Tensor:
        mask = None if valid_lens is None else Lengths(valid_lens)
        dropout_p = dropout.p if dropout is not None and dropout.training else 0.0
        self._attended = attention(queries, keys, values, score, mask, dropout_p=dropout_p)
        return self._attended.out

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_attended"}


class AdditiveAttention(Additive, _KeepsItsLook):
    """Additive attention: `AdditiveAttention(key_size, query_size, num_hiddens, dropout)`, as in the Chinese edition,
    or `AdditiveAttention(num_hiddens, dropout)`, as in the English one.

    Parameters W_k, W_q and w_v; queries (B, Lq, query_size), keys (B, Lk, key_size), values (B, Lk, Dv) and
    valid_lens None, (B,) or (B, Lq) to (B, Lq, Dv).

    >>> additive = AdditiveAttention(key_size=2, query_size=20, num_hiddens=8, dropout=0.1).eval()
    >>> values = torch.arange(40.0).reshape(1, 10, 4).repeat(2, 1, 1)
    >>> out = additive(torch.randn(2, 1, 20), torch.ones(2, 10, 2), values, torch.tensor([2, 6]))
    >>> out.round().tolist()
    [[[2.0, 3.0, 4.0, 5.0]], [[10.0, 11.0, 12.0, 13.0]]]
    """

    @overload
    def __init__(self, key_size: int, query_size: int, num_hiddens: int, dropout: float) -> None: ...
    @overload
    def __init__(self, num_hiddens: int, dropout: float) -> None: ...
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        own = ("num_hiddens", "dropout")
        sizes = _arguments(args, kwargs, ("key_size", "query_size", *own), own)
        super().__init__(sizes.get("query_size"), sizes.get("key_size"), sizes["num_hiddens"])
        self.dropout = nn.Dropout(sizes["dropout"])

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, valid_lens: Tensor | None = None) -> Tensor:
        return self._attend(queries, keys, values, self, valid_lens, self.dropout)


class DotProductAttention(_KeepsItsLook):
    """Scaled dot-product attention: queries (B, Lq, D), keys (B, Lk, D), values (B, Lk, Dv) to (B, Lq, Dv).

    >>> dot = DotProductAttention(dropout=0.5).eval()
    >>> dot(torch.randn(2, 1, 2), torch.ones(2, 10, 2), torch.randn(2, 10, 4), torch.tensor([2, 6])).shape
    torch.Size([2, 1, 4])
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, valid_lens: Tensor | None = None) -> Tensor:
        return self._attend(queries, keys, values, ScaledDot(), valid_lens, self.dropout)


class MultiHeadAttention(nn.Module):
    """Multi-head scaled dot-product attention, with parameters W_q, W_k, W_v and W_o.

    `MultiHeadAttention(key_size, query_size, value_size, num_hiddens, num_heads, dropout, bias=False)`, as in the
    Chinese edition, or `MultiHeadAttention(num_hiddens, num_heads, dropout, bias=False)`, as in the English one.
    `attention.attention_weights` is (B · num_heads, Lq, Lk).

    >>> heads = MultiHeadAttention(100, 5, dropout=0.5).eval()
    >>> x = torch.ones(2, 4, 100)
    >>> heads(x, x, x, torch.tensor([3, 2])).shape, heads.attention.attention_weights.shape
    (torch.Size([2, 4, 100]), torch.Size([10, 4, 4]))
    """

    @overload
    def __init__(
        self,
        key_size: int,
        query_size: int,
        value_size: int,
        num_hiddens: int,
        num_heads: int,
        dropout: float,
        bias: bool = False,
    ) -> None: ...
    @overload
    def __init__(self, num_hiddens: int, num_heads: int, dropout: float, bias: bool = False) -> None: ...
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        own = ("num_hiddens", "num_heads", "dropout", "bias")
        sizes = _arguments(args, kwargs, ("key_size", "query_size", "value_size", *own), own, bias=False)
        hiddens, bias = sizes["num_hiddens"], sizes["bias"]
        if hiddens % sizes["num_heads"]:
            raise ValueError(f"num_heads is {sizes['num_heads']}; it must divide num_hiddens, which is {hiddens}")
        self.num_heads = sizes["num_heads"]
        self.attention = DotProductAttention(sizes["dropout"])
        self.W_q, self.W_k, self.W_v = (
            nn.Linear(sizes[name], hiddens, bias=bias) if name in sizes else nn.LazyLinear(hiddens, bias=bias)
            for name in ("query_size", "key_size", "value_size")
        )
        self.W_o = nn.Linear(hiddens, hiddens, bias=bias)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, valid_lens: Tensor | None = None) -> Tensor:
        """(B, Lq, num_hiddens)."""
        if valid_lens is not None:
            grid = Grid(queries.shape[:1], queries.shape[1], keys.shape[1], queries.device)
            queries, keys, values, *_ = blanked(queries, keys, values, Lengths(valid_lens), grid, heads_to_come=False)
        queries, keys, values = (
            self.transpose_qkv(project(x)) for project, x in ((self.W_q, queries), (self.W_k, keys), (self.W_v, values))
        )
        if valid_lens is not None:
            valid_lens = valid_lens.repeat_interleave(self.num_heads, dim=0)
        return self.W_o(self.transpose_output(self.attention(queries, keys, values, valid_lens)))

    def transpose_qkv(self, X: Tensor) -> Tensor:
        """(B, L, num_hiddens) to (B · num_heads, L, num_hiddens / num_heads)."""
        return transpose_qkv(X, self.num_heads)

    def transpose_output(self, X: Tensor) -> Tensor:
        """(B · num_heads, L, num_hiddens / num_heads) to (B, L, num_hiddens)."""
        return transpose_output(X, self.num_heads)


def transpose_qkv(X: Tensor, num_heads: int) -> Tensor:
    """(B, L, num_hiddens) to (B · num_heads, L, num_hiddens / num_heads)."""
    return X.unflatten(-1, (num_heads, -1)).transpose(1, 2).flatten(0, 1)


def transpose_output(X: Tensor, num_heads: int) -> Tensor:
    """(B · num_heads, L, num_hiddens / num_heads) to (B, L, num_hiddens)."""
    return X.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)


class NWKernelRegression(_KeepsItsLook):
    """Nadaraya–Watson kernel regression with one learnt width w: weights softmax_j(−½ ((q_i − k_ij) w)²).

    queries (n,), keys and values (n, m) to (n,); `attention_weights` is (n, m).

    >>> NWKernelRegression()(torch.zeros(3), torch.randn(3, 5), torch.randn(3, 5)).shape
    torch.Size([3])
    """

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(1))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        queries, keys, values = queries[:, None, None] * self.w, keys[..., None] * self.w, values[..., None]
        return self._attend(queries, keys, values, Gaussian()).flatten()

    @property
    def attention_weights(self) -> Tensor:
        return super().attention_weights.squeeze(-2)


def _arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], *editions: tuple[str, ...], **defaults: Any
) -> dict[str, Any]:
    """The arguments by name, of the first edition that they fit."""
    for names in editions:
        given = dict(zip(names, args, strict=False))
        fits = len(args) <= len(names) and not given.keys() & kwargs.keys()
        if fits and (given | kwargs).keys() <= set(names) <= (defaults | given | kwargs).keys():
            return defaults | given | kwargs
    signatures = " or ".join(f"({', '.join(names)})" for names in editions)
    raise TypeError(f"the arguments are {args} and {kwargs}; they must be {signatures}")
