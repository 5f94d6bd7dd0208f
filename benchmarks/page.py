"""What a page costs: `python -m benchmarks page`.

Pages of 12 layers × 12 heads × 512 tokens, of scores of variance 1 and of peaky ones, and of one map of 8,192 tokens
are built, and opened in Chromium without a network. Fails where a file is larger, is built, opens or draws slower, or
has more of a document than it may. Needs playwright, and Chromium in the path.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from playwright.sync_api import Browser, sync_playwright

from regard.look import AttentionMap, page

LIMITS = {
    "many": {"MB": 32, "s to build": 15, "s to a usable overview": 2, "elements": 5000, "ms a frame, of 95 in 100": 16},
    "long": {"MB": 40, "elements": 5000, "ms a frame, of 95 in 100": 16},
}
PAN = """() => {  // times of drawing while the view moves, at four zooms
    const { view } = regard.scene(), times = [];
    for (let zoom = 0; zoom < 4; zoom++) {
        for (let n = 0; n < 40; n++) {
            const start = performance.now();
            view.key += 3;
            view.row += 1;
            regard.draw();
            times.push(performance.now() - start);
        }
        view.wide *= 2.3;
        view.high *= 2.3;
    }
    return times.sort((a, b) => a - b);
}"""


def many(spread: float) -> list[AttentionMap]:
    maps = []
    for layer in range(12):
        query, key = torch.randn(1, 12, 512, 64), torch.randn(1, 12, 512, 64)
        maps.append(AttentionMap.from_qk(spread * query, key, f"layer {layer}"))
    return maps


def long() -> list[AttentionMap]:
    return [AttentionMap.from_qk(torch.randn(1, 1, 8192, 64), torch.randn(1, 1, 8192, 64), "layer 0")]


def measured(maps: list[AttentionMap], budget: str, browser: Browser, folder: Path) -> dict[str, float]:
    """What a page of these maps costs, by the names in LIMITS."""
    start = perf_counter()
    made = page(maps, path=folder / "page.html", budget=budget)
    found: dict[str, Any] = {"MB": made.size / 1e6, "s to build": perf_counter() - start}
    context = browser.new_context(viewport={"width": 1400, "height": 900}, offline=True)
    shown = context.new_page()
    start = perf_counter()
    shown.goto((folder / "page.html").as_uri(), wait_until="commit")
    shown.wait_for_selector("html[data-ready]", state="attached")
    found["s to a usable overview"] = perf_counter() - start
    shown.evaluate("regard.open(0, 0)")
    found["elements"] = shown.evaluate("document.querySelectorAll('*').length")
    times = shown.evaluate(PAN)
    found["ms a frame, of 95 in 100"] = times[len(times) * 95 // 100]
    context.close()
    return found


def main() -> int:
    argparse.ArgumentParser(description="What a page costs in bytes and time.").parse_args()
    torch.manual_seed(0)
    missed = 0
    cases = (("many", "variance 1", many(1.0)), ("many", "peaky", many(5.0)), ("long", "8,192 tokens", long()))
    with sync_playwright() as started, tempfile.TemporaryDirectory() as folder:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for kind, name, maps in cases:
            limits = LIMITS[kind]
            for what, value in measured(maps, f"{limits['MB']} MB", browser, Path(folder)).items():
                over = value > limits.get(what, float("inf"))
                missed += over
                limit = f"≤ {limits[what]:g}" if what in limits else ""
                print(f"{'missed' if over else 'met' if limit else '':7}{name:14}{value:10.2f} {limit:7} {what}")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
