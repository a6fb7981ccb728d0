"""Runs written block by block: interrupted anywhere and resumed, they end as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, random_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_blocks import stop_after

from kaleido_fast import InputError, ModelCard, Scaling, fast_sample, open_draws, sample_to, save_checkpoint
from kaleido_fast.errors import StreamInterruptedError, TerminatedError
from kaleido_fast.storing import filling

pytest.importorskip("zarr")

MODEL = random_mlp(3, 5, 3)
RUN = {"n_chains": 4096 * 3 + 77, "burn_in": 1, "n_draws": 2, "chunk_chains": 4096, "seed": 3, "device": "cpu"}
SAMPLE = {name: value for name, value in RUN.items() if name != "chunk_chains"}


def contents(path: Path) -> dict[str, bytes]:
    """Bytes of all files of an output."""
    files = [path, path.with_suffix(".json")] if path.is_file() else sorted(path.rglob("*"))
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files if file.is_file()}


class StopError(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("name", ["a.zarr", "a.npy"])
@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_stored_draws_are_those_of_one_call(tmp_path, name, engine):
    want = fast_sample(MODEL, **SAMPLE, engine=engine)
    got = sample_to(tmp_path / name, MODEL, **RUN, engine=engine)
    draws = open_draws(tmp_path / name)
    assert torch.equal(draws[:], want.draws)
    assert got.stats.outcome_shares == pytest.approx(want.stats.outcome_shares)
    assert got.stats.steps_quantiles == want.stats.steps_quantiles
    assert got.stats.chain_steps == want.stats.chain_steps
    for point, value in want.stats.residual_quantiles.items():
        assert got.stats.residual_quantiles[point] == pytest.approx(value, rel=1e-3)
    if name == "a.zarr":
        for field in ("residual", "steps", "period", "outcome"):
            assert np.array_equal(draws.per_chain(field), getattr(want, field).numpy())
        assert np.array_equal(draws.per_chain("residual", slice(4000, 9000, 7)), want.residual[4000:9000:7].numpy())


@pytest.mark.parametrize("name", ["a.zarr", "a.npy"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, StopError])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, name, error):
    whole, broken = tmp_path / "whole" / name, tmp_path / "broken" / name
    whole.parent.mkdir()
    broken.parent.mkdir()
    sample_to(whole, MODEL, **RUN)
    with pytest.raises((StreamInterruptedError, StopError)) as caught:
        sample_to(broken, MODEL, **RUN, callback=stop_after(8000, error))
    if error is KeyboardInterrupt:
        assert "the same command goes on from there" in str(caught.value)
    result = sample_to(broken, MODEL, **RUN)
    assert 0 < result.stats.new_chains < RUN["n_chains"], "nothing is computed twice"
    assert contents(whole) == contents(broken)
    assert sorted(p.name for p in whole.parent.iterdir()) == sorted(p.name for p in broken.parent.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, TerminatedError])
def test_interrupted_before_the_first_block_nothing_is_left(tmp_path, monkeypatch, error):
    def stop(*_):
        raise error

    monkeypatch.setattr(filling, "build_phases", stop)
    with pytest.raises(StreamInterruptedError, match=r"0 of 12,365 chains are kept") as caught:
        sample_to(tmp_path / "a.npy", MODEL, **RUN)
    assert caught.value.terminated is (error is TerminatedError)
    assert not list(tmp_path.iterdir())


@given(order=st.randoms(use_true_random=False), dtype=st.sampled_from([None, "float16", "uint8"]))
@settings(max_examples=5)
def test_any_missing_blocks_are_filled_in(tmp_path_factory, order, dtype):
    folder = tmp_path_factory.mktemp("run")
    sample_to(folder / "a.zarr", MODEL, **RUN, dtype=dtype)
    shutil.copytree(folder / "a.zarr", folder / "b.zarr")
    missing = order.sample(range(4), order.randint(1, 4))
    for block in missing:
        (folder / "b.zarr" / "blocks" / f"c.{block}.0").unlink()
        (folder / "b.zarr" / "draws" / f"c.{block}.0.0").write_bytes(b"torn")
    sample_to(folder / "b.zarr", MODEL, **RUN, dtype=dtype)
    assert [*contents(folder / "a.zarr").values()] == [*contents(folder / "b.zarr").values()]


def test_a_finished_run_does_nothing(tmp_path):
    sample_to(tmp_path / "a.zarr", MODEL, **RUN)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "a.zarr").rglob("*")}
    result = sample_to(tmp_path / "a.zarr", MODEL, **RUN)
    assert result.stats is None
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "a.zarr").rglob("*")}


def test_a_finished_file_does_nothing(tmp_path):
    path = tmp_path / "a.npy"
    first = sample_to(path, MODEL, **RUN)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()}
    again = sample_to(path, MODEL, **RUN)
    assert again.stats is None and again.files == first.files
    assert before == {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()}
    assert sample_to(path, MODEL, **RUN, overwrite=True).stats is not None
    assert before.keys() == set(tmp_path.iterdir())
    assert all(file.read_bytes() == data for file, (_, data) in before.items())


@pytest.mark.parametrize("record", [None, "{", "[]", '{"request": {"n_chains": 12365, "n_draws": 2}, "encoding": 3}'])
def test_a_file_of_no_known_run_is_refused(tmp_path, record):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((12365, 2, 3), np.float32))
    if record is not None:
        path.with_suffix(".json").write_text(record)
    before = contents(path) if record is not None else {"a.npy": path.read_bytes()}
    with pytest.raises(InputError, match=r"a\.npy is there and not of this run: .*record.*--overwrite replaces it"):
        sample_to(path, MODEL, **RUN)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sample_to(path, MODEL, **RUN, overwrite=True).stats is not None


@pytest.mark.parametrize("name", ["a.zarr", "a.npy"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seed": 4}, "request.seed was 3, is now 4"),
        ({"n_chains": 5}, "request.n_chains was 12365, is now 5"),
        ({"dtype": "float16"}, "encoding.dtype was float32, is now float16"),
        ({"engine": "reference"}, "engine was cpu, is now reference"),
        ({"tol": None}, "request.tol was 0.0001, is now None"),
        ({"model": random_mlp(3, 5, 3, seed=9)}, "model_hash was"),
        ({"scaling": Scaling(2.0, 1.0)}, "scaling.offset was None, is now 1.0"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_another_run_is_refused_and_the_difference_shown(tmp_path, name, change, text, finished):
    with contextlib.nullcontext() if finished else pytest.raises(StreamInterruptedError):
        sample_to(tmp_path / name, MODEL, **RUN, callback=None if finished else stop_after(8000))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changed = {"model": MODEL, **RUN, **change}
    with pytest.raises(InputError, match=r"belongs to another run|is there and not of this run") as caught:
        sample_to(tmp_path / name, **changed)
    assert text in str(caught.value)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    sample_to(tmp_path / name, **changed, overwrite=True)
    assert len(open_draws(tmp_path / name)) == changed["n_chains"]


def test_clock_host_and_folder_have_no_effect(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    sample_to(tmp_path / "a.zarr", MODEL, **RUN)
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    monkeypatch.setattr("time.time", lambda: 0.0)
    sample_to(tmp_path / "b.zarr", MODEL, **RUN)
    assert [*contents(tmp_path / "a.zarr").values()] == [*contents(tmp_path / "b.zarr").values()]


def test_repair_names_and_recomputes_damaged_chunks(tmp_path):
    sample_to(tmp_path / "a.zarr", MODEL, **RUN)
    before = contents(tmp_path / "a.zarr")
    chunk = tmp_path / "a.zarr" / "draws" / "c.1.0.0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    draws = open_draws(tmp_path / "a.zarr")
    assert torch.isfinite(draws[:4096]).all()
    with pytest.raises(InputError, match=r"draws/c\.1\.0\.0 of block 1 is damaged.*--repair"):
        draws[5000]
    assert sample_to(tmp_path / "a.zarr", MODEL, **RUN).stats is None
    result = sample_to(tmp_path / "a.zarr", MODEL, **RUN, repair=True)
    assert result.stats.new_chains == 4096
    assert "draws/c.1.0.0" in result.damaged[0]
    assert contents(tmp_path / "a.zarr") == before


def test_chunk_sizes_that_do_not_fit_are_rounded_and_said_or_refused(tmp_path):
    options = {**RUN, "chunk_chains": 5000}
    with pytest.warns(UserWarning, match="5,000 is rounded up to 8,192"):
        sample_to(tmp_path / "a.zarr", MODEL, **options)
    assert open_draws(tmp_path / "a.zarr").output.layout.chunk_chains == 8192
    with pytest.raises(InputError, match="has chunks of 8,192 chains"):
        sample_to(tmp_path / "a.zarr", MODEL, **RUN)
    with pytest.raises(InputError, match="chunk_chains is 0"):
        sample_to(tmp_path / "b.zarr", MODEL, **{**RUN, "chunk_chains": 0})
    assert not (tmp_path / "b.zarr").exists()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "m.safetensors", MODEL, ModelCard("m", sampling={"burn_in": 1}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMAND = ("sample", "--model", "m.safetensors", "--chains", "12365", "--chunk-chains", "4096", "--quiet")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--out", "a.npy", "--repair"), "has no checksums"),
        (("--out", "a.npz", "--dtype", "uint8"), "--dtype is for outputs written in blocks (.zarr, .npy)"),
        (("--out", "a.safetensors"), "--chunk-chains is for outputs written in blocks"),
        (("--out", "a.zarr", "--dtype", "uint9"), "did you mean 'uint8'"),
        (("--out", "m.safetensors.zarr", "--chunk-chains", "-1"), "chunk_chains is -1"),
        (("--out", "gone/a.zarr"), "does not exist"),
        (("--out", "file.zarr"), "file.zarr is a file"),
        (("--out", "file.zarr", "--overwrite"), "was not written by kaleido-fast and stays as it is"),
    ],
)
def test_bad_input_is_one_line_and_touches_nothing(folder, monkeypatch, capsys, args, text):
    (folder / "file.zarr").write_text("mine")
    before = sorted(path.name for path in folder.iterdir())
    status, _, errors = call(monkeypatch, capsys, *COMMAND, *args)
    assert status == 2
    assert errors.count("\n") == 1, errors
    assert text in errors
    assert sorted(path.name for path in folder.iterdir()) == before
    assert (folder / "file.zarr").read_text() == "mine"


def test_without_zarr_the_extra_is_named(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "zarr", None)
    status, _, errors = call(monkeypatch, capsys, *COMMAND, "--out", "a.zarr")
    assert (status, errors.count("\n")) == (2, 1)
    assert "pip install 'kaleido-fast[zarr]'" in errors


def test_a_read_only_folder_is_named(folder, monkeypatch, capsys):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (folder / "locked").mkdir(mode=0o500)
    status, _, errors = call(monkeypatch, capsys, *COMMAND, "--out", "locked/a.zarr")
    assert (status, errors.count("\n")) == (2, 1)
    assert "folder of yours" in errors


def long_run(folder: Path, out: str) -> subprocess.Popen:
    """A run of some seconds and many blocks."""
    args = ("sample", "--model", "m.safetensors", "--chains", str(4096 * 200), "--chunk-chains", "4096")
    options = ("--burn-in", "300", "--tol", "none", "--out", out)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kaleido_fast", *args, *options]
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)


def wait_for_blocks(store: Path, count: int) -> None:
    """Until so many blocks of a store are there."""
    until = time.monotonic() + 60
    while len(list(store.glob("blocks/c.*"))) < count:
        assert time.monotonic() < until, "no blocks are written"
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_keep_whole_blocks_and_say_how_to_go_on(folder, number, status):
    process = long_run(folder, "a.zarr")
    wait_for_blocks(folder / "a.zarr", 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert errors.count("\n") == 1, errors
    assert "chains are kept in a.zarr; the same command goes on from there" in errors
    kept = int(errors.split(": ")[2].split(" of ")[0].replace(",", ""))
    assert kept == 4096 * len(list((folder / "a.zarr" / "blocks").glob("c.*")))
    assert sorted(path.name for path in folder.iterdir()) == ["a.zarr", "m.safetensors"]


def test_the_second_process_and_a_removed_store_are_named(folder, monkeypatch, capsys):
    process = long_run(folder, "a.zarr")
    try:
        wait_for_blocks(folder / "a.zarr", 1)
        status, _, errors = call(monkeypatch, capsys, *COMMAND, "--out", "a.zarr")
        assert (status, errors.count("\n")) == (2, 1)
        assert f"is being written by process {process.pid} on " in errors
        (folder / "a.zarr").rename(folder / "away.zarr")
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors.count("\n")) == (2, 1), errors
        assert "moved or removed" in errors
    finally:
        process.kill()
