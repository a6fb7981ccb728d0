"""Disks that are full, read-only or taken away: one clear line, earlier blocks intact, and the run goes on later.

The program runs in a mount namespace of its own, where a test may mount file systems of any size without rights.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import random_mlp
from folders import contents

from kaleido_fast import ModelCard, sample_to, save_checkpoint

pytest.importorskip("zarr")

N = 4096 * 9 + 77
HELPERS = f"""
import contextlib, io, subprocess, sys
from pathlib import Path
import kaleido_fast.cli as cli
import torch
torch.set_num_threads(1)
disk = Path("disk")

def mount(*options):
    subprocess.run(["mount", *options], check=True)

def call(*args):
    sys.argv, errors = ["kaleido-fast", *args], io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main()
        except SystemExit as ended:
            status = ended.code
    return status, errors.getvalue()

def sample(out, *more):
    options = ("--chains", "{N}", "--chunk-chains", "4096", "--seed", "3", "--burn-in", "2", "--quiet")
    return call("sample", "--model", "m.safetensors", "--out", str(disk / out), *options, *more)

def refused(text, answer):
    status, errors = answer
    assert status == 2, answer
    assert errors.count("\\n") == 1, answer
    assert text in errors, answer

def contents(store):
    return {{str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a checkpoint, a whole run of it, and an empty folder ``disk``."""
    folder = tmp_path_factory.mktemp("failures")
    save_checkpoint(folder / "m.safetensors", random_mlp(3, 5, 3), ModelCard("m"))
    for name in ("whole.zarr", "whole.npy"):
        sample_to(folder / name, folder / "m.safetensors", n_chains=N, chunk_chains=4096, seed=3, burn_in=2)
    (folder / "disk").mkdir()
    return folder


def run_apart(folder: Path, code: str) -> None:
    """Run code, with the helpers above, where mounting is allowed; a failed assertion there is one here."""
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    trial = "mount -t tmpfs tmpfs disk && mount -o remount,ro disk"
    if not shutil.which("unshare") or subprocess.run([*apart, "sh", "-c", trial], cwd=folder, stderr=-3).returncode:
        pytest.skip("this machine lets no ordinary process mount a file system in a namespace of its own")
    done = subprocess.run([*apart, sys.executable, "-c", HELPERS + code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_full_disk_keeps_whole_blocks_and_the_run_goes_on_when_room_is_made(folder):
    run_apart(
        folder,
        """
mount("-t", "tmpfs", "-o", "size=640k", "tmpfs", "disk")
(disk / "ballast").write_bytes(bytes(200_000))
status, errors = sample("a.zarr")
warning, text = errors.splitlines()
assert status == 2
assert "may need" in warning and "are free there" in warning
assert "cannot write disk/a.zarr: no space left there" in text
kept = {str(file): file.read_bytes() for file in (disk / "a.zarr").glob("*/c.*")}
whole = contents(Path("whole.zarr"))
marks = [name for name in kept if "/blocks/" in name]
assert 0 < len(marks) < 10, "some blocks fit, not all"
assert not list(disk.rglob("*.part")), "nothing torn is left"
for mark in marks:
    block = mark.split("c.")[1].split(".")[0]
    for name in whole:
        if f"/c.{block}" in name and name.split("c.")[1].split(".")[0] == block:
            assert (disk / "a.zarr" / name).read_bytes() == whole[name]
refused("no space left there", sample("a.zarr"))
(disk / "ballast").unlink()
mount("-o", "remount,size=8m", "disk")
assert sample("a.zarr") == (0, "")
assert contents(disk / "a.zarr") == whole
assert [path.name for path in disk.iterdir()] == ["a.zarr"]
""",
    )


def test_a_plain_file_that_cannot_fit_is_refused_before_computing(folder):
    run_apart(
        folder,
        """
mount("-t", "tmpfs", "-o", "size=300k", "tmpfs", "disk")
refused("are free there: free some or write elsewhere", sample("a.npy"))
assert not list(disk.iterdir())
mount("-o", "remount,size=8m", "disk")
assert sample("a.npy") == (0, "")
assert (disk / "a.npy").read_bytes() == Path("whole.npy").read_bytes()
""",
    )


def test_a_plain_file_whose_disk_fills_up_goes_on_when_room_is_made(folder):
    run_apart(
        folder,
        """
from kaleido_fast.storing import filling, sample_to
mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", "disk")
prepare = sample_to.open_output

def fill(task):
    "Others take the room once the run has begun."
    prepared = prepare(task)
    (disk / "ballast").write_bytes(bytes(500_000))
    return prepared

sample_to.open_output = fill
refused("cannot write disk/a.npy: no space left there", sample("a.npy"))
sample_to.open_output = prepare
assert sorted(path.name for path in disk.iterdir()) == ["a.npy.partial", "ballast"]
(disk / "ballast").unlink()
steps = []
compute = filling.run_blocks

def count(run, phases, spans, meter, **options):
    for block in compute(run, phases, spans, meter, **options):
        steps.append(block.rows.start)
        yield block

filling.run_blocks = count
assert sample("a.npy") == (0, "")
assert 0 < len(steps) < 10, "whole blocks were kept"
assert (disk / "a.npy").read_bytes() == Path("whole.npy").read_bytes()
""",
    )


def test_a_read_only_disk_is_named_and_can_be_read(folder):
    run_apart(
        folder,
        """
mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", "disk")
assert sample("a.zarr") == (0, "")
(disk / "a.zarr" / "blocks" / "c.2.0").unlink()
before = contents(disk / "a.zarr")
mount("-o", "remount,ro", "disk")
for out in ("a.zarr", "new.zarr", "new.npy", "new.npz"):
    refused(f"cannot write disk/{out}: Read-only file system; write into a folder of yours", sample(out))
refused("Read-only file system", sample("a.zarr", "--overwrite"))
refused("Read-only file system", sample("a.zarr", "--repair"))
refused("Read-only file system", call("join", "disk/b.zarr", "whole.zarr"))
assert call("info", "disk/a.zarr") == (0, "")
from kaleido_fast import open_draws
assert len(open_draws(disk / "a.zarr")[:100]) == 100
mount("-o", "remount,rw", "disk")
assert contents(disk / "a.zarr") == before
assert sample("a.zarr") == (0, "")
assert contents(disk / "a.zarr") == contents(Path("whole.zarr"))
""",
    )


@pytest.mark.parametrize("how", [pytest.param("rename", marks=pytest.mark.slow), "remove"])
def test_a_store_taken_away_in_mid_run(folder, how, tmp_path):
    options = ("--chains", str(4096 * 24), "--chunk-chains", "4096", "--burn-in", "200", "--tol", "none", "--quiet")
    command = [sys.executable, "-m", "kaleido_fast", "sample", "--model", str(folder / "m.safetensors"), *options]
    store, away = tmp_path / "a.zarr", tmp_path / "away"
    process = subprocess.Popen([*command, "--out", str(store)], stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while len(list(store.glob("blocks/c.*"))) < 3:
            assert time.monotonic() < until, "no blocks are written"
            time.sleep(0.01)
        store.rename(away)
        if how == "remove":
            shutil.rmtree(away)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, errors.count("\n")) == (2, 1), errors
    assert "a.zarr was moved or removed while it was written" in errors
    assert not list(tmp_path.glob("a.zarr*")), "nothing is begun anew in its place"
    if how == "remove":
        return
    kept = {name: data for name, data in contents(away).items() if not name.endswith(".part")}
    away.rename(store)
    for path in (store, tmp_path / "whole.zarr"):
        subprocess.run([*command, "--out", str(path)], check=True)
    assert contents(store) == contents(tmp_path / "whole.zarr")
    assert all(contents(store)[name] == data for name, data in kept.items())
