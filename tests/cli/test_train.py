"""The command train: a finished or unfinished training is told from another run's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import TRAIN
from conftest import call
from folders import contents


def test_a_finished_training_is_told_from_another(folder, monkeypatch, capsys):
    command = (*TRAIN, "x.safetensors", "--no-curve")
    assert call(monkeypatch, capsys, *command, "--quiet")[0] == 0
    before = contents(folder)
    status, out, _ = call(monkeypatch, capsys, *command)
    assert status == 0 and "x.safetensors is finished: it is of this same run" in out
    assert json.loads(call(monkeypatch, capsys, *command, "--json")[1])["finished"] is True
    for change, text in ((("--seed", "5"), "seed was 4, is now 5"), (("--hidden", "6"), "network was")):
        status, _, errors = call(monkeypatch, capsys, *command, *change)
        assert status == 2 and text in errors and "--overwrite" in errors
    assert contents(folder) == before
    assert call(monkeypatch, capsys, *command, "--seed", "5", "--overwrite", "--quiet")[0] == 0
    assert contents(folder)["x.safetensors"] != before["x.safetensors"]


def test_recipes_by_name_and_their_networks(folder, monkeypatch, capsys):
    """Pictures are trained for new samples by default; options of one recipe are refused for the other."""
    np.save("pictures.npy", np.random.default_rng(0).integers(0, 255, (40, 4, 4), dtype=np.uint8))
    command = ("train", "--data", "pictures.npy", "--steps", "2", "--batch-size", "8", "--no-curve", "--json", "--out")
    found = {}
    for name, options in {
        "usual": (),
        "flow": ("--recipe", "flow", "--weights", "fp16", "--shift", "0.2", "--loss", "bce", "--average", "0.5"),
        "attractors": ("--recipe", "attractors", "--hidden", "9"),
        "published": ("--recipe", "published"),
    }.items():
        status, out, errors = call(monkeypatch, capsys, *command, f"{name}.safetensors", *options)
        assert status == 0, errors
        found[name] = json.loads(out)
    assert [found[name]["recipe"]["kind"] for name in found] == ["flow", "flow", "attractors", "attractors"]
    assert found["usual"]["sampling"]["sampler"] == "flow" and found["usual"]["recipe"]["held_out"] == 2
    assert found["usual"]["network"] == "-".join(["16", *["512"] * 6, "16"])
    assert found["attractors"]["network"] == "16-9-9-9-9-9-16" and found["attractors"]["recipe"]["noise"] == 0.4
    sizes = [Path(f"{name}.safetensors").stat().st_size for name in ("flow", "usual")]
    assert 2 * sizes[0] == pytest.approx(sizes[1], rel=0.01)
    for options, text in (
        (("--noise", "0.3"), "noise = 0.3 with kind 'flow'"),
        (("--held-out", "40"), "held_out = 40 of 40 examples: give 0 to 39"),
        (("--loss", "hinge"), "hinge"),
        (("--recipe", "flows"), "did you mean 'flow'"),
        (("--recipe", "attractors", "--shift", "2"), "shift = 2"),
    ):
        status, _, errors = call(monkeypatch, capsys, *command, "bad.safetensors", *options)
        assert status == 2 and text in errors and errors.count("\n") == 1, errors
    np.save("plain.npy", np.full((9, 4, 4), 7, np.uint8))
    status, _, errors = call(monkeypatch, capsys, "train", "--data", "plain.npy", "--value-range", "0", "9")
    assert status == 2 and "holds one value only" in errors


def test_to_overwrite_keeps_an_unfinished_training_of_the_same_request(folder, monkeypatch, capsys):
    import kaleido_fast.training.trainer as training

    def stop(*_):
        raise KeyboardInterrupt

    command = (*TRAIN, "x.safetensors", "--no-curve", "--quiet")
    assert call(monkeypatch, capsys, *command, "--overwrite")[0] == 0
    whole = Path("x.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(training.Loop, "_notify", stop)
        assert call(patched, capsys, *command, "--overwrite")[0] == 130
    begun = Path("x.training").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(training.Loop, "_save", lambda self: None)
        patched.setattr(training.TrainingRun, "restore", stop)
        assert call(patched, capsys, *command, "--overwrite")[0] == 130, "it goes on from the state"
    assert Path("x.training").read_bytes() == begun
    assert call(monkeypatch, capsys, *command, "--overwrite", "--seed", "8")[0] == 0, "another run's state is replaced"
    assert call(monkeypatch, capsys, *command, "--overwrite")[0] == 0
    assert Path("x.safetensors").read_bytes() == whole and not Path("x.training").exists()
