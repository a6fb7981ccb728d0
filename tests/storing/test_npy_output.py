"""An .npy written block by block: where it goes on, and what is not its own stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_mlp
from folders import contents, make_folder
from stored_blocks import LAYOUT, block_arrays, make_record, stop_after

from kaleido_fast import InputError, sample_to
from kaleido_fast.errors import StreamInterruptedError
from kaleido_fast.storing.npy_output import Begun, NpyOutput, partial_folder, read_partial

N = 9000
RUN: dict[str, Any] = {
    "model": random_mlp(6, 9, 6),
    "n_chains": N,
    "chunk_chains": 4096,
    "burn_in": 2,
    "engine": "reference",
}


def test_npy_blocks_become_a_plain_file(tmp_path):
    output = NpyOutput.create(tmp_path / "a.npy", LAYOUT, make_record())
    assert read_partial(tmp_path / "a.npy") == Begun(7, make_record(), overwrite=False, ends=False)
    for block in range(LAYOUT.n_blocks):
        output.write(block, block_arrays(LAYOUT, block))
    assert not (tmp_path / "a.npy").exists()
    files = output.finish()
    want = np.concatenate([block_arrays(LAYOUT, block)["draws"] for block in range(LAYOUT.n_blocks)])
    assert np.array_equal(np.load(tmp_path / "a.npy"), want)
    assert json.loads((tmp_path / "a.json").read_text()) == make_record()
    assert sorted(str(path) for path in tmp_path.iterdir()) == sorted(files)
    assert read_partial(tmp_path / "a.npy") is None


def test_an_interrupted_file_goes_on_behind_a_link(folder):
    far = make_folder("far")
    Path("x.npy").symlink_to(far / "target")
    sample_to("plain.npy", **RUN)
    begin()
    assert (far / "target.partial").is_dir(), "where a new name makes it the target"
    assert sample_to("x.npy", **RUN).stats.new_chains < N
    assert Path("x.npy").is_symlink() and (far / "target").read_bytes() == Path("plain.npy").read_bytes()
    assert [path.name for path in far.iterdir()] == ["target"]


def begin(overwrite: bool = False, **more) -> None:
    """Interrupt a run of x.npy."""
    with pytest.raises(StreamInterruptedError, match="goes on from there"):
        sample_to("x.npy", **RUN, overwrite=overwrite, callback=stop_after(4096), **more)


@pytest.mark.parametrize("name", ["x.npy", "x.json"])
def test_what_appears_while_a_run_is_unfinished_stays(folder, name):
    begin()
    kept = contents(partial_folder(Path("x.npy")))
    Path(name).write_text("mine")
    with pytest.raises(InputError, match=f"{name} is there already.*move it away to go on"):
        sample_to("x.npy", **RUN)
    assert Path(name).read_text() == "mine" and contents(partial_folder(Path("x.npy"))) == kept
    Path(name).rename("elsewhere")
    assert sample_to("x.npy", **RUN).stats.new_chains < N


def test_a_run_that_may_overwrite_goes_on_as_one_that_may(folder):
    for name in ("x.npy", "x.json", "x.png"):
        Path(name).write_text("old")
    begin(overwrite=True, picture="x.png")
    assert Path("x.npy").read_text() == Path("x.json").read_text() == "old"
    assert not Path("x.png").exists(), "the picture of what is replaced goes when that begins"
    assert sample_to("x.npy", **RUN, picture="x.png").stats.new_chains < N
    assert np.load("x.npy").shape == (N, 1, 6)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_folder_for_blocks_that_no_run_has_left_stays(folder, kind):
    place = Path("x.npy.partial")
    mine = place if kind == "file" else make_folder(str(place)) / "mine"
    mine.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"x\.npy\.partial is there and no run has left it"):
            sample_to("x.npy", **RUN, overwrite=overwrite)
    assert mine.read_text() == "mine" and not Path("x.npy").exists()


def test_a_record_of_the_same_run_is_no_hindrance(folder):
    sample_to("x.npy", **RUN)
    before = Path("x.npy").read_bytes()
    Path("x.npy").unlink()
    with pytest.raises(InputError, match=r"x\.json is there already"):
        sample_to("x.npy", **{**RUN, "seed": 1})
    sample_to("x.npy", **RUN)
    assert Path("x.npy").read_bytes() == before
