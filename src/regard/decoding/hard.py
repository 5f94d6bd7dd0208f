"""Hard attention: one key, drawn by its weight, in place of the weighted sum of all."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.decoding.memory import Memory
from regard.decoding.pointer import pointer
from regard.masks import Mask
from regard.reference import softmax


class Glimpse(NamedTuple):
    """What came of one query of each sample, or of a row of them: then each has a dimension Lq more."""

    context: Tensor  # (..., Dv): the value of the key, under the dropout of the memory
    weights: Tensor  # (..., Lk): the probability of each key, in float32 at least
    chosen: Tensor  # int64 (...): which key, −1 where there was none to look at
    log_prob: Tensor  # (...): log p of that key, 0 where there was none
    entropy: Tensor  # (...): −Σ_j p_j log p_j in nats


class HardAttention(nn.Module):
    """Attention to one key of each query: j ~ p, context = v_j, p = softmax_j(score(query, k_j)).

    In training the key is drawn by torch's generator; in eval it is the likeliest, of equals the first. Mnih et al.
    2014, "Recurrent Models of Visual Attention"; Xu et al. 2015, "Show, Attend and Tell".

    A choice has no derivative. By itself `context` has gradients in the values alone, and the scores learn by
    `log_prob`, from `Reinforce`, whose gradient is right on average. With `straight_through` they learn by `context`:
    backward takes the choice for softmax((log p + g) / temperature), where g is the Gumbel noise that drew it (Jang,
    Gu & Poole 2017, "Categorical Reparameterization with Gumbel-Softmax"). That gradient is **biased**: its mean is
    not the gradient of the mean. A higher temperature takes noise away, and adds bias as a rule.

    Args:
        straight_through: the temperature of that estimator, above 0; None for REINFORCE.

    Raises:
        ValueError: for a temperature that is not above 0.

    >>> encoded = torch.randn(2, 10, 4)
    >>> memory = Memory(Bilinear(query_dim=6, key_dim=4), encoded, encoded, Lengths(torch.tensor([3, 10])))
    >>> attention, query = HardAttention(), torch.randn(2, 6)
    >>> seen = attention(query, memory)
    >>> torch.equal(seen.context, encoded[torch.arange(2), seen.chosen])
    True
    >>> attention(query.unsqueeze(-2).expand(-1, 100, -1), memory).chosen.shape  # drawn again and again
    torch.Size([2, 100])
    """

    def __init__(self, straight_through: float | None = None) -> None:
        super().__init__()
        if straight_through is not None and not straight_through > 0:
            raise ValueError(f"straight_through is {straight_through}; it must be a temperature above 0, or None")
        self.straight_through = straight_through

    def forward(self, query: Tensor, memory: Memory, mask: Mask | Tensor | None = None) -> Glimpse:
        """Look at one key for each query, (..., Dq) or (..., Lq, Dq); mask and errors are those of `pointer`."""
        log_p = pointer(query, memory, mask)
        drawn = log_p + gumbel_like(log_p) if self.training else log_p
        chosen = F.pad(drawn, (1, 0), value=-inf).argmax(-1) - 1
        here = chosen.unsqueeze(-1) == torch.arange(len(memory), device=chosen.device)
        choice = here.to(log_p.dtype)
        if self.straight_through is not None:
            soft = softmax(drawn / self.straight_through)
            choice = choice + (soft - soft.detach())
        p = log_p.exp()
        return Glimpse(
            context=memory.read(choice),
            weights=p,
            chosen=chosen,
            log_prob=log_p.masked_fill(~here, 0.0).sum(-1),
            entropy=-(p * log_p.masked_fill(log_p == -inf, 0.0)).sum(-1),
        )

    def extra_repr(self) -> str:
        return "" if self.straight_through is None else f"straight_through={self.straight_through}"


def gumbel_like(x: Tensor) -> Tensor:
    """Gumbel noise g in the shape of x: argmax_j(log p_j + g_j) is j with probability p_j."""
    return -torch.empty_like(x).exponential_().log()


class Reinforce(nn.Module):
    """loss = −mean((reward − baseline) log p), whose gradient is on average that of −E[reward] by what chose.

    Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning". The
    baseline takes noise away and adds no bias, for it is of the rewards before these: after each loss, in training
    alone, baseline ← decay · baseline + (1 − decay) · mean(reward), from 0 on (Xu et al. 2015).

    Args:
        decay: in 0 .. 1; 1 leaves the baseline where it is.

    Raises:
        ValueError: for another decay.

    >>> reinforce, log_prob = Reinforce(decay=0.9), torch.tensor([0.5, 0.25]).log().requires_grad_()
    >>> entropy = torch.tensor([0.6931, 0.5623])
    >>> loss = reinforce(torch.tensor([1.0, 0.0]), log_prob) - 0.01 * entropy.mean()  # entropy keeps it looking about
    >>> reinforce.baseline
    tensor(0.0500)
    """

    baseline: Tensor

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; it must lie in 0 .. 1")
        self.decay = decay
        self.register_buffer("baseline", torch.zeros(()))

    def forward(self, reward: Tensor, log_prob: Tensor) -> Tensor:
        """The loss (), from what each choice, or each row of choices, brought and its log-probability, both (...).

        Of a row of choices with one reward log_prob is the sum. No gradient goes through the reward: what else
        depends on it learns by a loss of its own. ValueError where the shapes differ.
        """
        if reward.shape != log_prob.shape:
            shapes = f"reward has shape {tuple(reward.shape)} and log_prob {tuple(log_prob.shape)}"
            raise ValueError(f"{shapes}; they must be of one shape")
        reward = reward.detach().to(self.baseline.dtype)
        loss = -((reward - self.baseline) * log_prob).mean()
        if self.training:
            with torch.no_grad():
                self.baseline.lerp_(reward.mean(), 1 - self.decay)
        return loss

    def extra_repr(self) -> str:
        return f"decay={self.decay}"
