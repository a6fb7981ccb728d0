"""Files of examples, read without trusting a byte of them: nothing is allocated on the word of a header."""

from __future__ import annotations

import gzip
import io
import math
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
from PIL import Image

from kaleido_fast.errors import InputError
from kaleido_fast.model import MAX_WIDTH

MAX_BYTES = 1 << 30  # of one array; as bytes, it becomes 4 GiB of fp32
MAX_INFLATION = 1032  # deflate cannot shrink data further than 1032 : 1 (zlib's own statement)
HEADER_SLACK = 1 << 16
CHUNK = 1 << 20

IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
DATA_KEYS = ("data", "images", "x", "X", "x_train", "train_images")
LABEL_KEYS = ("labels", "label", "target", "y", "Y", "y_train", "train_labels")
_NATURAL_RANGES = {"u1": (0.0, 255.0), "b1": (0.0, 1.0)}


@dataclass(frozen=True)
class RawData:
    """Examples as they are stored: ``values`` (n, ...) in any real type, classes (n,) or None.

    ``value_range`` holds the raw values that stand for black and white where the source defines them.
    """

    name: str
    values: np.ndarray
    labels: np.ndarray | None = None
    value_range: tuple[float, float] | None = None


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a parser throws at damaged bytes into one line.

    Parsers of foreign bytes raise a dozen kinds of exceptions (`struct.error`, `SyntaxError`, `MemoryError`, ...),
    hence the broad net.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except InputError:
        raise
    except Exception as problem:
        text = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise InputError(
            f"{path} cannot be read as {kind}: {text}; it may be damaged or of another format"
        ) from problem


def natural_range(dtype: np.dtype) -> tuple[float, float] | None:
    """The raw values that mean black and white in bytes and truth values; None for other types."""
    return _NATURAL_RANGES.get(dtype.str.lstrip("|<>="))


def read_bounded(file: IO[bytes], n_bytes: int, path: Path) -> bytes:
    """Exactly ``n_bytes`` of a stream that ends there, read in chunks so that a false size costs no memory."""
    parts, missing = [], n_bytes
    while missing > 0:
        part = file.read(min(CHUNK, missing))
        if not part:
            raise InputError(f"{path} is cut short: its header promises {missing:,} bytes more than there are")
        parts.append(part)
        missing -= len(part)
    if file.read(1):
        raise InputError(f"{path} goes on after its data: its header and its length do not agree")
    return b"".join(parts)


def check_size(path: Path, n_bytes: int, stored: int) -> None:
    """Refuse a size that is too large, or that ``stored`` compressed bytes cannot possibly hold."""
    if n_bytes > MAX_BYTES:
        raise InputError(f"{path} says it holds {n_bytes:,} bytes: at most {MAX_BYTES:,} are read; split the file")
    if n_bytes > stored * MAX_INFLATION + HEADER_SLACK:
        raise InputError(f"{path} says it holds {n_bytes:,} bytes, which {stored:,} stored bytes cannot hold")


def read_idx_file(path: Path) -> RawData:
    """An IDX file, gz or not, of any type and rank; classes are taken from the matching labels file beside it."""
    labels_path = find_labels(path)
    labels = None if labels_path is None else read_idx(labels_path)
    values = read_idx(path)
    return RawData(path.name, values, labels, natural_range(values.dtype))


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file: two zero bytes, type, rank, big-endian sizes, values."""
    with reading(path, "IDX"), path.open("rb") as plain:
        zipped = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        with cast("IO[bytes]", gzip.open(plain) if zipped else plain) as file:
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


def read_array_file(path: Path) -> RawData:
    """The array in an .npy file, or data and (where present) labels of an .npz file. Pickles are refused."""
    if path.suffix == ".npy":
        with reading(path, ".npy"):
            check_size(path, path.stat().st_size, path.stat().st_size)
            values = parse_npy(path, path.read_bytes())
        return RawData(path.name, values, None, natural_range(values.dtype))
    with reading(path, ".npz"), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        data_key, labels_key = choose_arrays(path, names)
        values = read_member(path, archive, data_key)
        labels = None if labels_key is None else read_member(path, archive, labels_key)
    return RawData(path.name, values, labels, natural_range(values.dtype))


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
        return parse_npy(path, read_bounded(file, info.file_size, path))


def parse_npy(path: Path, content: bytes) -> np.ndarray:
    """The array in the bytes of an .npy file, format 1.0 or 2.0."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise InputError(f"{path} has .npy format {version}: 1.0 and 2.0 are read; save plain numbers")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(stream)
    if dtype.hasobject or dtype.kind not in "buif" or dtype.itemsize > 8:
        raise InputError(f"{path} holds values of type {dtype}: numbers of at most 8 bytes are read, and no pickles")
    if any(isinstance(size, bool) or size < 1 for size in shape):
        raise InputError(f"{path} is empty: its header gives the shape {shape}")
    n_bytes, held = math.prod(shape) * dtype.itemsize, len(content) - stream.tell()
    if n_bytes != held:
        raise InputError(f"{path} is cut short or overlong: its header promises {n_bytes:,} bytes and {held:,} follow")
    flat = np.frombuffer(content, dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran_order else "C")


def read_folder(folder: Path) -> RawData:
    """An IDX file of images in a folder, or else all image files of the folder in the order of their names."""
    entries = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    idx_files = {
        path.name.removesuffix(".gz"): path for path in entries if "images" in path.name and "idx" in path.name
    }
    if idx_files:
        chosen = [path for path in idx_files.values() if len(idx_files) == 1 or path.name.startswith("train")]
        if len(chosen) != 1:
            names = ", ".join(path.name for path in idx_files.values())
            raise InputError(f"folder {folder} holds several IDX files ({names}): give the path of one")
        return read_idx_file(chosen[0])
    images = [path for path in entries if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise InputError(
            f"folder {folder} holds no IDX file and no image ({', '.join(sorted(IMAGE_SUFFIXES))}): put some there"
        )
    return RawData(folder.name, read_images(images), None, (0.0, 255.0))


def read_images(paths: list[Path]) -> np.ndarray:
    """Images of one size as bytes: (n, height, width) for grey ones, (n, height, width, 3) for colour."""
    first = read_image(paths[0])
    if first.nbytes * len(paths) > MAX_BYTES:
        raise InputError(f"{len(paths):,} images like {paths[0]} fill {first.nbytes * len(paths):,} bytes: too many")
    images = np.empty((len(paths), *first.shape), np.uint8)
    for i, path in enumerate(paths):
        image = read_image(path)
        if image.shape != first.shape:
            raise InputError(
                f"{paths[0]} is {_size_text(first)} and {path} is {_size_text(image)}: all images must be alike"
            )
        images[i] = image
    return images


def read_image(path: Path) -> np.ndarray:
    """One image as bytes: grey stays grey, all else becomes RGB; transparency is dropped, 16-bit images are refused."""
    with reading(path, "an image"), Image.open(path) as image:
        channels = 1 if image.mode in ("1", "L", "LA") else 3
        if image.width * image.height * channels > MAX_WIDTH:
            raise InputError(
                f"{path} is {image.width} x {image.height}: at most {MAX_WIDTH:,} values are read; shrink it"
            )
        if image.mode.startswith(("I", "F")):
            raise InputError(f"{path} has more than 8 bits a value (mode {image.mode}): save it with 8")
        return np.asarray(image.convert("L" if channels == 1 else "RGB"))


def _size_text(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]} {'grey' if image.ndim == 2 else 'colour'}"
