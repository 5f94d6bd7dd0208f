"""Pages: every weight as it is read back from the file, by a decoder of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from html import unescape
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.look import encoding
from regard.look.maps import AttentionMap
from regard.look.pages import Page, page

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "\u202eevil",
    "\x00",
    "a\u2028b&amp;",
    "x" * 10_000,
    "\ud83d",
]


@dataclass
class Head:
    """A head as a reader of the file finds it."""

    said: dict[str, Any]
    codes: np.ndarray

    @property
    def weights(self) -> np.ndarray:
        """NaN where there is none."""
        a = self.said["tolerance"]
        n = self.codes.astype(np.float64) - 2
        p = np.where(n <= 25, 2 * a * n, 50 * a * 1.04 ** (n - 25))
        return np.where((self.codes < 2) | (self.codes == 255), np.nan, p)


def blocks_of(html: str, type_: str) -> dict[str, str]:
    return dict(re.findall(rf'<script type="{type_}" id="([\w-]+)">([^<]*)</script>', html))


def read(made: Page) -> tuple[dict[str, Any], list[list[Head]]]:
    """What the file says, and the heads of each map."""
    described = json.loads(blocks_of(made.html, "application/json")["described"])
    data = blocks_of(made.html, "application/octet-stream;base64")

    def heads(n: int, said: dict[str, Any]) -> Iterator[Head]:
        for head, text in zip(said["heads"], data[f"data-{n}"].split("\n"), strict=True):
            shape = [-(-said[side] // each) for side, each in zip(("queries", "keys"), head["block"], strict=True)]
            yield Head(head, np.frombuffer(zlib.decompress(b64decode(text)), np.uint8).reshape(shape))

    return described, [list(heads(n, said)) for n, said in enumerate(described["maps"])]


def softmaxed(*shape: int, spread: float = 1.0, causal: bool = False, seed: int = 0) -> AttentionMap:
    scores = spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    visible = torch.ones(shape[-2:], dtype=torch.bool)
    if causal:
        visible = visible.tril(shape[-1] - shape[-2])
    return AttentionMap.from_weights(scores.masked_fill(~visible, -inf).softmax(-1), "layer 0", visible=visible)


def assert_close(head: Head, p: Tensor, tolerance: float = 1e-3) -> None:
    """Within 2 % or the tolerance, every one."""
    exact = p.double().numpy()
    apart = np.abs(head.weights - exact)
    assert (apart <= np.maximum(0.02 * exact, tolerance) * (1 + 1e-5)).all(), apart.max()


# --- Weights.


@pytest.mark.parametrize("spread", [1.0, 5.0], ids=["even", "peaky"])
def test_twelve_by_twelve_heads_of_512_tokens_fit_into_32_megabytes(spread):
    maps = [softmaxed(1, 12, 512, 512, spread=spread, seed=seed) for seed in range(12)]
    made = page(maps)
    assert made.size <= 32_000_000
    assert made.kinds == {"exact": 144}
    for seen, heads in zip(maps, read(made)[1], strict=True):
        for head, p in zip(heads, seen.weights()[0], strict=True):
            assert_close(head, p)
            assert_close(head, p, head.said["tolerance"])


def test_a_map_of_8192_tokens_fits_into_40_megabytes():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 8192, 16, generator=generator)
    seen = AttentionMap.from_qk(query, key)
    made = page(seen, budget="40MB")
    assert made.size <= 40_000_000
    ((head,),) = read(made)[1]
    weights, a = head.weights, head.said["tolerance"]
    assert a < 1e-4
    for rows, p, _ in seen.blocks():
        exact = p[0, 0].double().numpy()
        assert (np.abs(weights[rows] - exact) <= np.maximum(0.02 * exact, a) * (1 + 1e-5)).all()


def test_long_maps_are_built_in_little_memory():
    code = """
import resource, torch
from regard.look.maps import AttentionMap
from regard.look.pages import page
seen = AttentionMap.from_qk(*torch.randn(2, 1, 4, 8192, 16))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
page(seen)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert grown < 600_000  # kB; the weights alone are 1,073,742


def test_one_and_zero_come_back_as_they_are():
    ((head,),) = read(page(AttentionMap.from_weights(torch.eye(5))))[1]
    assert np.array_equal(head.weights.round(12), np.eye(5))


def test_masked_is_not_zero_and_nan_is_neither():
    p = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, float("nan"), 0.0]])
    visible = torch.ones(3, 3, dtype=torch.bool).tril()
    described, ((head,),) = read(page(AttentionMap.from_weights(p, visible=visible)))
    assert (head.codes == 0).tolist() == (~visible).tolist()
    assert (head.codes == 255).nonzero() == (np.array([2]), np.array([1]))
    assert head.codes[1, 0] == 2
    assert described["maps"][0]["heads"][0]["totals"] == [1.0, 1.0, None]


def test_rows_that_do_not_sum_to_one_are_said_and_left():
    p = torch.tensor([[0.5, 0.12], [0.7, 0.3]])
    described, ((head,),) = read(page(AttentionMap.from_weights(p)))
    assert described["maps"][0]["heads"][0]["totals"] == [0.62, 1.0]
    assert_close(head, p)


def test_a_smaller_budget_coarsens_then_keeps_the_largest_then_pools():
    seen = softmaxed(1, 1, 512, 512, spread=3.0)
    p = seen.weights()[0, 0].double().numpy()
    kinds, tolerances = [], []
    bare = page(AttentionMap.from_weights(torch.eye(2))).size
    for room in (2_000_000, 120_000, 50_000, 30_000):
        made = page(seen, budget=bare + room)
        assert made.size <= bare + room
        _, ((head,),) = read(made)
        kinds.append(head.said["kind"])
        tolerances.append(head.said["tolerance"])
        if head.said["kind"] == "exact":
            assert_close(head, seen.weights()[0, 0])
        elif head.said["kind"] == "top":
            kept = head.said["kept"]
            least = np.sort(p, -1)[:, -kept, None]
            assert np.array_equal(head.codes == 1, p < least)
            assert (np.abs(head.weights - p)[p >= least] <= np.maximum(0.02 * p, 1e-3)[p >= least]).all()
        else:
            high, wide = head.said["block"]
            largest = torch.nn.functional.max_pool2d(torch.from_numpy(p)[None], (high, wide))[0]
            assert (high, wide) != (1, 1)
            assert_close(head, largest)
    assert list(dict.fromkeys(kinds)) == ["exact", "top", "pooled"]
    assert tolerances[0] < tolerances[1]


def test_the_budget_holds_where_the_sampled_rows_mislead():
    p = softmaxed(1, 1, 1024, 1024).weights()
    p[..., :: 1024 // encoding.SAMPLE_ROWS, :] = torch.eye(1024)[0]
    budget = page(AttentionMap.from_weights(torch.eye(2))).size + 300_000
    assert page(AttentionMap.from_weights(p), budget=budget).size <= budget


def test_the_least_budget_that_the_error_names_does():
    seen = softmaxed(1, 4, 64, 64)
    with pytest.raises(ValueError, match="budget is 1,000 bytes; the least that would do is") as raised:
        page(seen, budget=1000)
    least = int(re.findall(r"[\d,]+$", str(raised.value))[0].replace(",", ""))
    assert page(seen, budget=least).size <= least


def test_thumbnails_hold_the_largest_of_each_block():
    p = torch.full((1000, 300), 1e-4)
    p[517, 211] = 0.9
    made = page(AttentionMap.from_weights(p))
    described, _ = read(made)
    rows, keys = described["maps"][0]["thumbnail"]
    codes = zlib.decompress(b64decode(blocks_of(made.html, "application/octet-stream;base64")["thumbnails"]))
    thumbnail = np.frombuffer(codes, np.uint8).reshape(rows, keys)
    assert np.argwhere(thumbnail == thumbnail.max()).tolist() == [[517 // 16, 211 // 5]]


def test_a_map_of_statistics_alone_is_pooled():
    seen = softmaxed(1, 2, 100, 130)
    made = page(seen.summarized(16))
    assert made.kinds == {"pooled": 2}
    _, ((head, _),) = read(made)
    assert head.said["block"] == [7, 9]
    assert_close(head, seen.pooled(16)[0, 0])


def test_two_recordings_and_how_far_apart_they_are():
    one, other = softmaxed(1, 2, 9, 9), softmaxed(1, 2, 9, 9, seed=1)
    described, heads = read(page(one, other=[other]))
    assert len(heads) == 2
    assert_close(heads[1][1], other.weights()[0, 1])
    apart = (one.weights() - other.weights()).abs().sum(-1).mean(-1)[0] / 2
    assert [head["difference"] for head in described["maps"][0]["heads"]] == pytest.approx(apart.tolist(), rel=1e-3)


def test_one_sample_of_a_batch():
    seen = softmaxed(3, 1, 6, 6)
    ((head,),) = read(page(seen, sample=2))[1]
    assert_close(head, seen.weights()[2, 0])


# --- Tokens.


def tokens_of(made: Page) -> list[list[list[str] | None]]:
    described, _ = read(made)
    names = [*described["tokens"], None]
    return [
        [names[-1 if said[s] is None else said[s]] for s in ("queryTokens", "keyTokens")] for said in described["maps"]
    ]


def test_each_side_takes_the_tokens_that_it_fits():
    source, target = list("abcde"), list("xyz")
    maps = [
        AttentionMap.from_weights(torch.full((5, 5), 0.2), "encoder.0"),
        AttentionMap.from_weights(torch.full((3, 3), 0.3), "decoder.0.self"),
        AttentionMap.from_weights(torch.full((3, 5), 0.2), "decoder.0.cross", kind="cross"),
    ]
    assert tokens_of(page(maps, target, source)) == [[source, source], [target, target], [target, source]]
    assert tokens_of(page(maps)) == [[None, None]] * 3


def test_tokens_by_the_name_of_the_map():
    source, target = list("abc"), list("xyz")
    maps = [
        AttentionMap.from_weights(torch.eye(3), "encoder.0"),
        AttentionMap.from_weights(torch.eye(3), "decoder.0", kind="cross"),
    ]
    with pytest.raises(ValueError, match=r"both fit 'encoder.0'.*name them by map"):
        page(maps, target, source)
    made = page(maps, {"encoder*": source, "decoder*": target}, source)
    assert tokens_of(made) == [[source, source], [target, source]]


def test_tokens_that_the_map_brings():
    seen = softmaxed(2, 3, 4).labelled("abc", "wxyz")
    described, _ = read(page(seen))
    assert described["tokens"] == [list("abc"), list("wxyz")]
    described, _ = read(page(seen, "def", "stuv"))
    assert described["tokens"] == [list("def"), list("stuv")]


def test_hostile_tokens_leave_no_markup():
    made = page(AttentionMap.from_weights(torch.eye(len(HOSTILE)), HOSTILE[0]), HOSTILE, title=HOSTILE[0])
    assert "<img" not in made.html
    assert "<!--" not in made.html
    assert made.html.count("<script") == made.html.count("</script>") == 4
    described, _ = read(made)
    assert described["tokens"] == [HOSTILE]
    assert described["title"] == HOSTILE[0]


# --- The file.


def test_the_policy_forbids_the_network_and_names_the_only_script():
    html = page(AttentionMap.from_weights(torch.eye(2))).html
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    digest = b64encode(sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", html)


def test_a_file_is_written_whole(tmp_path: Path):
    path = tmp_path / "attention.html"
    made = page(AttentionMap.from_weights(torch.eye(2)), path=path)
    assert path.stat().st_size == made.size
    assert path.read_text("utf-8") == made.html
    assert list(tmp_path.iterdir()) == [path]


def test_a_notebook_gets_the_same_file_in_a_frame():
    made = page(AttentionMap.from_weights(torch.eye(2)), ['"quoted"', "<b>"])
    bundle = made._repr_mimebundle_()
    (inside,) = re.findall(r'srcdoc="([^"]*)"', bundle["text/html"])
    assert unescape(inside) == made.html
    assert "allow-same-origin" not in bundle["text/html"]
    assert bundle["text/plain"] == repr(made) == f"Page('Attention', {made.size / 1e6:.1f} MB; heads: 1 exact)"


def test_what_is_given_is_not_written_to():
    p = torch.rand(1, 2, 20, 20)
    before = p.clone()
    page(AttentionMap.from_weights(p))
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"query_tokens": ["a"] * 4}, r"query_tokens has 4 tokens; 3, the query side of 'attention', fit"),
        ({"key_tokens": ["a"] * 2}, r"has 2 tokens; 3,"),
        ({"maps": []}, "maps is empty"),
        (
            {"maps": AttentionMap.from_weights(torch.tensor([[0.5, -0.25]]))},
            r"holds -0.25 in rows 0 .. 0; weights of 0",
        ),
        ({"maps": AttentionMap.from_weights(torch.tensor([[0.5, inf]]))}, "holds inf"),
        ({"other": AttentionMap.from_weights(torch.eye(4))}, r"shapes 1 × 4 × 4, maps of 1 × 3 × 3"),
        ({"language": "fr"}, "language is 'fr'; 'en', 'zh' or None fit"),
        ({"budget": "many"}, "budget is 'many'"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], message: str):
    given = {"maps": AttentionMap.from_weights(torch.eye(3)), **given}
    with pytest.raises(ValueError, match=message):
        page(**given)


def test_what_is_no_map_is_refused():
    with pytest.raises(TypeError, match="maps holds Tensor"):
        page(torch.eye(3))
