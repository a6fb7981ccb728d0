"""Files of examples, read without trusting a byte of them: nothing is allocated on the word of a header."""

from __future__ import annotations

import gzip
import io
import math
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import numpy as np

from kaleido_fast.errors import InputError
from kaleido_fast.reading.raw_data import MAX_BYTES, RawData, natural_range, reading

MAX_INFLATION = 1032  # deflate cannot shrink data further than 1032 : 1 (zlib's own statement)
HEADER_SLACK = 1 << 16
CHUNK = 1 << 20

IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
DATA_KEYS = ("data", "images", "x", "X", "x_train", "train_images")
LABEL_KEYS = ("labels", "label", "target", "y", "Y", "y_train", "train_labels")


def read_bounded(file: IO[bytes], n_bytes: int, path: Path, start: bytes = b"") -> bytes:
    """``start`` and what follows in a stream that ends there: exactly ``n_bytes``.

    Read in chunks so that a false size costs no memory.
    """
    parts, missing = [start], n_bytes - len(start)
    while missing > 0:
        part = file.read(min(CHUNK, missing))
        if not part:
            raise InputError(f"{path} is cut short: its header promises {missing:,} bytes more than there are")
        parts.append(part)
        missing -= len(part)
    if missing < 0 or file.read(1):
        raise InputError(f"{path} goes on after its data: its header and its length do not agree")
    return b"".join(parts)


def check_size(path: Path, n_bytes: int, stored: int) -> None:
    """Refuse a size that is too large, or that ``stored`` compressed bytes cannot possibly hold."""
    if n_bytes > MAX_BYTES:
        raise InputError(f"{path} says it holds {n_bytes:,} bytes: at most {MAX_BYTES:,} are read; split the file")
    if n_bytes > stored * MAX_INFLATION + HEADER_SLACK:
        raise InputError(f"{path} says it holds {n_bytes:,} bytes, which {stored:,} stored bytes cannot hold")


@contextmanager
def unzipped(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked as they are read where it is gzipped."""
    with path.open("rb") as plain:
        zipped = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        with cast("IO[bytes]", gzip.open(plain) if zipped else plain) as file:
            yield file


def read_idx_file(path: Path) -> RawData:
    """An IDX file, gz or not, of any type and rank; classes are taken from the matching labels file beside it."""
    labels_path = find_labels(path)
    labels = None if labels_path is None else read_idx(labels_path)
    values = read_idx(path)
    return RawData(path.name, values, labels, natural_range(values.dtype))


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file: two zero bytes, type, rank, big-endian sizes, values."""
    with reading(path, "IDX"), unzipped(path) as file:
        magic = file.read(4)
        if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in IDX_TYPES:
            raise InputError(f"{path} is not an IDX file: it starts with {magic.hex() or 'nothing'}")
        shape = struct.unpack(f">{magic[3]}I", file.read(4 * magic[3]))
        dtype = np.dtype(IDX_TYPES[magic[2]])
        n_bytes = math.prod(shape) * dtype.itemsize
        check_size(path, n_bytes, path.stat().st_size)
        if not shape or n_bytes == 0:
            raise InputError(f"{path} is empty: its header gives the shape {shape}")
        return np.frombuffer(read_bounded(file, n_bytes, path), dtype).reshape(shape)


def find_labels(images: Path) -> Path | None:
    """The labels that belong to an IDX file of images: ``X-images-idx3-ubyte`` goes with ``X-labels-idx1-ubyte``."""
    if "images" not in images.name:
        return None
    name = images.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    found = [images.with_name(name + suffix) for suffix in ("", ".gz")]
    return next((path for path in found if path.is_file()), None)


def read_npy_file(path: Path) -> RawData:
    """The array in an .npy file, gz or not. Pickles are refused."""
    with reading(path, ".npy"), unzipped(path) as file:
        values = parse_npy(path, file, path.stat().st_size)
    return RawData(path.name, values, None, natural_range(values.dtype))


def read_npz_file(path: Path) -> RawData:
    """Data and (where present) labels of an .npz file. Pickles are refused."""
    with reading(path, ".npz"), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        data_key, labels_key = choose_arrays(path, names)
        values = read_member(path, archive, data_key)
        labels = None if labels_key is None else read_member(path, archive, labels_key)
    others = [name for name in names if name not in (data_key, labels_key)]
    notes = (f"its array {data_key!r} is taken, not {', '.join(others)}",) if others else ()
    return RawData(path.name, values, labels, natural_range(values.dtype), notes)


def choose_arrays(path: Path, names: list[str]) -> tuple[str, str | None]:
    """Which array of an .npz file holds the examples, and which the classes."""
    labels = next((name for name in LABEL_KEYS if name in names), None)
    others = [name for name in names if name != labels]
    data = next((name for name in DATA_KEYS if name in others), None)
    if data is None and len(others) == 1:
        data = others[0]
    if data is None:
        raise InputError(
            f"{path} holds the arrays {', '.join(names) or '(none)'}: call the examples 'data' and the classes 'labels'"
        )
    return data, labels


def read_member(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array of an .npz file."""
    info = archive.getinfo(f"{name}.npy")
    check_size(path, info.file_size, info.compress_size)
    with archive.open(info) as file:
        return parse_npy(path, cast("IO[bytes]", file), info.compress_size)


def parse_npy(path: Path, file: IO[bytes], stored: int) -> np.ndarray:
    """The array in a stream of an .npy file, format 1.0 or 2.0, that was unpacked from ``stored`` bytes."""
    head = io.BytesIO(file.read(HEADER_SLACK))
    version = np.lib.format.read_magic(head)
    if version not in ((1, 0), (2, 0)):
        raise InputError(f"{path} has .npy format {version}: 1.0 and 2.0 are read; save plain numbers")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(head)
    if dtype.hasobject or dtype.kind not in "buif" or dtype.itemsize > 8:
        raise InputError(f"{path} holds values of type {dtype}: numbers of at most 8 bytes are read, and no pickles")
    if any(isinstance(size, bool) or size < 1 for size in shape):
        raise InputError(f"{path} is empty: its header gives the shape {shape}")
    n_bytes = math.prod(shape) * dtype.itemsize
    check_size(path, n_bytes, stored)
    flat = np.frombuffer(read_bounded(file, n_bytes, path, head.read()), dtype)
    return flat.reshape(shape, order="F" if fortran_order else "C")
