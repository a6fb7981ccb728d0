"""Chunked stores: what is written is read back, and whatever is damaged is named."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from folders import contents
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_blocks import LAYOUT, block_arrays, make_record

from kaleido_fast import InputError
from kaleido_fast.storing.encoding import Encoding
from kaleido_fast.storing.layout import ARRAYS, Layout

zarr = pytest.importorskip("zarr")

from kaleido_fast.storing.npy_output import NpyOutput  # noqa: E402
from kaleido_fast.storing.store_metadata import read_metadata  # noqa: E402
from kaleido_fast.storing.zarr_output import ZarrOutput  # noqa: E402


def filled(path: Path, layout: Layout, seed: int = 0) -> ZarrOutput:
    """A store with all its blocks."""
    output = ZarrOutput.create(path, layout, make_record(layout.encoding))
    for block in range(layout.n_blocks):
        output.write(block, block_arrays(layout, block, seed))
    return output


@pytest.mark.parametrize("kind", [ZarrOutput, NpyOutput])
@given(
    n_chains=st.integers(1, 40),
    n_draws=st.integers(1, 3),
    dim=st.integers(1, 5),
    chunk=st.integers(1, 50),
    dtype=st.sampled_from(["float64", "float32", "float16", "uint8"]),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=8)
def test_blocks_in_any_order_are_read_back(tmp_path_factory, kind, n_chains, n_draws, dim, chunk, dtype, order):
    folder = tmp_path_factory.mktemp("store")
    encoding = Encoding(dtype, 2 / 255, -1.0) if dtype == "uint8" else Encoding(dtype)
    layout = Layout(n_chains, n_draws, dim, chunk, encoding)
    output = kind.create(folder / "a", layout, make_record(encoding))
    blocks = list(range(layout.n_blocks))
    order.shuffle(blocks)
    for i, block in enumerate(blocks):
        assert int(output.done().sum()) == i
        output.write(block, block_arrays(layout, block))
        assert output.done()[block]
    for block in blocks:
        for name, values in block_arrays(layout, block).items():
            assert np.array_equal(output.read(name, block), values)


def test_chunks_of_nothing_but_the_fill_value_are_stored(tmp_path):
    layout = Layout(5, 1, 2, 5, Encoding())
    output = ZarrOutput.create(tmp_path / "a.zarr", layout, make_record())
    arrays = block_arrays(layout, 0)
    arrays["draws"][:] = np.nan
    for name in ("steps", "period", "outcome"):
        arrays[name][:] = -1
    output.write(0, arrays)
    for name in ARRAYS:
        assert np.array_equal(output.read(name, 0), arrays[name], equal_nan=True)


def test_a_store_has_the_same_bytes_whoever_wrote_which_block_when(tmp_path):
    first = filled(tmp_path / "a.zarr", LAYOUT)
    second = ZarrOutput.create(tmp_path / "b.zarr", LAYOUT, make_record())
    others = [second, ZarrOutput.open(tmp_path / "b.zarr", writable=True)]
    for i, block in enumerate([3, 0, 2, 1, 2]):  # block 2 twice
        others[i % 2].write(block, block_arrays(LAYOUT, block))
    assert contents(first.path) == contents(second.path)


def test_zarr_and_xarray_read_a_store(tmp_path):
    layout = Layout(23, 2, 3, 7, Encoding("uint8", 2 / 255, -1.0))
    output = filled(tmp_path / "a.zarr", layout)
    stored = np.concatenate([block_arrays(layout, block)["draws"] for block in range(layout.n_blocks)])
    assert np.array_equal(zarr.open_group(output.path, mode="r")["draws"][:], stored)
    xarray = pytest.importorskip("xarray")
    opened = xarray.open_zarr(output.path, consolidated=False)
    assert opened["draws"].dims == ("chain", "draw", "dim")
    assert np.allclose(opened["draws"].values, layout.encoding.decode(stored), atol=1e-6)


def mutate(path: Path, rng: random.Random) -> str:
    """Change one file of a store in one way; says which and how."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = rng.choice(files)
    data = bytearray(file.read_bytes())
    how = rng.choice(["flip", "cut", "grow", "zero", "remove", "swap", "empty"])
    if how == "flip" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut" and data:
        del data[rng.randrange(len(data)) :]
    elif how == "grow":
        data += rng.randbytes(rng.randint(1, 50))
    elif how == "zero" and data:
        start = rng.randrange(len(data))
        data[start : start + 64] = bytes(len(data[start : start + 64]))
    elif how == "swap":
        data = bytearray(rng.choice(files).read_bytes())
    elif how == "empty":
        data = bytearray()
    if how == "remove":
        file.unlink()
    else:
        file.write_bytes(data)
    return f"{how} {file.relative_to(path)}"


def check_reads(path: Path, want: list[dict[str, np.ndarray]], what: str) -> tuple[int, int]:
    """Read every chunk of a store: right values or one line that names the place. Counts both."""
    right = refused = 0
    try:
        output = ZarrOutput.open(path)
    except InputError as problem:
        text = str(problem)
        assert str(path) in text, f"{what}: {text}"
        assert "\n" not in text, f"{what}: {text}"
        return 0, 1
    for block, arrays in enumerate(want):
        for name, values in arrays.items():
            try:
                got = output.read(name, block)
            except InputError as problem:
                text = str(problem)
                assert f"block {block}" in text, f"{what}: {text}"
                assert "\n" not in text, f"{what}: {text}"
                refused += 1
                continue
            assert np.array_equal(got, values), f"{what}: {name} of block {block} has other values"
            right += 1
    return right, refused


def mutation_trial(folder: Path, count: int, seed: int) -> tuple[int, int, int]:
    """``count`` mutations of a store, each on a fresh copy: changes that were found, reads that were right, refused."""
    layout = Layout(23, 2, 3, 7, Encoding())
    filled(folder / "whole.zarr", layout)
    filled(folder / "other.zarr", layout, seed=1)
    want = [block_arrays(layout, block) for block in range(layout.n_blocks)]
    rng = random.Random(seed)
    found = right = refused = 0
    for number in range(count):
        place = folder / "changed.zarr"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / "whole.zarr", place)
        if number % 10 == 9:  # a chunk of another run in the place of this one's
            chunk = rng.choice(sorted(file for file in place.rglob("c.*")))
            shutil.copy(folder / "other.zarr" / chunk.relative_to(place), chunk)
            what = f"foreign {chunk.relative_to(place)}"
        else:
            what = mutate(place, rng)
        good, bad = check_reads(place, want, what)
        right, refused, found = right + good, refused + bad, found + (bad > 0)
    return found, right, refused


def test_a_damaged_store_gives_right_values_or_names_the_chunk(tmp_path):
    found, right, refused = mutation_trial(tmp_path, 50, seed=0)
    assert found > 25
    assert right > refused


@pytest.mark.slow
def test_2000_mutations(tmp_path):
    found, right, refused = mutation_trial(tmp_path, 2000, seed=1)
    print(f"2000 mutations: {found} noticed; {right} reads right, {refused} refused by name, 0 wrong")


def test_damaged_blocks_are_dropped_and_written_again(tmp_path):
    output = filled(tmp_path / "a.zarr", LAYOUT)
    before = contents(output.path)
    (output.path / "draws" / "c.1.0.0").write_bytes(b"junk")
    (output.path / "steps" / "c.3").unlink()
    found = ZarrOutput.open(output.path, writable=True).drop_damaged()
    assert len(found) == 2
    assert "draws/c.1.0.0 of block 1" in found[0]
    assert "steps/c.3 of block 3" in found[1]
    output = ZarrOutput.open(output.path, writable=True)
    assert list(np.flatnonzero(~output.done())) == [1, 3]
    for block in (1, 3):
        output.write(block, block_arrays(LAYOUT, block))
    assert contents(output.path) == before


def test_what_is_not_a_store_is_refused_and_stays(tmp_path):
    file, folder = tmp_path / "a.zarr", tmp_path / "b.zarr"
    file.write_text("mine")
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    zarr.create_group(tmp_path / "c.zarr")
    for name in ("a.zarr", "b.zarr", "c.zarr", "d.zarr"):
        with pytest.raises(InputError) as caught:
            read_metadata(tmp_path / name)
        assert name in str(caught.value)
    for path in (file, folder):
        with pytest.raises(InputError, match="stays"):
            ZarrOutput.create(path, LAYOUT, make_record(), overwrite=True)
    assert (folder / "thesis.tex").read_text() == "mine"


def test_overwriting_replaces_a_store_and_leaves_nothing_else(tmp_path):
    filled(tmp_path / "a.zarr", LAYOUT)
    output = ZarrOutput.create(tmp_path / "a.zarr", LAYOUT, make_record(), overwrite=True)
    assert not output.done().any()
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def test_a_store_removed_while_it_is_written_is_named(tmp_path):
    output = ZarrOutput.create(tmp_path / "a.zarr", LAYOUT, make_record())
    shutil.rmtree(tmp_path / "a.zarr")
    with pytest.raises(InputError, match="moved or removed"):
        output.write(0, block_arrays(LAYOUT, 0))
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize("kind", [ZarrOutput, NpyOutput])
def test_a_full_disk_is_one_line_and_earlier_blocks_stay(tmp_path, kind):
    """A file-size limit stands in for a full disk."""
    code = f"""
import resource, signal, sys
sys.path[:0] = {list(map(str, Path(__file__).parents[:2]))!r}
from pathlib import Path
from test_zarr_output import *
from {kind.__module__} import {kind.__name__}
layout = Layout(2000, 1, 8, 1000, Encoding())
output = {kind.__name__}.create(Path({str(tmp_path / "a.zarr")!r}), layout, make_record())
output.write(0, block_arrays(layout, 0))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    output.write(1, block_arrays(layout, 1))
except InputError as problem:
    print(problem)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
assert list(output.done()) == [True, False]
assert np.array_equal(output.read("draws", 0), block_arrays(layout, 0)["draws"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "no space left" in result.stdout
    assert not list(tmp_path.rglob("*.part")), "a torn file is left"


def test_marks_hold_the_checksum_of_their_store(tmp_path):
    """A block's mark in another store is not taken for one of its own."""
    output = filled(tmp_path / "a.zarr", LAYOUT)
    other_record = {**make_record(), "request": {"seed": 2}}
    other = ZarrOutput.create(tmp_path / "b.zarr", LAYOUT, other_record)
    assert output.fingerprint != other.fingerprint
    assert output.fingerprint == zlib.crc32(json.dumps(make_record(), sort_keys=True, separators=(",", ":")).encode())
    shutil.copy(output.path / "blocks" / "c.0.0", other.path / "blocks" / "c.0.0")
    with pytest.raises(InputError, match="belongs elsewhere"):
        other.read("draws", 0)
