"""Scoring functions: how well a query and a key match.

Each is a projection of either side, whose cost is linear in length, and a pair function from the few in
`regard.reference`:  score(q_i, k_j) = pair(project_query(q_i), project_key(k_j)).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.reference import AdditivePair, DotPair, FunctionPair, L1Pair, L2Pair, Pair, widened

Activation = Literal["tanh", "relu", "leaky_relu", "sigmoid"]


class Score(nn.Module, ABC):
    """A scoring function. `heads` > 1 says that its projections insert a head dimension before the last two."""

    heads: int = 1

    @abstractmethod
    def project_query(self, query: Tensor) -> Tensor:
        """(..., Lq, Dq) to (..., Lq, D), or (..., heads, Lq, D)."""

    @abstractmethod
    def project_key(self, key: Tensor) -> Tensor:
        """(..., Lk, Dk) to (..., Lk, D), or (..., heads, Lk, D)."""

    @abstractmethod
    def pair(self) -> Pair:
        """The pair function of the projections."""


class Dot(Score):
    """score = qᵀk, for queries and keys of one size. Luong, Pham & Manning 2015 (*dot*).

    >>> weights(torch.ones(1, 2), torch.eye(2), Dot())
    tensor([[0.5000, 0.5000]])
    """

    def project_query(self, query: Tensor) -> Tensor:
        return query

    def project_key(self, key: Tensor) -> Tensor:
        return key

    def pair(self) -> Pair:
        return DotPair(1.0)


class ScaledDot(Score):
    """score = qᵀk / √D, whose variance does not grow with the size D. Vaswani et al. 2017.

    >>> attend(torch.randn(2, 8), torch.randn(5, 8), torch.randn(5, 3), ScaledDot()).shape
    torch.Size([2, 3])
    """

    def project_query(self, query: Tensor) -> Tensor:
        return query

    def project_key(self, key: Tensor) -> Tensor:
        return key

    def pair(self) -> Pair:
        return DotPair()


class Bilinear(Score):
    """score = qᵀWk, which is not symmetric. Luong, Pham & Manning 2015 (*general*).

    `W` maps queries to the keys' size: W.weight is (key_dim, query_dim).

    >>> attend(torch.randn(2, 3), torch.randn(5, 8), torch.randn(5, 4), Bilinear(3, 8)).shape
    torch.Size([2, 4])
    """

    def __init__(self, query_dim: int, key_dim: int) -> None:
        super().__init__()
        self.W = nn.Linear(query_dim, key_dim, bias=False)

    def project_query(self, query: Tensor) -> Tensor:
        return through(self.W, query, "query")

    def project_key(self, key: Tensor) -> Tensor:
        return key

    def pair(self) -> Pair:
        return DotPair(1.0)


class Cosine(Score):
    """score = cos(q, k) / temperature. Graves, Wayne & Danihelka 2014.

    >>> weights(torch.tensor([[3.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0]]), Cosine(temperature=1.0))
    tensor([[0.7311, 0.2689]])
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if isinstance(temperature, Tensor) or not temperature > 0:
            raise ValueError(f"temperature is {temperature!r}; it must be a number above 0")
        self.temperature = temperature

    def project_query(self, query: Tensor) -> Tensor:
        return F.normalize(widened(query), dim=-1).to(query.dtype)

    def project_key(self, key: Tensor) -> Tensor:
        return F.normalize(widened(key), dim=-1).to(key.dtype)

    def pair(self) -> Pair:
        return DotPair(1 / self.temperature)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class _Bandwidth(Score):
    """Scores of distances, measured in units of a bandwidth, which may be learnt."""

    def __init__(self, bandwidth: float = 1.0, learnable: bool = False) -> None:
        super().__init__()
        if not bandwidth > 0:
            raise ValueError(f"bandwidth is {bandwidth}; it must be above 0")
        self.bandwidth: Tensor
        if learnable:
            self.bandwidth = nn.Parameter(torch.tensor(float(bandwidth)))
        else:
            self.register_buffer("bandwidth", torch.tensor(float(bandwidth)))

    def project_query(self, query: Tensor) -> Tensor:
        return widened(query) / self.bandwidth

    def project_key(self, key: Tensor) -> Tensor:
        return widened(key) / self.bandwidth

    def extra_repr(self) -> str:
        return f"bandwidth={self.bandwidth.item():.4g}"


class Gaussian(_Bandwidth):
    """score = −½ ‖(q − k) / bandwidth‖²: Nadaraya–Watson kernel regression with a Gaussian kernel.

    Nadaraya 1964, "On Estimating Regression"; Watson 1964, "Smooth Regression Analysis".

    >>> weights(torch.zeros(1, 1), torch.tensor([[0.0], [2.0]]), Gaussian(bandwidth=2.0))
    tensor([[0.6225, 0.3775]])
    """

    def pair(self) -> Pair:
        return L2Pair()


class Laplace(_Bandwidth):
    """score = −‖(q − k) / bandwidth‖₁: kernel regression with a Laplace kernel, less moved by outliers.

    Kim et al. 2019, "Attentive Neural Processes" (*Laplace*).

    >>> weights(torch.zeros(1, 1), torch.tensor([[0.0], [2.0]]), Laplace(bandwidth=2.0))
    tensor([[0.7311, 0.2689]])
    """

    def pair(self) -> Pair:
        return L1Pair()


class Additive(Score):
    """score = Σ_h v_h · activation((W_q q)_h + (W_k k)_h). Bahdanau, Cho & Bengio 2015.

    It is Luong's *concat* too: W [q; k] = W_q q + W_k k. Parameters are named as in the textbook: W_q.weight is
    (heads · hidden_dim, query_dim), W_k.weight (heads · hidden_dim, key_dim) and w_v.weight (heads, hidden_dim).

    Args:
        query_dim, key_dim: sizes of queries and keys; None reads them from the first call.
        hidden_dim: hidden units of each head.
        heads: above 1, scores are (..., heads, Lq, Lk) and outputs (..., heads, Lq, Dv).
        activation: "tanh", "relu", "leaky_relu" or "sigmoid".
        bias: one more term inside the activation, W_q.bias.
        weight_norm: v = g · w_v / ‖w_v‖ with a learnt g for each head (Salimans & Kingma 2016).
        negative_slope: of leaky_relu.

    >>> score = Additive(query_dim=20, key_dim=2, hidden_dim=8)
    >>> attend(torch.randn(2, 3, 20), torch.randn(2, 10, 2), torch.randn(2, 10, 4), score).shape
    torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        query_dim: int | None,
        key_dim: int | None,
        hidden_dim: int,
        *,
        heads: int = 1,
        activation: Activation = "tanh",
        bias: bool = False,
        weight_norm: bool = False,
        negative_slope: float = 0.2,
    ) -> None:
        super().__init__()
        if activation not in ("tanh", "relu", "leaky_relu", "sigmoid"):
            raise ValueError(f"activation is {activation!r}; it must be 'tanh', 'relu', 'leaky_relu' or 'sigmoid'")
        for name, size in (("heads", heads), ("hidden_dim", hidden_dim)):
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be 1 or more")
        self.heads, self.activation, self.negative_slope = heads, activation, negative_slope
        self.W_k = _linear(key_dim, heads * hidden_dim, bias=False)
        self.W_q = _linear(query_dim, heads * hidden_dim, bias)
        self.w_v = nn.Linear(hidden_dim, heads, bias=False)
        self.g = None
        if weight_norm:
            self.g = nn.Parameter(self.w_v.weight.detach().norm(dim=-1))

    def project_query(self, query: Tensor) -> Tensor:
        return self._per_head(through(self.W_q, query, "query"))

    def project_key(self, key: Tensor) -> Tensor:
        return self._per_head(through(self.W_k, key, "key"))

    def pair(self) -> Pair:
        v = self.w_v.weight
        if self.g is not None:
            v = F.normalize(v, dim=-1) * self.g.unsqueeze(-1)
        if self.heads > 1:
            v = v[:, None, None]
        return AdditivePair(v, self.activation, self.negative_slope)

    def _per_head(self, x: Tensor) -> Tensor:
        return x if self.heads == 1 else x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)


class GATv2(Additive):
    """score = Σ_h v_h · LeakyReLU((W_q q)_h + (W_k k)_h): additive attention of graphs. Brody, Alon & Yahav 2022.

    >>> attend(torch.randn(6, 4), torch.randn(6, 4), torch.randn(6, 4), GATv2(4, 4, 8, heads=2)).shape
    torch.Size([2, 6, 4])
    """

    def __init__(
        self,
        query_dim: int | None,
        key_dim: int | None,
        hidden_dim: int,
        *,
        heads: int = 1,
        bias: bool = False,
        negative_slope: float = 0.2,
    ) -> None:
        super().__init__(
            query_dim,
            key_dim,
            hidden_dim,
            heads=heads,
            activation="leaky_relu",
            bias=bias,
            negative_slope=negative_slope,
        )


class FunctionScore(Score):
    """score = function(query, key): anything a user writes, from (..., Lq, Dq) and (..., Lk, Dk) to (..., Lq, Lk).

    Gradients reach what the function captures; an nn.Module's parameters are this score's. It may be called with
    blocks of the query rows, and again in backward or for the weights: each row's scores must not depend on the other
    rows, nor on their number, nor on chance.

    >>> score = FunctionScore(lambda query, key: -torch.cdist(query, key))
    >>> attend(torch.randn(2, 3), torch.randn(5, 3), torch.randn(5, 4), score).shape
    torch.Size([2, 4])
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(f"function is {function!r}; it must be callable")
        self.function = function

    def project_query(self, query: Tensor) -> Tensor:
        return query

    def project_key(self, key: Tensor) -> Tensor:
        return key

    def pair(self) -> Pair:
        return FunctionPair(self.function)


def through(linear: nn.Linear, x: Tensor, name: str) -> Tensor:
    """linear(x), or an error that names x."""
    try:
        return linear(x)
    except RuntimeError:
        if x.shape[-1] != linear.in_features:
            size = f"{name} has shape {tuple(x.shape)}, of size {x.shape[-1]}"
            raise ValueError(f"{size}; W was made for size {linear.in_features}") from None
        if x.dtype != linear.weight.dtype:
            raise ValueError(f"{name} is {x.dtype}; the parameters are {linear.weight.dtype}") from None
        raise


def _linear(inputs: int | None, outputs: int, bias: bool) -> nn.Linear:
    return nn.LazyLinear(outputs, bias=bias) if inputs is None else nn.Linear(inputs, outputs, bias=bias)
