"""Files of arrays: what is in them becomes maps, and what is wrong with them is said."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from regard.look.maps import AttentionMap
from regard.look.reading import read
from regard.look.saved import save

WEIGHTS = torch.softmax(torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)), -1)


def as_npy(path: Path) -> Path:
    np.save(path / "x.npy", WEIGHTS.numpy())
    return path / "x.npy"


def as_npz(path: Path) -> Path:
    np.savez(path / "x.npz", attn=WEIGHTS.numpy(), values=np.ones((5, 2), np.float32))
    return path / "x.npz"


def as_pt(path: Path) -> Path:
    torch.save({"model": {"attention": WEIGHTS}, "loss": 0.5, "ids": torch.arange(3)}, path / "x.pt")
    return path / "x.pt"


def as_safetensors(path: Path) -> Path:
    save_file({"attn_weights": WEIGHTS, "other": torch.ones(2)}, path / "x.safetensors")
    return path / "x.safetensors"


@pytest.mark.parametrize("write", [as_npy, as_npz, as_pt, as_safetensors])
def test_weights_of_every_format(write: Callable[[Path], Path], tmp_path: Path) -> None:
    (seen,) = read(write(tmp_path))
    assert torch.equal(seen.weights()[0], WEIGHTS)


def test_several_maps_in_their_natural_order(tmp_path: Path) -> None:
    torch.save([WEIGHTS * n for n in range(12)], tmp_path / "attentions.pt")
    assert [seen.name for seen in read(tmp_path / "attentions.pt")] == [str(n) for n in range(12)]
    arrays: dict[str, Any] = {f"layer{n}.probs": WEIGHTS.numpy() for n in (10, 9, 2)}
    np.savez(tmp_path / "x.npz", **arrays, bias=np.ones(3))
    found = read(tmp_path / "x.npz", weights="layer*.probs")
    assert [seen.name for seen in found] == ["layer2.probs", "layer9.probs", "layer10.probs"]


def test_queries_and_keys(tmp_path: Path) -> None:
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8)
    save_file({"q": q, "k": k, "seen": torch.arange(6) < 5}, tmp_path / "x.safetensors")
    (seen,) = read(tmp_path / "x.safetensors", query="q", key="k", scale=0.3, visible="seen")
    torch.testing.assert_close(seen.weights()[..., :5], torch.softmax(q @ k[..., :5, :].mT * 0.3, -1))
    assert not seen.visible()[..., 5].any()
    with pytest.raises(ValueError, match="go together"):
        read(tmp_path / "x.safetensors", query="q")


def test_our_own(tmp_path: Path) -> None:
    save(AttentionMap.from_weights(WEIGHTS, "mine"), tmp_path / "x.safetensors")
    assert read(tmp_path / "x.safetensors")[0].name == "mine"


class Hostile:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, ("hostile",)


def test_nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Hostile(), protocol=2))
    torch.save({"attn": WEIGHTS, "more": Hostile()}, tmp_path / "y.pt")
    np.save(tmp_path / "x.npy", np.array([Hostile()], object), allow_pickle=True)
    np.savez(tmp_path / "x.npz", attn=np.array([Hostile()], object))
    for name in ("x.pt", "y.pt", "x.npy", "x.npz"):
        with pytest.raises(ValueError, match=re.escape(name)):
            read(tmp_path / name)
    assert not (tmp_path / "hostile").exists()
    pickle.loads((tmp_path / "x.pt").read_bytes())
    assert (tmp_path / "hostile").exists()  # it would have


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"PK\x03\x04 cut", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'"])
def test_what_is_broken_is_said(suffix: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\{suffix}"):
        read(tmp_path / f"x{suffix}")


def test_errors_say_what_is_there(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones((2, 3)), b=np.ones(4))
    with pytest.raises(ValueError, match=r"no array named attn.*a \(2, 3\), b \(4,\)"):
        read(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"no array 'c'.*a \(2, 3\)"):
        read(tmp_path / "x.npz", weights="c")
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        read(tmp_path / "x.npz", weights="b")
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"\.csv file; \.npy"):
        read(tmp_path / "x.csv")
    np.save(tmp_path / "scores.npy", np.array([[-3.0, 1.0]]))
    with pytest.raises(ValueError, match=r"holds -3, .* are these scores"):
        read(tmp_path / "scores.npy")
    np.save(tmp_path / "inf.npy", np.array([[np.inf, 1.0]]))
    with pytest.raises(ValueError, match="holds inf"):
        read(tmp_path / "inf.npy")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.npy")


def test_what_stands_beside_the_weights(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", weights=WEIGHTS.numpy(), tokens=np.array(list("abc")), attn_scale=np.ones(3))
    assert [seen.name for seen in read(tmp_path / "x.npz")] == ["weights"]
    np.save(tmp_path / "big.npy", WEIGHTS.numpy().astype(">f4"))
    assert torch.equal(read(tmp_path / "big.npy")[0].weights()[0], WEIGHTS)


def test_a_mask_to_be_added_is_no_mask_of_what_is_visible(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "x.npz", attn=WEIGHTS.numpy(), added=np.array([0, 0, 0, 0, -np.inf]), seen=np.array([1, 1, 1, 1, 0])
    )
    with pytest.raises(ValueError, match=r"added has dtype torch.float64, and other values than 0 and 1"):
        read(tmp_path / "x.npz", visible="added")
    assert read(tmp_path / "x.npz", visible="seen")[0].visible()[0, 0, 0].tolist() == [True] * 4 + [False]


def test_odd_files_are_refused_in_words(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000000000), }".ljust(117) + b"\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ValueError, match=r"x\.npy"):
        read(tmp_path / "x.npy")
    torch.save({"attn": torch.eye(3).to_sparse()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"attn is .*dense"):
        read(tmp_path / "x.pt")
    torch.save({"q": torch.ones(1, 1, 2, 2).long(), "k": torch.ones(1, 1, 2, 2)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"q has dtype torch.int64"):
        read(tmp_path / "x.pt", query="q", key="k")
    for said in ("nojson", "{}", "5", "[{}]", '[{"name": "a"}]'):
        save_file({"w": torch.ones(2, 2)}, tmp_path / "x.safetensors", {"regard": said})
        with pytest.raises(ValueError, match=r"x\.safetensors holds no maps"):
            read(tmp_path / "x.safetensors")


def test_what_does_not_sum_to_one_is_taken_as_it_is(tmp_path: Path) -> None:
    odd = np.array([[0.2, 0.3], [np.nan, 0.5], [0.0, 0.0]])
    np.save(tmp_path / "x.npy", odd)
    np.testing.assert_array_equal(read(tmp_path / "x.npy")[0].weights()[0, 0].numpy(), odd)
