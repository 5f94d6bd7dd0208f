"""Pictures of attention: arrays in, matplotlib out."""

from regard.look.heatmaps import heatmap, show_heatmaps

__all__ = ["heatmap", "show_heatmaps"]
