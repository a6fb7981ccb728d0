"""Finished files of draws are told from another run's."""

from __future__ import annotations

import json

import pytest
from commands import SAMPLE
from conftest import call
from folders import contents


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
def test_a_finished_file_is_told_from_another_runs(folder, monkeypatch, capsys, name):
    assert call(monkeypatch, capsys, *SAMPLE, name, "--quiet")[0] == 0
    before = contents(folder)
    status, out, _ = call(monkeypatch, capsys, *SAMPLE, name)
    assert status == 0 and f"{name} is finished: all 9 chains are there" in out
    status, out, _ = call(monkeypatch, capsys, *SAMPLE, name, "--json")
    assert status == 0 and json.loads(out)["finished"] is True
    status, _, errors = call(monkeypatch, capsys, *SAMPLE, name, "--seed", "7")
    assert status == 2 and "request.seed was 0, is now 7" in errors and "--overwrite" in errors
    assert contents(folder) == before
