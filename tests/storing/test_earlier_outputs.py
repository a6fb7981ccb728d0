"""Outputs of an earlier version: finished ones are read as they were, unfinished ones go on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import earlier
import pytest
from conftest import needs

from kaleido_fast import sample_to
from kaleido_fast.storing import opening, record
from kaleido_fast.storing.store_metadata import ENTRY

KERNEL_UNKNOWN = "could record a wrong kernel"


@pytest.fixture
def stated(tmp_path) -> dict[str, Any]:
    """The files of the earlier version, in a folder; what it said of them."""
    return earlier.unpack(tmp_path)


def stored_record(path: Path) -> dict[str, Any]:
    """The record of an output of the earlier version."""
    if path.suffix == ".zarr":
        return json.loads((path / "zarr.json").read_text())["attributes"][ENTRY]["record"]
    if path.exists():
        return json.loads(path.with_suffix(".json").read_text())
    return json.loads((path.with_name(f"{path.name}.partial") / "record.json").read_text())["record"]


@pytest.fixture
def as_then(monkeypatch):
    """A function that gives today's code the libraries of an output: other ones are refused, rightly."""

    def pretend(stored: dict[str, Any]) -> None:
        monkeypatch.setattr(record, "library_versions", lambda *names: stored["versions"])
        monkeypatch.setattr(record, "cpu_arithmetic", lambda *_: "")  # these outputs do not depend on it

    return pretend


def contents(path: Path) -> dict[str, bytes]:
    """Bytes of all files of an output."""
    files = [path, path.with_suffix(".json")] if path.is_file() else path.rglob("*")
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files if file.is_file()}


@pytest.mark.parametrize("name", earlier.WHOLE)
def test_finished_draws_are_read_as_they_were(tmp_path, stated, name):
    if name.endswith(".zarr"):
        pytest.importorskip("zarr")
    assert earlier.read_values(tmp_path / name) == stated["values"][name]


@pytest.mark.parametrize("name", earlier.WHOLE)
def test_finished_runs_are_found_finished(tmp_path, stated, as_then, name):
    if name.endswith(".zarr"):
        pytest.importorskip("zarr")
    as_then(stored_record(tmp_path / name))
    before = contents(tmp_path / name)
    result = sample_to(tmp_path / name, tmp_path / "soft.safetensors", **earlier.finished_options(name))
    assert result.stats is None
    assert contents(tmp_path / name) == before


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of the interpreter: tanh of large numbers
@pytest.mark.parametrize("name", earlier.LEFT)
def test_unfinished_runs_go_on_to_the_bytes_of_a_whole_one(tmp_path, stated, as_then, name):
    """The network's values do not depend on how a machine rounds: see `earlier.sharp_network`."""
    if name.endswith(".zarr"):
        pytest.importorskip("zarr")
    stored = stored_record(tmp_path / name)
    needs(stored["engine"])
    whole, options = tmp_path / "whole" / name, earlier.unfinished_options(name)
    whole.parent.mkdir()
    with pytest.MonkeyPatch.context() as patched:  # today's records state more
        patched.setattr(opening, "stored_record", lambda *_: stored)
        sample_to(whole, tmp_path / "sharp.safetensors", **options)
    as_then(stored)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = sample_to(tmp_path / name, tmp_path / "sharp.safetensors", **options)
    assert 0 < result.stats.new_chains < options["n_chains"], "nothing is computed twice"
    assert contents(tmp_path / name) == contents(whole)
    told = [str(warning.message) for warning in caught if KERNEL_UNKNOWN in str(warning.message)]
    assert len(told) == ("kernel" in stored), told
    assert ("kernel" in stored) == (stored["engine"] == "triton")
