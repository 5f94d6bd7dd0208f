"""Attention one step at a time: what a decoder asks with each of its queries."""

from regard.decoding.location import LocationSensitive
from regard.decoding.memory import Memory

__all__ = ["LocationSensitive", "Memory"]
