"""Pooling of a set: attention without a query, by what stands out by itself (the non-volitional cues).

Items are (B, L, D), bags of different sizes padded and masked: `Lengths(sizes)`. Each attention pooling is a score
of the items alone, their *saliency*, so that masks, empty bags and the view of the weights are those of attention.

>>> bags = [torch.randn(3, 8), torch.randn(5, 8)]
>>> items = torch.nn.utils.rnn.pad_sequence(bags, batch_first=True)
>>> pool = AttentionPooling(8, 16)
>>> pool(items, Lengths(torch.tensor([3, 5]))).shape
torch.Size([2, 8])
"""

from __future__ import annotations

from abc import abstractmethod
from math import inf

import torch
from torch import Tensor, nn

from regard.attended import Attended
from regard.functional import attention
from regard.intervals import Grid
from regard.masks import Mask, as_mask
from regard.normalizers import Normalizer, Sigmoid, Softmax
from regard.reference import DotPair, Pair
from regard.scores import Score


class SaliencyPooling(Score):
    """pooled = Σ_j p_j x_j, p = normalize(saliency(x)): a score that asks nothing, only looks at the items."""

    normalizer: Normalizer = Softmax()

    @abstractmethod
    def saliency(self, items: Tensor) -> Tensor:
        """(..., L, D) to (..., L, 1): how much each item stands out."""

    def project_query(self, query: Tensor) -> Tensor:
        return query

    def project_key(self, key: Tensor) -> Tensor:
        return self.saliency(key)

    def pair(self) -> Pair:
        return DotPair(1.0)

    def forward(self, items: Tensor, mask: Mask | Tensor | None = None) -> Tensor:
        """(..., D), 0 for a bag without items; a bool mask broadcasts to (..., 1, L)."""
        return self.attention(items, mask).out.squeeze(-2)

    def attention(self, items: Tensor, mask: Mask | Tensor | None = None) -> Attended:
        """The pooled items (..., 1, D) and the weight of each (..., 1, L)."""
        return attention(items.new_ones(1, 1), items, items, self, mask, normalizer=self.normalizer)


class MeanPooling(SaliencyPooling):
    """pooled = mean of the items: nothing stands out.

    >>> MeanPooling()(torch.tensor([[[1.0], [3.0], [100.0]]]), Lengths(2))
    tensor([[2.]])
    """

    def saliency(self, items: Tensor) -> Tensor:
        return torch.zeros_like(items[..., :1])


class GatedPooling(SaliencyPooling):
    """pooled = Σ_j g_j x_j, g_j = sigmoid(wᵀx_j + b): each item is let through, or not, by its own look.

    >>> GatedPooling(8)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 8])
    """

    normalizer = Sigmoid()

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w = nn.Linear(dim, 1)

    def saliency(self, items: Tensor) -> Tensor:
        return self.w(items)


class AttentionPooling(SaliencyPooling):
    """pooled = Σ_j p_j x_j, p = softmax_j(wᵀ tanh(V x_j)). Ilse, Tomczak & Welling 2018, equation 8.

    >>> AttentionPooling(8, 16)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 8])
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.V = nn.Linear(dim, hidden_dim)
        self.w = nn.Linear(hidden_dim, 1, bias=False)

    def saliency(self, items: Tensor) -> Tensor:
        return self.w(torch.tanh(self.V(items)))


class GatedAttentionPooling(SaliencyPooling):
    """pooled = Σ_j p_j x_j, p = softmax_j(wᵀ (tanh(V x_j) ⊙ sigmoid(U x_j))). Ilse et al. 2018, equation 9.

    >>> pool = GatedAttentionPooling(8, 16)
    >>> pool.attention(torch.randn(2, 5, 8)).weights().shape
    torch.Size([2, 1, 5])
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.V = nn.Linear(dim, hidden_dim)
        self.U = nn.Linear(dim, hidden_dim)
        self.w = nn.Linear(hidden_dim, 1, bias=False)

    def saliency(self, items: Tensor) -> Tensor:
        return self.w(torch.tanh(self.V(items)) * torch.sigmoid(self.U(items)))


class MaxPooling(nn.Module):
    """pooled_d = max_j x_jd over the items that the mask allows, 0 for a bag without items.

    >>> MaxPooling()(torch.tensor([[[1.0], [3.0], [100.0]]]), Lengths(2))
    tensor([[3.]])
    """

    def forward(self, items: Tensor, mask: Mask | Tensor | None = None) -> Tensor:
        """(..., D) from items (..., L, D); a bool mask broadcasts to (..., 1, L)."""
        present = _present(items, mask)
        if items.shape[-2] == 0:
            return items.sum(-2)
        top = torch.where(present, items, -inf).amax(-2)
        return torch.where(present.any(-2), top, 0)


class FullyConnectedPooling(nn.Module):
    """pooled = W [x_1; …; x_L] + b: one weight for each place, so that it needs a fixed number of items.

    Items that the mask does not allow count as 0.

    >>> FullyConnectedPooling(items=5, dim=8, out_dim=3)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 3])
    """

    def __init__(self, items: int, dim: int, out_dim: int) -> None:
        super().__init__()
        self.items = items
        self.W = nn.Linear(items * dim, out_dim)

    def forward(self, items: Tensor, mask: Mask | Tensor | None = None) -> Tensor:
        """(..., out_dim) from items (..., L, D); ValueError unless L is `items`."""
        if items.shape[-2] != self.items:
            raise ValueError(f"items has shape {tuple(items.shape)}; this pooling is for {self.items} items a bag")
        return self.W(torch.where(_present(items, mask), items, 0).flatten(-2))


def _present(items: Tensor, mask: Mask | Tensor | None) -> Tensor:
    """Bool (..., L, 1): the items that the mask allows."""
    grid = Grid(items.shape[:-2], 1, items.shape[-2], items.device)
    if mask is None:
        return torch.ones(grid.keys, 1, dtype=torch.bool, device=grid.device)
    allowed = as_mask(mask).lay(grid)
    return allowed.expand(*grid.leading, 1, grid.keys).mT
