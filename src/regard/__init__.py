"""Attention with any scoring function, exact and fast, and a clear view of what it looked at."""

from typing import TYPE_CHECKING, Any

from regard.attended import Attended
from regard.decoding import (
    Coverage,
    Forward,
    HardAttention,
    LocalMonotonic,
    LocalPredictive,
    LocationSensitive,
    Memory,
    Monotonic,
    MonotonicChunkwise,
    Reinforce,
    coverage_loss,
    log_weights,
    pointer,
    pointer_generator,
)
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
    "Coverage",
    "Documents",
    "Dot",
    "Entmax15",
    "Explanation",
    "Forward",
    "FunctionScore",
    "GATv2",
    "Gaussian",
    "HardAttention",
    "Keep",
    "Laplace",
    "Lengths",
    "LocalMonotonic",
    "LocalPredictive",
    "LocationSensitive",
    "Mask",
    "Memory",
    "Monotonic",
    "MonotonicChunkwise",
    "MultiHeadAttention",
    "Normalizer",
    "Prefix",
    "Reinforce",
    "ScaledDot",
    "Score",
    "Sigmoid",
    "Softmax",
    "Sparsemax",
    "Window",
    "attend",
    "attention",
    "coverage_loss",
    "explain",
    "log_weights",
    "page",
    "pointer",
    "pointer_generator",
    "record",
    "tokens",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name == "page":  # which needs more than torch
        from regard.look import page

        return page
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
