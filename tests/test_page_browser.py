"""The page in a real browser, offline: what it draws, says and saves, and that every function has a key."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from regard.look.maps import AttentionMap
from regard.look.pages import page

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra `test`")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, such as Debian's package")

SIZE = {"width": 1280, "height": 860}
HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "\u202eevil",
    "\x00",
    "<b>&amp;</b>",
    "x" * 10_000,
    "שלום",
    "\n",
    " ",
]
TOKENS = ["the", "cat", "sat", "on", "the", "mat", "注意力", "."]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page, offline; at the end it fails where there was an error, a warning, a dialog or a request."""
    contexts, said = [], []

    def opened(
        maps: Any, *, locale: str = "en-US", dark: bool = False, size: dict[str, int] = SIZE, **options: Any
    ) -> Any:
        path = page(maps, path=tmp_path / f"{len(contexts)}.html", **options)
        path = tmp_path / f"{len(contexts)}.html"
        scheme = "dark" if dark else "light"
        contexts.append(browser.new_context(viewport=size, locale=locale, color_scheme=scheme, accept_downloads=True))
        contexts[-1].set_offline(True)
        view = contexts[-1].new_page()
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on("dialog", lambda dialog: said.append(dialog.message))
        view.on("request", lambda request: request.url.startswith(("file:", "blob:")) or said.append(request.url))
        view.goto(path.as_uri())
        view.wait_for_selector("html[data-ready]")
        return view

    yield opened
    for context in contexts:
        context.close()
    assert not said


def softmaxed(heads: int, length: int, spread: float = 2.0, seed: int = 0, name: str = "layer 0") -> AttentionMap:
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    scores = spread * torch.randn(1, heads, length, length, generator=torch.Generator().manual_seed(seed))
    return AttentionMap.from_weights(scores.masked_fill(~visible, -inf).softmax(-1), name, visible=visible)


def opened_head(view: Any, m: int = 0, h: int = 0) -> Any:
    view.evaluate(f"regard.open({m}, {h})")
    view.evaluate("regard.draw()")
    return view


def decoded(view: Any, m: int = 0, h: int = 0) -> np.ndarray:
    values = view.evaluate(
        f"(async () => [...(await regard.cells({m}, {h})).array()].map((x) => Number.isNaN(x) ? null : x))()"
    )
    return np.array(values, dtype=float)


def pixels(view: Any, canvas: str = "document.getElementById('canvas')") -> np.ndarray:
    """(height, width, 3) of a canvas."""
    return image(b64decode(view.evaluate(f"{canvas}.toDataURL()").split(",")[1]))


def image(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def wait(view: Any, true: str) -> None:
    """Until an expression is true; playwright's own way is an eval, which the page's policy forbids."""
    for _ in range(100):
        if view.evaluate(f"Boolean({true})"):
            return
        view.wait_for_timeout(50)
    raise AssertionError(f"never: {true}")


def cell_colours(view: Any) -> np.ndarray:
    """The pixel near the upper left corner of each cell, where nothing is written."""
    plot, state = view.evaluate(
        "[regard.plot(), (({ view, cells }) => ({ ...view, rows: cells.rows, keys: cells.keys }))(regard.scene())]"
    )
    assert state["row"] == state["key"] == 0
    y = (plot["top"] + (np.arange(state["rows"]) + 0.14) * state["high"]).astype(int)
    x = (plot["left"] + (np.arange(state["keys"]) + 0.14) * state["wide"]).astype(int)
    return pixels(view)[np.ix_(y, x)]


def table(view: Any) -> np.ndarray:
    """(256, 3): the colour of each code that is drawn."""
    packed = np.array(view.evaluate("[...regard.scene().table]"), dtype=np.uint32)
    return np.stack([(packed >> shift) & 255 for shift in (0, 8, 16)], -1)


def codes(view: Any) -> np.ndarray:
    rows, keys, values = view.evaluate(
        "(({ made, cells }) => [cells.rows, cells.keys, [...made.codes]])(regard.scene())"
    )
    return np.array(values).reshape(rows, keys)


def live(view: Any) -> str:
    return view.text_content("#live")


# --- What it holds and draws.


def test_twelve_by_twelve_heads_open_to_an_overview_of_few_nodes(show):
    view = show([softmaxed(12, 512, seed=seed, name=f"layer {seed}") for seed in range(12)])
    assert view.locator(".head").count() == 144
    opened_head(view, 11, 11)
    assert view.evaluate("document.querySelectorAll('*').length") < 5000
    nodes = view.evaluate(
        "(() => { const w = document.createTreeWalker(document); let n = 1; while (w.nextNode()) n++; return n; })()"
    )
    assert nodes < 5000
    p = softmaxed(12, 512, seed=11).weights()[0, 11].double().numpy()
    visible = np.tril(np.ones((512, 512), dtype=bool))
    found = decoded(view, 11, 11).reshape(512, 512)
    assert np.array_equal(np.isnan(found), ~visible)
    assert (np.abs(found - p)[visible] <= np.maximum(0.02 * p, 1e-3)[visible]).all()


@pytest.mark.parametrize("scale", ["unit", "own", "log"])
def test_each_cell_has_the_colour_of_its_weight(show, scale: str):
    seen = softmaxed(1, 8)
    view = opened_head(show(seen))
    view.select_option("#scale", scale)
    view.evaluate("regard.draw()")
    p = seen.weights()[0, 0].numpy()
    top = {"unit": 1.0, "own": p.max(), "log": p.max()}[scale]
    t = np.clip(np.log10(p / top + 1e-30) / 4 + 1, 0, 1) if scale == "log" else p / top
    viridis = np.array(view.evaluate("ramp('viridis')"))
    drawn = cell_colours(view).astype(int)
    visible = np.tril(np.ones((8, 8), dtype=bool))
    low, high = (viridis[np.clip(np.round(255 * t * by), 0, 255).astype(int)] for by in (0.97, 1.03))
    slack = 6 if scale == "log" else 2
    assert (drawn >= np.minimum(low, high) - slack)[visible].all()
    assert (drawn <= np.maximum(low, high) + slack)[visible].all()
    grey = drawn[~visible]
    assert (np.ptp(grey, axis=-1) < 16).all()  # masked is grey, zero is the lowest colour


def test_a_strong_cell_and_a_sink_of_a_long_map_keep_their_colour(show):
    p = torch.full((4096, 4096), 1e-5)
    p[:, 1234] = 0.9
    p[3001, 77] = 0.9
    view = opened_head(show(AttentionMap.from_weights(p)))
    plot, scene = view.evaluate("[regard.plot(), (({ view }) => view)(regard.scene())]")
    view.evaluate("regard.state.cursor = { row: 4095, key: 4095 }; regard.draw()")
    shown = pixels(view)
    strong = (shown == table(view)[view.evaluate("regard.scene().made.pyramid.largest()")]).all(-1)
    inside = slice(plot["top"] + 2, int(plot["top"] + 4096 * scene["high"]) - 3)
    column = int(plot["left"] + 1234.5 * scene["wide"])
    assert strong[inside, column - 1 : column + 2].any(-1).all()
    y, x = int(plot["top"] + 3001.5 * scene["high"]), int(plot["left"] + 77.5 * scene["wide"])
    assert strong[y - 1 : y + 2, x - 1 : x + 2].any()
    assert "the largest of 8 × 8 cells" in view.evaluate("regard.svg()")


def test_nan_and_rows_that_do_not_sum_to_one_are_said(show):
    p = torch.tensor([[0.5, 0.12, 0.0], [0.2, 0.3, 0.5], [0.3, float("nan"), 0.1]])
    view = opened_head(show(AttentionMap.from_weights(p)))
    assert "rows sum to 0.62 … 1:" in view.evaluate("regard.svg()")
    assert cell_colours(view)[2, 1].tolist() == [0xFF, 0x00, 0xC8]
    assert "NaN" in view.text_content("#statistics")
    view.locator("#canvas").focus()
    view.evaluate("regard.state.cursor = { row: 2, key: 0 }")
    view.keyboard.press("ArrowRight")
    assert live(view) == "query 2, key 1: NaN"


def test_what_is_coarser_is_said(show):
    seen = softmaxed(1, 512)
    kinds = []
    bare = page(AttentionMap.from_weights(torch.eye(2))).size
    for room in (2_000_000, 120_000, 40_000, 25_000):
        view = opened_head(show(seen, budget=bare + room))
        kinds.append(view.text_content("#kind").split("512 × 512 · ")[1])
    assert kinds[0].startswith("exact: each weight within 2 % or ")
    assert any("largest weights of each row" in kind for kind in kinds)
    assert re.fullmatch(r"pooled: each cell is the largest of \d+ × \d+ weights", kinds[-1])


# --- Scales and choices, against NumPy.


def test_times_uniform(show):
    seen = softmaxed(1, 40)
    view = opened_head(show(seen))
    view.select_option("#scale", "uniform")
    u = seen.weights()[0, 0].numpy() * np.arange(1, 41)[:, None]
    places = np.array(view.evaluate("[...regard.scene().made.places]"))
    visible = np.tril(np.ones((40, 40), dtype=bool))
    half = np.log10(max(10, u.max()))
    exact = np.clip((np.log10(u + 1e-30) / half + 1) / 2, 0, 1)
    assert np.abs(places[codes(view)] - exact)[visible].max() < 0.01
    assert (codes(view)[~visible] == 0).all()


def test_observed_over_expected_by_distance(show):
    p = torch.full((6, 6), 0.1).masked_fill(torch.eye(6, dtype=torch.bool), 0.5)
    p[2, 4] = 0.4
    view = opened_head(show(AttentionMap.from_weights(p)))
    view.select_option("#scale", "expected")
    places = np.array(view.evaluate("[...regard.scene().made.places]"))[codes(view)]
    expected = (3 * 0.1 + 0.4) / 4
    assert places[2, 4] == pytest.approx(0.5 + np.log10(0.4 / expected) / 4, abs=0.01)
    assert places[0, 0] == pytest.approx(0.5, abs=0.01)
    assert places[1, 5] == pytest.approx(0.5, abs=0.01)


def test_a_share_of_the_weight_of_each_row(show):
    seen = softmaxed(1, 30)
    view = opened_head(show(seen))
    view.locator("#share").focus()
    view.evaluate(
        "(() => { const s = document.getElementById('share'); s.value = 80; s.dispatchEvent(new Event('change')); })()"
    )
    p = seen.weights()[0, 0].numpy()
    order = -np.sort(-p, -1)
    before = np.cumsum(order, -1) - order
    for row in range(30):
        least = order[row][before[row] < 0.8][-1]
        hidden = codes(view)[row, : row + 1] == 1
        clear = np.abs(p[row, : row + 1] / least - 1) > 0.03  # what is near the limit may be rounded beyond it
        assert np.array_equal(hidden[clear], (p[row, : row + 1] < least)[clear])


def test_sinks_are_hidden_and_flagged(show):
    p = torch.full((20, 20), 0.5 / 19)
    p[:, 3] = 0.5
    view = opened_head(show(AttentionMap.from_weights(p)))
    view.locator("#canvas").focus()
    view.keyboard.press("h")
    assert (codes(view)[:, 3] == 1).all()
    assert (codes(view)[:, :3] > 2).all()
    assert "1 sink hidden (▾)" in view.evaluate("regard.svg()")


def test_two_heads_and_two_recordings_compared(show):
    one, other = softmaxed(2, 12), softmaxed(2, 12, seed=1)
    view = opened_head(show(one, other=other))
    visible = np.tril(np.ones((12, 12), dtype=bool))
    for choice, minus in (("other", other.weights()[0, 0]), ("0:1", one.weights()[0, 1])):
        view.select_option("#compare", choice)
        wait(view, "regard.scene().against")
        view.wait_for_timeout(50)
        apart = (one.weights()[0, 0] - minus).numpy()
        places = np.array(view.evaluate("[...regard.scene().made.places]"))[codes(view)]
        assert np.abs(places * np.abs(apart).max() - apart)[visible].max() < 0.03
        assert (codes(view)[~visible] == 0).all()
    view.click("#back")
    view.select_option("#sort", "difference")
    heads = view.locator(".head").evaluate_all("(all) => all.map((each) => each.dataset.head)")
    apart = (one.weights() - other.weights()).abs().sum((0, 2, 3))
    assert heads == [f"0:{h}" for h in apart.argsort(descending=True).tolist()]


# --- Keys.


def test_every_function_has_a_key(show):
    seen = [softmaxed(3, 8, name="layer 0"), softmaxed(3, 8, seed=1, name="layer 1")]
    view = show(seen, query_tokens=TOKENS)
    state = lambda path: view.evaluate(f"regard.state.{path}")  # noqa: E731
    press = view.keyboard.press

    for _ in range(20):
        press("Tab")
        if view.evaluate("document.activeElement.classList.contains('head')"):
            break
    press("ArrowRight")
    press("ArrowDown")
    assert view.evaluate("document.activeElement.dataset.head") == "1:1"
    press("Enter")
    wait(view, "document.activeElement.id === 'canvas'")
    assert state("head") == [1, 1]

    press("m")
    press("Home")
    assert live(view).startswith("query ")
    row = state("cursor.row")
    press("End")
    assert state("cursor") == {"row": row, "key": 7}
    press("PageUp")
    press("PageUp")
    press("ArrowDown")
    press("Shift+ArrowLeft")
    assert state("cursor") == {"row": 1, "key": 0}
    assert re.fullmatch(r"query 1  cat, key 0  the: 0\.\d+, rank \d", live(view))
    press("Shift+ArrowDown")
    assert state("cursor") == {"row": 7, "key": 0}
    press("s")
    assert state("cursor.key") == seen[1].weights()[0, 1, 7].argmax().item()
    press("n")
    assert state("cursor") != {"row": 7, "key": 0}

    scene = lambda path: view.evaluate(f"regard.scene().{path}")  # noqa: E731
    before = scene("view.wide")
    press("-")
    press("+")
    press("0")
    assert scene("view.wide") == pytest.approx(before)
    for key, name in (("2", "links"), ("3", "text"), ("1", "map")):
        press(key)
        assert state("view") == name
        assert view.locator(f"[data-view={name}]").get_attribute("aria-checked") == "true"
    press("]")
    wait(view, "regard.state.head[1] === 2")
    press("[")
    wait(view, "regard.state.head[1] === 1")
    scale = state("scale")
    press("l")
    assert state("scale") != scale
    press("h")
    assert state("sinks")
    press("<")
    assert state("share") == pytest.approx(0.95)
    press(">")
    assert state("share") == 1
    press("/")
    view.keyboard.type("the")
    assert view.text_content("#found") == "0 of 4"
    press("Enter")
    press("Enter")
    assert state("cursor.row") == 4
    press("Escape")
    press("c")
    assert view.evaluate("document.activeElement.id") == "compare"
    press("Escape")
    view.wait_for_selector("#overview:not([hidden])")
    press("Enter")
    view.wait_for_selector("#one:not([hidden])")
    press("t")
    assert view.get_attribute("html", "data-theme") == "dark"
    press("?")
    assert view.locator("#help[open] dt").count() == view.evaluate("WORDS.en.help.length")
    press("Escape")
    for key, ending in (("p", "png"), ("g", "svg")):
        with view.expect_download() as download:
            press(key)
        assert download.value.suggested_filename == f"Attention-layer-1-head-1-map.{ending}"


def test_each_control_has_a_name(show):
    for locale in ("en-US", "zh-CN"):
        view = opened_head(show(softmaxed(2, 8), query_tokens=TOKENS, locale=locale))
        unnamed = view.evaluate(
            """[...document.querySelectorAll("button, select, input, canvas[tabindex]")]
              .filter((each) => !each.ariaLabel && !(each.closest("label") ?? each).textContent.trim())
              .map((each) => each.id)"""
        )
        assert unnamed == []
        assert view.evaluate("[...document.querySelectorAll('[data-say]')].every((each) => each.textContent)")


def test_the_table_of_pairs_leads_to_the_cell(show):
    seen = softmaxed(1, 8)
    view = opened_head(show(seen, query_tokens=TOKENS))
    p = seen.weights()[0, 0]
    p[torch.arange(8) == 0] = 0  # a row of one key
    third = view.locator("#pairs tr").nth(2)
    row, key = map(int, third.locator("button").get_attribute("data-cell").split(":"))
    third.locator("button").press("Enter")
    assert view.evaluate("regard.state.cursor") == {"row": row, "key": key}
    weights = [float(x) for x in view.locator("#pairs td:last-child").all_text_contents()]
    assert weights == sorted(weights, reverse=True)


# --- Tokens, languages, themes.


def test_hostile_tokens_are_text(show):
    seen = AttentionMap.from_weights(torch.eye(len(HOSTILE)).expand(2, -1, -1), HOSTILE[0])
    view = show(seen, query_tokens=HOSTILE, title=HOSTILE[0])
    assert view.text_content(".layer h2") == HOSTILE[0]
    opened_head(view)
    assert view.locator("img").count() == 0
    assert view.text_content("#title") == HOSTILE[0]
    view.locator("#canvas").focus()
    said = []
    for key in ("1", "2", "3"):
        view.keyboard.press(key)
        view.evaluate("regard.draw()")
        svg = view.evaluate("regard.svg()")
        assert "<img" not in svg
        assert "\x00" not in svg
    for row in range(len(HOSTILE)):
        view.evaluate(f"regard.state.cursor = {{ row: {row}, key: {row} }}")
        view.keyboard.press("ArrowLeft")
        view.keyboard.press("ArrowRight")
        said.append(view.locator("#cell dd").nth(0).text_content())
    assert [text[3:20] for text in said] == [
        HOSTILE[0][:17],
        r"\u202eevil",
        r"\x00",
        "<b>&amp;</b>",
        "x" * 17,
        "שלום",
        r"\n",
        "␣",
    ]
    assert len(said[4]) < 500
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_languages(show):
    seen = softmaxed(2, 8)
    assert show(seen, locale="zh-CN").get_attribute("html", "lang") == "zh-CN"
    assert show(seen, locale="de-DE").get_attribute("html", "lang") == "en"
    view = show(seen, locale="en-US", language="zh")
    assert view.text_content("#contents") == "1 张图 · 2 个头 · 8 × 8"
    view.click("#language")
    assert view.text_content("#contents") == "1 map · 2 heads · 8 × 8"
    keys = view.evaluate("[WORDS.en, WORDS.zh].map((words) => Object.keys(words))")
    assert keys[0] == keys[1]
    assert len(view.evaluate("WORDS.en.help")) == len(view.evaluate("WORDS.zh.help"))


def test_themes(show):
    seen = softmaxed(1, 8)
    paper = lambda view: pixels(view)[-1, -1].tolist()  # noqa: E731
    light, dark = opened_head(show(seen)), opened_head(show(seen, dark=True))
    assert paper(light) == [0xFF] * 3
    assert max(paper(dark)) < 0x30
    dark.select_option("#theme", "light")
    dark.evaluate("regard.draw()")
    assert paper(dark) == [0xFF] * 3


def test_a_small_screen_needs_no_sideways_scrolling(show):
    view = opened_head(show(softmaxed(12, 8), query_tokens=TOKENS, size={"width": 360, "height": 640}))
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
    view.click("#back")
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")


# --- Files.


@pytest.mark.parametrize("name", ["map", "links", "text"])
def test_the_png_and_the_svg_are_the_view(show, browser, name: str):
    view = opened_head(show(softmaxed(1, 8), query_tokens=TOKENS))
    view.click(f"[data-view={name}]")
    view.evaluate("regard.draw()")
    on_screen = pixels(view)
    height, width = on_screen.shape[:2]
    saved = pixels(view, "regard.png()")
    assert np.array_equal(saved[52 : 52 + height, 16 : 16 + width], on_screen)
    svg = view.evaluate("regard.svg()")
    blank = browser.new_page(viewport={"width": saved.shape[1], "height": saved.shape[0]})
    blank.set_content(f"<style>* {{ margin: 0 }} svg {{ display: block }}</style>{svg}")
    drawn = image(blank.screenshot())
    blank.close()
    apart = np.abs(drawn.astype(int) - saved).max(-1)
    assert (apart > 40).mean() < 0.004  # smoothing at the edges of letters and lines
    if name == "map":
        plot, scene = view.evaluate("[regard.plot(), regard.scene().view]")
        y = (52 + plot["top"] + (np.arange(8) + 0.14) * scene["high"]).astype(int)
        x = (16 + plot["left"] + (np.arange(8) + 0.14) * scene["wide"]).astype(int)
        assert np.array_equal(drawn[np.ix_(y, x)], saved[np.ix_(y, x)])


# --- Notebooks.


def test_a_frame_shows_the_page(browser):
    made = page(softmaxed(2, 8), TOKENS)
    view = browser.new_page(viewport=SIZE)
    view.context.set_offline(True)
    said = []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.set_content(made._repr_mimebundle_()["text/html"])
    frame = view.frame_locator("iframe")
    frame.locator(".head").nth(1).click()
    frame.locator("#cell-weight").wait_for()
    assert "head 1" in frame.locator("#name").text_content()
    with view.expect_download() as download:
        frame.locator("#svg").click()
    assert download.value.suggested_filename.endswith(".svg")
    view.close()
    assert not said


@pytest.mark.slow
def test_jupyterlab_shows_the_page_in_a_cell(browser, tmp_path: Path):
    pytest.importorskip("jupyterlab", reason="needs jupyterlab and ipykernel; takes some twenty seconds")
    code = "import torch\nfrom regard.look.maps import AttentionMap\nfrom regard.look.pages import page\n"
    code += "page(AttentionMap.from_weights(torch.eye(3), 'of a notebook'), list('abc'))"
    cell = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": [], "source": code}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    notebook = {"nbformat": 4, "nbformat_minor": 4, "metadata": kernel, "cells": [cell]}
    (tmp_path / "a.ipynb").write_text(json.dumps(notebook))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"token": "", "password": "", "root_dir": str(tmp_path), "port": port, "port_retries": 0}
    options = [f"--ServerApp.{name}={value}" for name, value in settings.items()]
    places = {f"JUPYTER_{name}": str(tmp_path / name) for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *options],
            stdout=log,
            stderr=log,
            env={**os.environ, **places},
        )
    try:
        for _ in range(120):
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        view = browser.new_page(viewport=SIZE)
        view.goto(f"http://127.0.0.1:{port}/lab/tree/a.ipynb")
        frame = view.frame_locator('iframe[title="Attention"]')
        view.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').first.wait_for(timeout=60_000)
        for _ in range(4):  # a dialog of Jupyter's own may take the first keys
            view.keyboard.press("Escape")
            view.locator(".jp-Notebook .jp-Cell .cm-content").first.click(timeout=60_000)
            view.keyboard.press("Shift+Enter")
            with suppress(playwright.TimeoutError):
                frame.locator("#name").wait_for(timeout=30_000)
                break
        assert frame.locator("#name").text_content() == "of a notebook · head 0"
        assert frame.locator("#cell-weight").text_content() == "1"
        view.close()
    finally:
        server.terminate()
        server.wait()
