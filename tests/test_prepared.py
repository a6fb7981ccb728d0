"""Compiled kernels in an archive: packed, unpacked elsewhere, found there by Triton; and what is refused."""

from __future__ import annotations

import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from kaleido_fast import InputError
from kaleido_fast.benchmarking.gpu import prepared
from kaleido_fast.benchmarking.gpu.prepared import manifest_here, pack, unpack

ROOT = Path(__file__).parent.parent
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


def test_empty_caches_and_large_ones_are_refused(cache, tmp_path, monkeypatch):
    archive = tmp_path / "kernels.tar.xz"
    with pytest.raises(InputError, match="holds no compiled kernels"):
        pack(tmp_path, archive, None)
    monkeypatch.setattr(prepared, "MOST_BYTES", 100)
    with pytest.raises(InputError, match="at most 16 travel"):
        pack(cache, archive, None)
    assert not archive.exists()


COMPILE = """
import torch
from kaleido_kernels.emulate import compare
from kaleido_kernels.emulation.driver import CompileOnly
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
