"""Masked attention at the textbook's sizes against the textbook's expression: `python -m benchmarks.toy`.

Queries (2, 1, 8), keys (2, 10, 8), hidden 8, two lengths; one thread; median of alternating rounds. The bar is for
calls that record gradients, as the textbook's do; inference without them is printed beside.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import regard

BAR = 1.25
ROUNDS, CALLS = 101, 100


def masked_softmax(scores: Tensor, valid_lens: Tensor) -> Tensor:
    """As in the textbook: lengths repeated for each query, and a large negative number written over the padding."""
    rows = scores.reshape(-1, scores.shape[-1])
    lens = torch.repeat_interleave(valid_lens, scores.shape[1])
    keys = torch.arange(rows.shape[1], dtype=torch.float32, device=rows.device)
    rows[~(keys[None, :] < lens[:, None])] = -1e6
    return torch.softmax(rows.reshape(scores.shape), dim=-1)


class Naive(torch.nn.Module):
    """The textbook's module: the whole Lq × Lk × H tensor, its weights kept, dropout (0 here)."""

    def __init__(self, query_dim: int, key_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.W_q = torch.nn.Linear(query_dim, hidden_dim, bias=False)
        self.W_k = torch.nn.Linear(key_dim, hidden_dim, bias=False)
        self.w_v = torch.nn.Linear(hidden_dim, 1, bias=False)
        self.dropout = torch.nn.Dropout(0.0)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, valid_lens: Tensor) -> Tensor:
        query, key = self.W_q(query), self.W_k(key)
        features = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1))
        self.attention_weights = masked_softmax(self.w_v(features).squeeze(-1), valid_lens)
        return torch.bmm(self.dropout(self.attention_weights), value)


def seconds_per_call(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, measured in alternation."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            taken[name].append((time.perf_counter() - start) / CALLS)
    return {name: statistics.median(each) for name, each in taken.items()}


def main() -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 1, 8), torch.randn(2, 10, 8), torch.randn(2, 10, 4)
    lens = torch.tensor([2, 6])
    naive = Naive(8, 8, 8)
    score = regard.Additive(8, 8, 8)
    score.load_state_dict(naive.state_dict())
    torch.testing.assert_close(
        regard.attend(query, key, value, score, regard.Lengths(lens)), naive(query, key, value, lens)
    )

    def ours() -> Tensor:
        return regard.attend(query, key, value, score, regard.Lengths(lens))

    def theirs() -> Tensor:
        return naive(query, key, value, lens)

    def without_gradient(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(call)

    missed = False
    for what, change, bar in (
        ("forward", lambda call: call, BAR),
        ("forward + backward", lambda call: lambda: call().sum().backward(), BAR),
        ("inference", without_gradient, None),
    ):
        took = seconds_per_call({"regard": change(ours), "naive": change(theirs)})
        ratio = took["regard"] / took["naive"]
        missed |= bar is not None and ratio > bar
        times = "  ".join(f"{name} {seconds * 1e6:6.1f} µs" for name, seconds in took.items())
        print(f"{what:18}  {times}  ratio {ratio:.2f}" + ("" if bar is None else f", at most {bar}"))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
