"""A mask's intervals, its predicate and what is blanked for it agree, however masks are combined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard import Causal, Documents, Keep, Lengths, Mask, Prefix, Window
from regard.intervals import Diagonal, Grid, Interval
from regard.visible import seeing_rows, seen_keys


@st.composite
def grids_and_masks(draw: st.DrawFn) -> tuple[Grid, Mask]:
    leading = draw(st.sampled_from([(), (3,), (2, 3), (2, 1, 2)]))
    queries, keys = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    batch = leading[:1]

    def ints(shape: tuple[int, ...], most: int) -> torch.Tensor:
        size = int(torch.Size(shape).numel())
        return torch.tensor(draw(st.lists(st.integers(0, most), min_size=size, max_size=size))).reshape(shape)

    def lens() -> int | torch.Tensor:
        shapes = [batch, (*batch, queries)] if batch else [()]
        return draw(st.integers(0, keys)) if draw(st.booleans()) else ints(draw(st.sampled_from(shapes)), keys)

    def aligned() -> dict[str, Any]:
        return draw(
            st.sampled_from([{}, {"align": "upper_left"}, {"offset": draw(st.integers(-2, 4))}, {"offset": None}])
        ) or {"offset": ints(batch, keys)}

    def leaf() -> Mask:
        match draw(st.integers(0, 6)):
            case 0:
                return Lengths(lens())
            case 1:
                return Lengths(start=lens(), stop=lens())
            case 2:
                return Causal(**aligned())
            case 3:
                reach = st.none() | st.integers(0, 3)
                return Window(draw(reach), draw(reach), **aligned())
            case 4:
                n = draw(st.integers(0, keys)) if draw(st.booleans()) else ints(batch, keys)
                return Prefix(n, **aligned())
            case 5:
                key_ids = ints((*batch, keys) if draw(st.booleans()) else (keys,), 3)
                if draw(st.booleans()):
                    key_ids = key_ids.sort(-1).values
                return Documents(ints((*batch, queries) if draw(st.booleans()) else (queries,), 3), key_ids)
            case _:
                whole = (*leading, queries, keys)
                shape = tuple(draw(st.sampled_from([1, n])) for n in whole)[draw(st.integers(0, len(whole) - 1)) :]
                return Keep(ints(shape, 1).bool())

    def tree(depth: int) -> Mask:
        match draw(st.integers(0, 3)) if depth else 0:
            case 0:
                return leaf()
            case 1:
                return ~tree(depth - 1)
            case 2:
                return tree(depth - 1) & tree(depth - 1)
            case _:
                return tree(depth - 1) | tree(depth - 1)

    return Grid(leading, queries, keys), tree(3)


@settings(max_examples=400, deadline=None)
@given(grids_and_masks())
def test_intervals_are_the_predicate(drawn: tuple[Grid, Mask]) -> None:
    grid, mask = drawn
    whole = (*grid.leading, grid.queries, grid.keys)
    allowed = mask.lay(grid).expand(whole)
    intervals, keep = mask.lower(grid)
    lowered = torch.ones(whole, dtype=torch.bool)
    if intervals is not None:
        assert len(intervals) <= 2
        lowered = lowered & grid.within(intervals)
        if len(intervals) == 2:
            assert not (grid.within(intervals[:1]) & grid.within(intervals[1:])).any()
        for interval in intervals:
            assert not interval.held or grid.within([interval]).any(-1).all()
    if keep is not None:
        lowered = lowered & keep
    assert lowered.equal(allowed)
    seen, seeing = seen_keys(intervals, keep, grid), seeing_rows(intervals, keep, grid)
    some_row, some_key = allowed.any(-2, keepdim=True), allowed.any(-1, keepdim=True)
    assert (torch.ones(1, 1, dtype=torch.bool) if seen is None else seen).expand_as(some_row).equal(some_row)
    assert (torch.ones(1, 1, dtype=torch.bool) if seeing is None else seeing).expand_as(some_key).equal(some_key)


def rows(mask: Mask, queries: int, keys: int, leading: tuple[int, ...] = ()) -> list[str]:
    """A mask as one string of 1 and 0 for each row."""
    allowed = mask.lay(Grid(leading, queries, keys)).expand(*leading, queries, keys)
    return ["".join(map(str, row)) for row in allowed.int().reshape(-1, keys).tolist()]


def test_causal_aligns_lower_right() -> None:
    assert rows(Causal(), 1, 3) == ["111"]
    assert rows(Causal(), 2, 3) == ["110", "111"]
    assert rows(Causal(), 3, 2) == ["00", "10", "11"]
    assert rows(Causal(align="upper_left"), 2, 3) == ["100", "110"]


def test_caches_filled_to_different_lengths() -> None:
    assert rows(Causal(offset=torch.tensor([1, 3])), 2, 5, (2,)) == ["11000", "11100", "11110", "11111"]


def test_lengths_of_right_and_left_padding() -> None:
    assert rows(Lengths(torch.tensor([1, 3])), 1, 3, (2,)) == ["100", "111"]
    assert rows(Lengths(start=torch.tensor([2, 0])), 1, 3, (2,)) == ["001", "111"]
    assert rows(Lengths(start=1, stop=2), 1, 3) == ["010"]
    assert rows(Lengths(torch.tensor([[1, 2]])), 2, 3, (1,)) == ["100", "110"]


def test_prefix_window_and_documents() -> None:
    assert rows(Prefix(2), 3, 3) == ["110", "110", "111"]
    assert rows(Window(1, 0), 3, 3) == ["100", "110", "011"]
    assert rows(Window(None, 1), 3, 4) == ["1110", "1111", "1111"]
    assert rows(Documents(torch.tensor([0, 1]), torch.tensor([1, 0, 1])), 2, 3) == ["010", "101"]


def test_a_sink_beside_a_window_is_two_intervals() -> None:
    mask = (Lengths(1) | Window(1, 0)) & Causal()
    assert rows(mask, 4, 4) == ["1000", "1100", "1110", "1011"]
    intervals = mask.intervals(Grid((), 4, 4))
    assert intervals is not None
    assert len(intervals) == 2


def test_square_causal_stays_symbolic() -> None:
    assert Causal().intervals(Grid((2,), 5, 5)) == (Interval(0, Diagonal(1)),)
    assert Causal().intervals(Grid((2,), 1, 5)) == (Interval(0, 5),)


def test_not_not_is_the_mask() -> None:
    mask = Window(1, 1)
    assert ~~mask is mask


def test_three_intervals_become_a_dense_mask() -> None:
    mask = ~(Lengths(1) | Window(0, 0))
    intervals, keep = mask.lower(Grid((), 4, 4))
    assert intervals is None
    assert keep is not None
    assert rows(mask, 4, 4) == ["0111", "0011", "0101", "0110"]


@pytest.mark.parametrize(
    ("lens", "message"),
    [
        (torch.tensor([1, -1]), "valid_lens spans -1 .. 1; it must lie in 0 .. 4"),
        (torch.tensor([1, 5]), "valid_lens spans 1 .. 5; it must lie in 0 .. 4"),
        (7, "valid_lens spans 7 .. 7; it must lie in 0 .. 4"),
        (
            torch.tensor([1, 2, 3]),
            r"valid_lens has shape \(3,\); here it must be an int or of shape \(2,\) or \(2, 3\)",
        ),
        (torch.ones(2, 3, 4, dtype=torch.int64), r"valid_lens has shape \(2, 3, 4\)"),
    ],
)
def test_bad_lengths(lens: int | torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lengths(lens).lower(Grid((2,), 3, 4))


def test_wrong_dtypes() -> None:
    with pytest.raises(TypeError, match=r"valid_lens has dtype torch\.float32; it must be an integer type"):
        Lengths(torch.tensor([1.0, 2.0])).lower(Grid((2,), 3, 4))
    with pytest.raises(TypeError, match=r"mask has dtype torch\.int64; it must be bool"):
        Keep(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="query_ids has dtype"):
        Documents(torch.zeros(3))


def test_other_bad_arguments() -> None:
    with pytest.raises(ValueError, match="two names of the same bound"):
        Lengths(1, stop=2)
    with pytest.raises(ValueError, match="left is -1"):
        Window(-1, 0)
    with pytest.raises(ValueError, match="align is 'left'"):
        Causal(align="left")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"mask has shape \(3, 4\); it must broadcast to \(2, 3, 5\)"):
        Keep(torch.ones(3, 4, dtype=torch.bool)).lower(Grid((2,), 3, 5))
    with pytest.raises(ValueError, match=r"query_ids has shape \(2,\)"):
        Documents(torch.tensor([0, 1])).lower(Grid((), 3, 3))


def test_out_of_range_lengths_are_clamped_where_they_cannot_be_looked_at() -> None:
    def allowed(lens: torch.Tensor) -> torch.Tensor:
        intervals, _ = Lengths(lens).lower(Grid((), 1, 3))
        assert intervals is not None
        return Grid((), 1, 3).within(intervals)[0]

    assert torch.vmap(allowed)(torch.tensor([-2, 2, 9])).tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 1]]
