"""Attention with any scoring function, exact and fast, and a clear view of what it looked at."""

from regard.attended import Attended
from regard.decoding import Memory
from regard.functional import Explanation, attend, attention, explain, weights
from regard.masks import Causal, Documents, Keep, Lengths, Mask, Prefix, Window
from regard.modules import Attention, MultiHeadAttention
from regard.normalizers import Entmax15, Normalizer, Sigmoid, Softmax, Sparsemax
from regard.scores import Additive, Bilinear, Cosine, Dot, FunctionScore, GATv2, Gaussian, Laplace, ScaledDot, Score

__version__ = "0.1.0"
__all__ = [
    "Additive",
    "Attended",
    "Attention",
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
    "weights",
]
