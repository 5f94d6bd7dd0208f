"""Seeing attention: recorded out of any model, kept as maps, counted, drawn, and shown on one page.

What needs more than torch is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from regard.look.maps import AttentionMap
from regard.look.recorder import Recording, record
from regard.look.stats import Statistics, alignment, alignment_error_rate, rollout, table
from regard.look.tokens import Tokens, grouped, grouped_map, tokens

if TYPE_CHECKING:
    from regard.look.heatmaps import heatmap, heatmap_difference, show_heatmaps, show_maps
    from regard.look.lines import links
    from regard.look.pages import Page, page
    from regard.look.reading import read
    from regard.look.saved import load, save
    from regard.look.texts import record_text

__all__ = [
    "AttentionMap",
    "Page",
    "Recording",
    "Statistics",
    "Tokens",
    "alignment",
    "alignment_error_rate",
    "grouped",
    "grouped_map",
    "heatmap",
    "heatmap_difference",
    "links",
    "load",
    "page",
    "read",
    "record",
    "record_text",
    "rollout",
    "save",
    "show_heatmaps",
    "show_maps",
    "table",
    "tokens",
]
_LATER = {
    "heatmaps": ("heatmap", "heatmap_difference", "show_heatmaps", "show_maps"),
    "lines": ("links",),
    "pages": ("Page", "page"),
    "reading": ("read",),
    "saved": ("load", "save"),
    "texts": ("record_text",),
}


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            return getattr(import_module(f"regard.look.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
