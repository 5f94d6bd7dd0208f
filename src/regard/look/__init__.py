"""Pictures of attention: arrays in, matplotlib out."""

from .heatmaps import heatmap, show_heatmaps

__all__ = ["heatmap", "show_heatmaps"]
