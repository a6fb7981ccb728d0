"""The command train: a finished or unfinished training is told from another run's."""

from __future__ import annotations

import json
from pathlib import Path

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
