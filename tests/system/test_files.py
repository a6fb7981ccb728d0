"""Files: whole under their final names only, also with long names and on odd file systems."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from commands import SAMPLE, TRAIN
from conftest import call
from folders import contents

from kaleido_fast import InputError
from kaleido_fast.system.files import atomic_path, check_writable, hidden, remove_parts


def test_an_exception_inside_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_the_longest_names_are_written_and_longer_ones_refused_before_any_work(folder, monkeypatch, capsys):
    limit = os.pathconf(".", "PC_NAME_MAX")
    fits = "a" * (limit - 4) + ".npz"
    assert call(monkeypatch, capsys, *SAMPLE, fits, "--quiet")[0] == 0
    assert sorted(path.name[-4:] for path in folder.iterdir() if path.name.startswith("aa")) == [".npz", ".png"]
    for_npy = "b" * (limit - 5) + ".npy"
    assert call(monkeypatch, capsys, *SAMPLE, for_npy, "--quiet")[0] == 0
    before = contents(folder)
    monkeypatch.setattr("kaleido_fast.running.execution.run_blocks", None)  # any work would fail
    monkeypatch.setattr("kaleido_fast.training.trainer.Loop.finish", None)
    deep = "/".join(["d" * 200] * 30)
    long = ["c" * (limit - 3) + ".npz", "c" * (limit - 4) + ".npy", "c" * 5000 + ".npz", f"{deep}/x.npz"]
    for command in [*((*SAMPLE, name) for name in long), (*TRAIN, "c" * (limit - 4) + ".pt", "--no-curve")]:
        status, _, errors = call(monkeypatch, capsys, *command, "--quiet")
        assert (status, errors.count("\n")) == (2, 1), errors[-300:]
        assert ("bytes" in errors and "give a shorter one" in errors) or "nearer to the root" in errors
    assert contents(folder) == before


def test_temporaries_of_long_names_are_found_again(folder):
    path = Path("e" * 250 + ".json")
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        kept = temporary.with_name(temporary.name)
        raise KeyError
    kept.write_text("left by a killed writer")
    remove_parts(path)
    assert not kept.exists()
    assert len(os.fsencode(hidden(path, "." * 47).name)) <= os.pathconf(".", "PC_NAME_MAX")


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.zarr", "x.safetensors"])
def test_file_systems_that_neither_flush_nor_change_modes(folder, monkeypatch, capsys, name):
    """Old network mounts answer EINVAL to fsync of a folder, buckets EPERM to chmod."""
    if name == "x.zarr":
        pytest.importorskip("zarr")

    def refuse(problem: int):
        def refused(*_, **__):
            raise OSError(problem, os.strerror(problem))

        return refused

    command = SAMPLE if name != "x.safetensors" else (*TRAIN[:-1], "--no-curve", "--out")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse(errno.EINVAL))
        for module in ("chmod", "fchmod"):
            patched.setattr(os, module, refuse(errno.EPERM))
        status, _, errors = call(patched, capsys, *command, name, "--quiet")
    assert status == 0, errors
    if name.startswith("x.n"):
        assert "does not flush" in errors
    assert call(monkeypatch, capsys, *command, f"plain-{name}", "--quiet")[0] == 0
    if Path(name).is_file():
        assert Path(name).read_bytes() == Path(f"plain-{name}").read_bytes()
        umask = os.umask(0)
        os.umask(umask)
        assert Path(f"plain-{name}").stat().st_mode & 0o777 == 0o666 & ~umask
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse(errno.EIO))
        status, _, errors = call(patched, capsys, *command, f"sick-{name}", "--quiet")
    assert (status, errors.count("\n")) == (2, 1) and "cannot write" in errors, "a sick disk is no odd file system"


def test_only_files_are_replaced(folder):
    os.mkfifo("pipe")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        check_writable(Path("pipe"))
    for name in (".", "..", "a\0b", "loop"):
        if name == "loop":
            Path(name).symlink_to("loop")
        with pytest.raises(InputError, match=r"folder|zero byte|leads to itself"):
            check_writable(Path(name))
    with pytest.raises(InputError, match="does not exist"):
        Path("far").symlink_to("nowhere/x.json")
        check_writable(Path("far"))
