"""Files that were changed at random: each is read, or refused in one line."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from raw_files import idx_bytes, images_of, npy_bytes, npz_bytes, png_bytes, tiff_bytes

from kaleido_fast.errors import InputError
from kaleido_fast.reading.datasets import load_dataset

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SLOW = settings(QUICK, max_examples=2500)


VALID = {
    "idx": ("x.idx", idx_bytes(images_of())),
    "idx.gz": ("x.idx.gz", gzip.compress(idx_bytes(images_of()), mtime=0)),
    "npy": ("x.npy", npy_bytes(np.linspace(-1, 1, 35, dtype=np.float32).reshape(7, 5))),
    "npz": ("x.npz", npz_bytes(data=images_of(), labels=np.arange(7))),
    "plain npz": ("x.npz", npz_bytes(False, data=images_of(), labels=np.arange(7))),
    "png": ("b.png", png_bytes(images_of()[0])),
    "npy.gz": ("x.npy.gz", gzip.compress(npy_bytes(np.linspace(-1, 1, 35).reshape(7, 5)), mtime=0)),
    "csv": ("x.csv", b"label,a,b\n1,0.5,-0.25\n2,0.125,1\n"),
    "tiff": ("x.tif", tiff_bytes(images_of())),
}


@st.composite
def mutations(draw, valid: bytes):
    """1 to 4 edits of a valid file: bytes changed, cut out, doubled or put in, or the end cut off."""
    content = bytearray(valid)
    # Headers are short but decide most, so half of the edits fall into the first 64 bytes.
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(64, len(content))) | st.integers(0, len(content)))
        kind = draw(st.sampled_from(["set", "set", "flip", "cut", "double", "insert", "end"]))
        length = draw(st.integers(1, 16))
        if kind == "set":
            content[at : at + 1] = bytes([draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))])
        elif kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at : at + length]
        elif kind == "double":
            content[at:at] = content[at : at + length]
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "end":
            del content[at:]
    return bytes(content)


def check_read_or_refused(folder: Path, name: str, content: bytes) -> None:
    path = folder / name
    path.write_bytes(content)
    if path.suffix == ".png":
        (folder / "a.png").write_bytes(png_bytes(images_of()[1]))
        path = folder
    try:
        data = load_dataset(path)
    except InputError as problem:
        assert "\n" not in str(problem)
        assert len(str(problem)) < 1000
    else:
        assert torch.isfinite(data.data).all()
        assert float(data.data.abs().max()) <= 1
        assert data.data.numel() <= 1 << 24


def mutation_test(kind: str, effort: settings):
    name, valid = VALID[kind]

    @effort
    @given(content=mutations(valid))
    @example(content=b"")
    @example(content=valid)
    def test(tmp_path, content):
        check_read_or_refused(tmp_path, name, content)

    return test


@pytest.mark.filterwarnings("ignore::kaleido_fast.reading.datasets.DataWarning")
@pytest.mark.parametrize("kind", VALID)
def test_mutated_files(kind, tmp_path):
    mutation_test(kind, QUICK)(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", VALID)
def test_many_mutated_files(kind, tmp_path):
    mutation_test(kind, SLOW)(tmp_path)
