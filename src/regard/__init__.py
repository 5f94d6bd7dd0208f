"""Attention with any scoring function, exact and fast, and a clear view of what it looked at."""

from typing import TYPE_CHECKING, Any

from regard.attended import Attended
from regard.decoding import LocationSensitive, Memory
from regard.functional import Explanation, attend, attention, explain, weights
from regard.look import AttentionMap, record, tokens
from regard.masks import Causal, Documents, Keep, Lengths, Mask, Prefix, Window
from regard.modules import Attention, MultiHeadAttention
from regard.normalizers import Entmax15, Normalizer, Sigmoid, Softmax, Sparsemax
from regard.scores import Additive, Bilinear, Cosine, Dot, FunctionScore, GATv2, Gaussian, Laplace, ScaledDot, Score

if TYPE_CHECKING:
    from regard.look import page

__version__ = "0.1.0"
__all__ = [
    "Additive",
    "Attended",
    "Attention",
    "AttentionMap",
    "Bilinear",
    "Causal",
    "Cosine",
    "Documents",
    "Dot",
    "Entmax15",
    "Explanation",
    "FunctionScore",
    "GATv2",
    "Gaussian",
    "Keep",
    "Laplace",
    "Lengths",
    "LocationSensitive",
    "Mask",
    "Memory",
    "MultiHeadAttention",
    "Normalizer",
    "Prefix",
    "ScaledDot",
    "Score",
    "Sigmoid",
    "Softmax",
    "Sparsemax",
    "Window",
    "attend",
    "attention",
    "explain",
    "page",
    "record",
    "tokens",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name == "page":  # which needs more than torch
        from regard.look import page

        return page
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
