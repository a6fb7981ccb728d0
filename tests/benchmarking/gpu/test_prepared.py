"""Compiled kernels in an archive: packed, unpacked elsewhere, found there by Triton; and what is refused."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from kaleido_fast import InputError
from kaleido_fast.benchmarking.gpu import prepared
from kaleido_fast.benchmarking.gpu.prepared import manifest_here, pack, unpack

ROOT = Path(__file__).parents[3]
HERE = manifest_here("0123456789abcdef")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache as Triton leaves it: two kernels, each with its texts, and the C helper that has no kernel."""
    folder = tmp_path / "cache"
    for key in ("AAA", "BBB"):
        here = folder / key
        here.mkdir(parents=True)
        files = {f"k.{ending}": here / f"k.{ending}" for ending in ("cubin", "json", "ptx", "ttir")}
        for name, path in files.items():
            path.write_bytes(f"{key} {name}".encode())
        listed = {"child_paths": {name: str(path) for name, path in files.items()}}
        (here / "__grp__k.json").write_text(json.dumps(listed))
    (folder / "CCC").mkdir()
    (folder / "CCC" / "cuda_utils.so").write_bytes(b"so")
    return folder


def test_what_a_launch_needs_lies_elsewhere_afterwards(cache, tmp_path):
    archive = tmp_path / "kernels.tar.xz"
    assert pack(cache, archive, "0123456789abcdef").kernels == 2
    moved = tmp_path / "moved"
    assert unpack(archive, moved, HERE).kernels == 2
    assert {str(path.relative_to(moved)) for path in moved.rglob("*") if path.is_file()} == {
        f"{key}/{name}" for key in ("AAA", "BBB") for name in ("k.cubin", "k.json", "__grp__k.json")
    }
    listed = json.loads((moved / "BBB" / "__grp__k.json").read_text())["child_paths"]
    assert {name: Path(path).read_bytes() for name, path in listed.items()} == {
        name: f"BBB {name}".encode() for name in ("k.cubin", "k.json")
    }


def test_what_is_there_already_stays(cache, tmp_path):
    archive, moved = tmp_path / "kernels.tar.xz", tmp_path / "moved"
    pack(cache, archive, None)
    (moved / "AAA").mkdir(parents=True)
    (moved / "AAA" / "k.cubin").write_bytes(b"newer")
    unpack(archive, moved, HERE)
    assert (moved / "AAA" / "k.cubin").read_bytes() == b"newer"


def test_an_archive_of_the_same_kernels_has_the_same_bytes(cache, tmp_path):
    for name in ("a", "b"):
        pack(cache, tmp_path / name, "0")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_archive_is_for_all_device_code_and_for_no_more(tmp_path, monkeypatch):
    """Kernels may lie in folders; what judges them decides nothing of them."""
    kernels = tmp_path / "kaleido_kernels"
    monkeypatch.setattr(prepared.kaleido_kernels, "__file__", str(kernels / "__init__.py"))
    found = []
    for name in ("steps.py", "narrow/kernel.py", "stream/kernel.py", "proving/sass.py", "proving/emulation/ptx.py"):
        (kernels / name).parent.mkdir(parents=True, exist_ok=True)
        (kernels / name).write_text("x = 1")
        found.append(prepared.sources_hash())
    assert len(set(found[:3])) == 3 and set(found[3:]) == {found[2]}


@pytest.mark.parametrize(
    "change, message",
    [({"triton": "3.1.0"}, "is for Triton"), ({"sources": "other"}, "for the kernels of commit 01234567")],
)
def test_an_archive_for_something_else_is_not_used(cache, tmp_path, change, message):
    archive, moved = tmp_path / "kernels.tar.xz", tmp_path / "moved"
    pack(cache, archive, "0123456789abcdef")
    with pytest.raises(InputError, match=message):
        unpack(archive, moved, replace(HERE, **change))
    assert not moved.exists()


def test_damaged_and_foreign_archives_are_refused(cache, tmp_path):
    archive, moved = tmp_path / "kernels.tar.xz", tmp_path / "moved"
    pack(cache, archive, None)
    whole = archive.read_bytes()
    for data, message in ((whole[:-20], "damaged"), (b"", "damaged"), (lzma.compress(b"tar"), "damaged")):
        archive.write_bytes(data)
        with pytest.raises(InputError, match=message):
            unpack(archive, moved, HERE)
    for name, message in (("../evil", r"holds '\.\./evil'"), ("note.txt", "no archive of prepared kernels")):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as bundle:
            prepared._add(bundle, name, b"1")
        archive.write_bytes(lzma.compress(data.getvalue()))
        with pytest.raises(InputError, match=message):
            unpack(archive, moved, HERE)
    with pytest.raises(InputError, match="cannot be read"):
        unpack(tmp_path / "none", moved, HERE)
    assert not moved.exists()


def changed(archive: Path, change) -> None:
    """Write an archive anew whose files ``change`` has changed."""
    files = prepared._read(archive)
    change(files)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as bundle:
        for name, content in files.items():
            prepared._add(bundle, name, content)
    archive.write_bytes(lzma.compress(data.getvalue()))


def set_entry(name: str, value: object):
    """A change of one entry of the manifest."""
    return lambda files: files.update(
        {prepared.MANIFEST: json.dumps({**json.loads(files[prepared.MANIFEST]), name: value}).encode()}
    )


LAST = "BBB/__grp__k.json"
NO_ARCHIVE = "no archive of prepared kernels"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda files: files.update({LAST: b"junk"}), "damaged"),
        (lambda files: files.update({LAST: b"\xff"}), "damaged"),
        (lambda files: files.update({LAST: b"{}"}), "damaged"),
        (lambda files: files.update({LAST: b"5"}), "damaged"),
        (lambda files: files.update({LAST: b'{"child_paths": [1]}'}), "damaged"),
        (lambda files: files.update({LAST: b'{"child_paths": {}}'}), "damaged"),
        (lambda files: files.pop(LAST), "damaged"),
        (lambda files: files.pop("BBB/k.cubin"), "damaged"),
        (lambda files: files.update({"BBB": b"a file"}), "damaged"),
        (lambda files: files.update({"./BBB/k.cubin": b"twice"}), "which no archive of ours holds"),
        (lambda files: [files.pop(name) for name in list(files) if name.startswith("AAA")], "1 kernels of 2"),
        (set_entry("commit", 7), NO_ARCHIVE),
        (set_entry("kernels", "2"), NO_ARCHIVE),
        (set_entry("kernels", None), NO_ARCHIVE),
        (set_entry("format", "another"), NO_ARCHIVE),
        (set_entry("more", 1), NO_ARCHIVE),
        (set_entry("triton", "1.0"), "it is for Triton 1.0, and"),
        (set_entry("build", "0"), "another build of Triton .*: prepare with the Python version that is here"),
        (set_entry("sources", "0"), "kernels of commit 0123456789, and the kernels here are others"),
        (lambda files: files.update({prepared.MANIFEST: b"[]"}), NO_ARCHIVE),
        (lambda files: files.update({prepared.MANIFEST: b"5"}), NO_ARCHIVE),
        (lambda files: files.update({prepared.MANIFEST: b"{}"}), NO_ARCHIVE),
    ],
)
def test_a_changed_archive_is_refused_before_anything_is_unpacked(cache, tmp_path, change, message):
    archive, moved = tmp_path / "kernels.tar.xz", tmp_path / "moved"
    pack(cache, archive, "0123456789abcdef")
    changed(archive, change)
    with pytest.raises(InputError, match=message) as refused:
        unpack(archive, moved, HERE)
    assert "\n" not in str(refused.value) and not moved.exists()


@pytest.mark.parametrize("place", ["a file/cache", "/proc/kernels", "/dev/null/cache"])
def test_a_cache_that_cannot_be_written_is_one_line(cache, tmp_path, place):
    (tmp_path / "a file").write_text("")
    archive = tmp_path / "kernels.tar.xz"
    pack(cache, archive, None)
    with pytest.raises(InputError, match="cannot write") as refused:
        unpack(archive, tmp_path / place, HERE)
    assert "\n" not in str(refused.value)


def test_what_was_unpacked_when_writing_failed_is_not_taken_for_whole(cache, tmp_path, monkeypatch):
    """Triton takes a kernel for whole if its list of files is there."""
    archive, moved = tmp_path / "kernels.tar.xz", tmp_path / "moved"
    pack(cache, archive, None)
    write = prepared.atomic_path
    for most in range(6):
        left = iter(range(most))

        @contextlib.contextmanager
        def fails(path, left=left):
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            with write(path) as temporary:
                yield temporary

        monkeypatch.setattr(prepared, "atomic_path", fails)
        with pytest.raises(InputError, match="no space left"):
            unpack(archive, moved, HERE)
        for group in moved.rglob("__grp__*"):
            paths = json.loads(group.read_text())["child_paths"].values()
            assert paths and all(Path(path).exists() for path in paths), f"after {most} files"
        shutil.rmtree(moved)


def test_empty_caches_and_large_ones_are_refused(cache, tmp_path, monkeypatch):
    archive = tmp_path / "kernels.tar.xz"
    with pytest.raises(InputError, match="holds no compiled kernels"):
        pack(tmp_path, archive, None)
    monkeypatch.setattr(prepared, "MOST_BYTES", 100)
    with pytest.raises(InputError, match="travel: name fewer networks with --only"):
        pack(cache, archive, None)
    assert not archive.exists()


COMPILE = """
import torch
from kaleido_kernels.proving.emulate import compare
from kaleido_kernels.proving.emulation.driver import CompileOnly
compare("points1d", "fp16", "narrow", 16, 1, CompileOnly())
"""


def test_triton_finds_an_unpacked_kernel_in_another_folder(tmp_path):
    """Whether it compiles shows by the texts that only compiling leaves."""
    pytest.importorskip("triton")
    first, second, archive = tmp_path / "a", tmp_path / "b" / "deeper", tmp_path / "kernels.tar.xz"

    def compile_into(cache: Path) -> set[str]:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        subprocess.run([sys.executable, "-c", COMPILE], env=env, check=True)
        return {path.suffix for path in cache.rglob("narrow_kernel*")}

    assert ".ttir" in compile_into(first)
    pack(first, archive, None)
    unpack(archive, second, HERE)
    assert compile_into(second) == {".cubin", ".json"}
