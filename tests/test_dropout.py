"""Dropout is a function of seed, map, row and key."""

from __future__ import annotations

import pytest
import torch

import regard
from regard import kernels
from regard.dropout import Dropout, philox

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers published with Random123
        ([0] * 4, [0] * 2, ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"],
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: list[int], key: list[int], words: list[str]) -> None:
    found = philox(*(torch.tensor(x) for x in counter), *(torch.tensor(x) for x in key))
    assert [f"{int(word):08x}" for word in found] == words


def test_the_contracts_formula() -> None:
    seed = -0x123456789ABCDEF
    kept = Dropout(0.3, torch.tensor(seed)).kept((2, 3), 4, 7, CPU)
    low, high = torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32 & 0xFFFFFFFF)
    for batch, head, i, j in [(0, 0, 0, 0), (1, 2, 3, 6), (0, 1, 2, 5)]:
        key = {"k0": low, "k1": high}
        counter = (torch.tensor(n) for n in (j // 4, i, batch * 3 + head, 0))
        dropped = int(philox(*counter, **key)[j % 4]) * 2.0**-32 < 0.3
        assert float(kept[batch, head, i, j]) == pytest.approx(0 if dropped else 1 / 0.7)


def test_share_and_scale() -> None:
    kept = Dropout(0.25, torch.tensor(7)).kept((4,), 100, 100, CPU)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert float(kept.eq(0).double().mean()) == pytest.approx(0.25, abs=0.01)  # 4.6 standard errors
    assert Dropout(1.0, torch.tensor(7)).kept((1,), 3, 3, CPU).eq(0).all()


def test_independent_of_how_the_work_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.chunked, "BLOCK_BYTES", 500)
    x = torch.randn(2, 3, 9, 5, requires_grad=True)
    score, mask = regard.Gaussian(), regard.Causal()
    results = []
    for impl in ("reference", "chunked"):
        torch.manual_seed(3)
        out = regard.attend(x, x, x, score, mask, dropout_p=0.4, impl=impl)
        results.append((out, torch.autograd.grad(out.square().sum(), x)[0]))
    for whole, blocks in zip(*results, strict=True):
        torch.testing.assert_close(whole, blocks)


def test_follows_torchs_generator_and_only_in_out() -> None:
    x = torch.randn(1, 8, 4)
    torch.manual_seed(0)
    first = regard.attention(x, x, x, dropout_p=0.5)
    second = regard.attention(x, x, x, dropout_p=0.5)
    torch.manual_seed(0)
    again = regard.attention(x, x, x, dropout_p=0.5)
    assert first.out.equal(again.out)
    assert not first.out.equal(second.out)
    torch.testing.assert_close(first.weights().sum(-1), torch.ones(1, 8))  # before dropout
    assert regard.attend(x, x, x, dropout_p=1.0).eq(0).all()


def test_sdpa_refuses_it() -> None:
    x = torch.randn(1, 8, 4)
    with pytest.raises(ValueError, match="dropout"):
        regard.attend(x, x, x, dropout_p=0.5, impl="sdpa")
