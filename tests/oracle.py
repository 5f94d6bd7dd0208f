"""What the paths are judged by: float64 attention and its gradients as plain loops, sharing no code with them.

`Case` names a problem; `expected` is the exact answer for its float32 inputs; `naive` is the textbook's expression
in float32, whose error is the yardstick: a path may be 3 × as far from the exact answer (root mean square), and a
rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import regard

IMPLEMENTATIONS = ("reference", "chunked", "sdpa", "cpu")
EPS = torch.finfo(torch.float32).eps
BATCH, QUERY_DIM, KEY_DIM, VALUE_DIM = 2, 5, 5, 5  # values as wide as keys, or sdpa would refuse


def score_for(impl: str) -> regard.Score:
    """One without parameters that the implementation takes."""
    return regard.Laplace() if impl == "cpu" else regard.ScaledDot()


# --- Scores and masks, from their definitions.


def activation(name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The activation and its derivative."""
    if name == "tanh":
        return np.tanh(x), 1 - np.tanh(x) ** 2
    if name == "sigmoid":
        s = 1 / (1 + np.exp(-x))
        return s, s * (1 - s)
    slope = {"relu": 0.0, "leaky_relu": 0.2}[name]
    return np.where(x > 0, x, slope * x), np.where(x > 0, 1.0, slope)


def pair(kind: str, a: np.ndarray, b: np.ndarray, v: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """The score of one projected query and key, and its derivatives by a, b and v."""
    if kind == "dot":
        return float(a @ b), b, a, 0 * v
    if kind == "scaled_dot":
        scale = 1 / np.sqrt(len(a))
        return float(a @ b) * scale, b * scale, a * scale, 0 * v
    if kind == "l2":
        return -0.5 * float(((a - b) ** 2).sum()), b - a, a - b, 0 * v
    if kind == "l1":
        return -float(np.abs(a - b).sum()), -np.sign(a - b), np.sign(a - b), 0 * v
    f, df = activation(kind, a + b)
    return float(v @ f), v * df, v * df, f


def may_attend(mask: str, sample: int, i: int, j: int, queries: int, keys: int) -> bool:
    lens = (min(keys // 2 + 1, keys), 0)  # of the two samples: the second is empty
    place = i + keys - queries
    match mask:
        case "none":
            return True
        case "lengths":
            return j < lens[sample]
        case "left_padding":
            return j >= keys - lens[sample]
        case "causal":
            return j <= place
        case "window":
            return abs(j - place) <= 1
        case "lengths & causal":
            return j < lens[sample] and j <= place
        case "sink | window":
            return (j < 1 or abs(j - place) <= 1) and j <= place
        case "keep":
            return (7 * i + 3 * j + sample) % 3 != 0 and i != 1
    raise ValueError(mask)


def mask_of(mask: str, queries: int, keys: int) -> regard.Mask | None:
    """The same as the library's mask."""
    lens = torch.tensor([min(keys // 2 + 1, keys), 0])
    match mask:
        case "lengths":
            return regard.Lengths(lens)
        case "left_padding":
            return regard.Lengths(start=keys - lens)
        case "causal":
            return regard.Causal()
        case "window":
            return regard.Window(1, 1)
        case "lengths & causal":
            return regard.Lengths(lens) & regard.Causal()
        case "sink | window":
            return (regard.Lengths(min(1, keys)) | regard.Window(1, 1)) & regard.Causal()
        case "keep":
            allowed = [
                [[may_attend(mask, n, i, j, queries, keys) for j in range(keys)] for i in range(queries)]
                for n in range(BATCH)
            ]
            return regard.Keep(torch.tensor(allowed, dtype=torch.bool).reshape(BATCH, queries, keys))
    return None


# --- Cases.


@dataclass(frozen=True)
class Case:
    score: str = "additive"
    mask: str = "lengths"
    queries: int = 3
    keys: int = 17
    layout: str = "contiguous"

    def __str__(self) -> str:
        return f"{self.score}, {self.mask}, {self.queries} x {self.keys}, {self.layout}"


SCORES = {
    "dot": ("dot", regard.Dot),
    "scaled_dot": ("scaled_dot", regard.ScaledDot),
    "bilinear": ("dot", lambda: regard.Bilinear(QUERY_DIM, KEY_DIM)),
    "gaussian": ("l2", regard.Gaussian),
    "laplace": ("l1", regard.Laplace),
    "additive": ("tanh", lambda: regard.Additive(QUERY_DIM, KEY_DIM, 8)),
    "additive_bias": ("tanh", lambda: regard.Additive(QUERY_DIM, KEY_DIM, 8, bias=True)),
    "additive_relu": ("relu", lambda: regard.Additive(QUERY_DIM, KEY_DIM, 8, activation="relu")),
    "additive_sigmoid": ("sigmoid", lambda: regard.Additive(QUERY_DIM, KEY_DIM, 8, activation="sigmoid")),
    "gatv2": ("leaky_relu", lambda: regard.GATv2(QUERY_DIM, KEY_DIM, 8)),
}
MASKS = ("none", "lengths", "left_padding", "causal", "window", "lengths & causal", "sink | window", "keep")
LAYOUTS = ("contiguous", "transposed", "strided", "broadcast")
CASES = (
    *(Case(score=score) for score in SCORES),
    *(Case(mask=mask) for mask in MASKS),
    *(Case(score="scaled_dot", mask=mask) for mask in MASKS),
    *(Case(keys=keys) for keys in (0, 1, 15, 16, 255, 257)),
    *(Case(score="dot", mask="causal", queries=keys, keys=keys) for keys in (1, 15, 16, 17)),
    *(Case(queries=queries) for queries in (0, 1, 31)),
    *(Case(mask="causal", queries=19, keys=7) for _ in range(1)),
    *(Case(layout=layout) for layout in LAYOUTS[1:]),
    *(Case(score="scaled_dot", layout=layout) for layout in LAYOUTS[1:]),
)


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    score: regard.Score
    cotangent: Tensor  # of the output


def inputs(case: Case) -> Inputs:
    """float32 leaves with gradients, NaN where no pair looks."""
    generator = torch.Generator().manual_seed(len(str(case)) + case.keys)

    def draw(length: int, size: int) -> Tensor:
        x = torch.randn(BATCH, length, size, generator=generator)
        if case.layout == "transposed":
            x = x.mT.contiguous().mT
        elif case.layout == "strided":
            x = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
        elif case.layout == "broadcast":
            x = x[:1].expand(BATCH, -1, -1)
        return x

    query, key, value = draw(case.queries, QUERY_DIM), draw(case.keys, KEY_DIM), draw(case.keys, VALUE_DIM)
    torch.manual_seed(case.keys)
    score = SCORES[case.score][1]()
    allowed = allowed_of(case)
    if case.layout == "contiguous":
        query[~torch.from_numpy(allowed.any(2))] = torch.nan
        key[~torch.from_numpy(allowed.any(1))] = torch.nan
        value[~torch.from_numpy(allowed.any(1))] = torch.nan
    cotangent = torch.randn(BATCH, case.queries, VALUE_DIM, generator=generator)
    return Inputs(query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), score, cotangent)


def allowed_of(case: Case) -> np.ndarray:
    """(B, Lq, Lk)."""
    allowed = np.zeros((BATCH, case.queries, case.keys), dtype=bool)
    for n, i, j in np.ndindex(*allowed.shape):
        allowed[n, i, j] = may_attend(case.mask, n, i, j, case.queries, case.keys)
    return allowed


# --- The exact answer: output, and gradients of query, key, value and every parameter, by name.


def expected(case: Case, given: Inputs) -> dict[str, np.ndarray]:
    query, key, value, cotangent = (
        np.nan_to_num(x.detach().double().numpy()) for x in (given.query, given.key, given.value, given.cotangent)
    )
    kind = SCORES[case.score][0]
    parameters = {name: p.detach().double().numpy() for name, p in given.score.named_parameters()}
    w_q, w_k, v = projections(case, parameters)
    bias = parameters.get("W_q.bias", 0.0)
    allowed = allowed_of(case)
    out, d_value = np.zeros((BATCH, case.queries, VALUE_DIM)), np.zeros_like(value)
    a, b = query @ w_q.T + bias, key @ w_k.T
    d_a, d_b, d_v = np.zeros_like(a), np.zeros_like(b), np.zeros_like(v)
    for n in range(BATCH):
        for i in range(case.queries):
            seen = [j for j in range(case.keys) if allowed[n, i, j]]
            if not seen:
                continue
            pairs = [pair(kind, a[n, i], b[n, j], v) for j in seen]
            s = np.array([score for score, *_ in pairs])
            p = np.exp(s - s.max())
            p /= p.sum()
            d_p = np.array([cotangent[n, i] @ value[n, j] for j in seen])
            d_s = p * (d_p - p @ d_p)
            for j, weight, g, (_, by_a, by_b, by_v) in zip(seen, p, d_s, pairs, strict=True):
                out[n, i] += weight * value[n, j]
                d_value[n, j] += weight * cotangent[n, i]
                d_a[n, i] += g * by_a
                d_b[n, j] += g * by_b
                d_v += g * by_v
    answer = {"out": out, "query": d_a @ w_q, "key": d_b @ w_k, "value": d_value}
    gradients = {
        "W_q.weight": np.einsum("nih,nid->hd", d_a, query),
        "W.weight": np.einsum("nih,nid->hd", d_a, query),
        "W_k.weight": np.einsum("njh,njd->hd", d_b, key),
        "w_v.weight": d_v[None],
        "W_q.bias": (d_a * allowed.any(2, keepdims=True)).sum((0, 1)),
    }
    return answer | {name: gradients[name] for name in parameters}


def projections(case: Case, parameters: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if "W_q.weight" in parameters:
        return parameters["W_q.weight"], parameters["W_k.weight"], parameters["w_v.weight"][0]
    return parameters.get("W.weight", np.eye(QUERY_DIM)), np.eye(KEY_DIM), np.zeros(1)


# --- The yardstick: the textbook's expression in float32.


def naive(case: Case, given: Inputs) -> dict[str, Tensor]:
    leaves = {name: torch.nan_to_num(getattr(given, name).detach()) for name in ("query", "key", "value")}
    query, key, value = (x.requires_grad_() for x in leaves.values())
    a, b = given.score.project_query(query), given.score.project_key(key)
    kind = SCORES[case.score][0]
    if kind in ("dot", "scaled_dot"):
        s = a @ b.mT * (1.0 if kind == "dot" else QUERY_DIM**-0.5)
    else:
        x = a[:, :, None] - b[:, None] if kind in ("l1", "l2") else a[:, :, None] + b[:, None]
        if kind == "l1":
            s = -x.abs().sum(-1)
        elif kind == "l2":
            s = -0.5 * x.square().sum(-1)
        else:
            functions = {
                "tanh": torch.tanh,
                "sigmoid": torch.sigmoid,
                "relu": torch.relu,
                "leaky_relu": nn.LeakyReLU(0.2),
            }
            s = functions[kind](x) @ dict(given.score.named_parameters())["w_v.weight"][0]
    allowed = torch.from_numpy(allowed_of(case))
    nothing = ~allowed.any(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(~allowed, -inf).masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
    out = p @ value
    given.score.zero_grad()
    out.backward(given.cotangent)
    answer = {"out": out.detach(), "query": query.grad, "key": key.grad, "value": value.grad}
    answer |= {name: p.grad for name, p in given.score.named_parameters()}
    return {name: x.clone() for name, x in answer.items() if x is not None}


def check(case: Case, impl: str) -> None:
    """AssertionError where the implementation is further from the exact answer than its budget."""
    given = inputs(case)
    exact, yardstick = expected(case, given), naive(case, given)
    given.score.zero_grad()
    mask = mask_of(case.mask, case.queries, case.keys)
    out = regard.attend(given.query, given.key, given.value, given.score, mask, impl=impl)
    out.backward(given.cotangent)
    actual = {"out": out.detach(), "query": given.query.grad, "key": given.key.grad, "value": given.value.grad}
    actual |= {name: p.grad for name, p in given.score.named_parameters()}
    for name, truth in exact.items():
        found = actual[name]
        assert found is not None, f"{name} has no gradient"
        assert found.shape == truth.shape, f"{name} has shape {tuple(found.shape)}, not {truth.shape}"
        if case.layout == "broadcast" and name in ("query", "key", "value"):
            continue  # a leaf that is itself expanded: its rows share memory, and the gradient is not one of them
        assert torch.isfinite(found).all(), f"{name} is not finite"
        error, budget = rms(found - torch.from_numpy(truth)), 3 * rms(yardstick[name] - torch.from_numpy(truth))
        floor = EPS * max(1.0, float(np.abs(truth).max(initial=0.0)))
        assert error <= budget + floor, f"{case}: {name} is off by {error:.2e}; its budget is {budget + floor:.2e}"


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0
