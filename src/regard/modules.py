"""Attention as nn.Modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.attended import Attended
from regard.functional import attention, blanked
from regard.intervals import Grid
from regard.masks import Mask
from regard.normalizers import Normalizer, Softmax
from regard.scores import ScaledDot, Score, through


class Attention(nn.Module):
    """`regard.attend` with a score of its own, and dropout of the weights in training.

    Shapes and errors as in `regard.attend`.

    >>> additive = Attention(Additive(query_dim=20, key_dim=2, hidden_dim=8), dropout=0.1)
    >>> query, key, value = torch.randn(2, 1, 20), torch.randn(2, 10, 2), torch.randn(2, 10, 4)
    >>> additive(query, key, value, Lengths(torch.tensor([2, 6]))).shape
    torch.Size([2, 1, 4])
    """

    def __init__(self, score: Score, dropout: float = 0.0, *, normalizer: Normalizer = Softmax()) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout}; it must lie in 0 .. 1")
        if not isinstance(score, Score):
            raise TypeError(f"score is {score!r}; it must be a Score, such as ScaledDot()")
        self.score = score
        self.dropout = dropout
        self.normalizer = normalizer

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | Tensor | None = None) -> Tensor:
        """(..., Lq, Dv)."""
        return self.attention(query, key, value, mask).out

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | Tensor | None = None) -> Attended:
        """The output, and the weights on demand."""
        dropout_p = self.dropout if self.training else 0.0
        return attention(query, key, value, self.score, mask, normalizer=self.normalizer, dropout_p=dropout_p)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, normalizer={self.normalizer}"


class MultiHeadAttention(nn.Module):
    """Several attentions side by side on projections of the inputs, with one score of any kind for all heads.

    Vaswani et al. 2017. head_h = attend(W_q x, W_k y, W_v z)_h, output = W_o [head_1; …; head_H].

    Args:
        embed_dim: size of queries and of the output; num_heads must divide it.
        num_heads: heads, each of size embed_dim / num_heads.
        score: between one head's queries and keys, so `Additive(head, head, hidden)` where head is that size.
        key_dim, value_dim: sizes of keys and values; embed_dim unless given.
        dropout: probability of dropping a weight in training.
        bias: whether the four projections have one.
        normalizer: scores to weights.

    >>> heads = MultiHeadAttention(32, 4, Additive(query_dim=8, key_dim=8, hidden_dim=16))
    >>> x = torch.randn(2, 5, 32)
    >>> heads(x, x, x, Causal()).shape, heads.attention(x, x, x).weights(heads=[1]).shape
    (torch.Size([2, 5, 32]), torch.Size([2, 1, 5, 5]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        score: Score | None = None,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        normalizer: Normalizer = Softmax(),
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; it must divide embed_dim, which is {embed_dim}")
        score = ScaledDot() if score is None else score
        if score.heads != 1:
            raise ValueError(f"score has {score.heads} heads of its own; one score of 1 head serves all num_heads")
        self.num_heads = num_heads
        self.attend = Attention(score, dropout, normalizer=normalizer)
        self.W_q = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.W_k = nn.Linear(key_dim or embed_dim, embed_dim, bias=bias)
        self.W_v = nn.Linear(value_dim or embed_dim, embed_dim, bias=bias)
        self.W_o = nn.Linear(embed_dim, embed_dim, bias=bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | Tensor | None = None) -> Tensor:
        """(B, Lq, embed_dim) from query (B, Lq, embed_dim), key (B, Lk, key_dim) and value (B, Lk, value_dim)."""
        return self.join(self.attention(query, key, value, mask).out)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | Tensor | None = None) -> Attended:
        """What the heads saw: out is (B, num_heads, Lq, head) before they are joined; a bool mask has a head dim."""
        if mask is not None:  # padding is to reach the projections here no more than those of a score
            leading = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
            grid = Grid((*leading, self.num_heads), query.shape[-2], key.shape[-2], query.device)
            query, key, value, *_ = blanked(query, key, value, mask, grid, heads_to_come=True)
        query = self.split(through(self.W_q, query, "query"))
        key = self.split(through(self.W_k, key, "key"))
        value = self.split(through(self.W_v, value, "value"))
        return self.attend.attention(query, key, value, mask)

    def split(self, x: Tensor) -> Tensor:
        """(..., L, embed_dim) as (..., num_heads, L, head)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)

    def join(self, heads: Tensor) -> Tensor:
        """(..., num_heads, L, head) as (..., L, embed_dim), projected by W_o."""
        return self.W_o(heads.transpose(-2, -3).flatten(-2))
