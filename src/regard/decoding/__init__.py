"""Attention one step at a time: what a decoder asks with each of its queries."""

from regard.decoding.coverage import Coverage, coverage_loss
from regard.decoding.forward import Forward
from regard.decoding.hard import HardAttention, Reinforce
from regard.decoding.local import LocalMonotonic, LocalPredictive
from regard.decoding.location import LocationSensitive
from regard.decoding.memory import Memory
from regard.decoding.monotonic import Monotonic, MonotonicChunkwise
from regard.decoding.pointer import log_weights, pointer, pointer_generator

__all__ = [
    "Coverage",
    "Forward",
    "HardAttention",
    "LocalMonotonic",
    "LocalPredictive",
    "LocationSensitive",
    "Memory",
    "Monotonic",
    "MonotonicChunkwise",
    "Reinforce",
    "coverage_loss",
    "log_weights",
    "pointer",
    "pointer_generator",
]
