"""Where examples come from: which reader takes a path, by what the file holds rather than by its name."""

from __future__ import annotations

import zipfile
from pathlib import Path

from kaleido_fast.errors import InputError
from kaleido_fast.names import IMAGE_SUFFIXES
from kaleido_fast.reading import foreign
from kaleido_fast.reading.arrays import place_channels
from kaleido_fast.reading.image_files import (
    class_folders,
    image_paths,
    left_out,
    read_class_folders,
    read_picture_file,
    read_picture_files,
    visible,
)
from kaleido_fast.reading.raw_data import RawData, reading
from kaleido_fast.reading.readers import IDX_TYPES, read_idx_file, read_npy_file, read_npz_file, unzipped
from kaleido_fast.reading.tables import TABLE_SUFFIXES, read_table

NPY, GZIP, ZIP = b"\x93NUMPY", b"\x1f\x8b", b"PK\x03\x04"
START = 512  # bytes of a file that show what it is
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP")
KINDS = "an IDX, .npy, .npz or CSV file, a picture, or a folder of pictures"
_LABEL_WORDS = ("label", "target", "classes")


def read_path(path: Path, background: str, channels: str | None) -> RawData:
    """The examples in a file or a folder.

    Raises:
        InputError: none that can be read; one line says what it is and what to do.
    """
    if path.is_dir():
        return read_folder(path, background, channels)
    if not path.is_file():  # a pipe would be waited for, and can be read once only
        raise InputError(f"{path} is neither a file nor a folder: write what it gives into a file first")
    raw = read_file(path, background, channels)
    _refuse_classes(path, raw)
    return raw


def read_file(path: Path, background: str, channels: str | None) -> RawData:
    """What a file holds, be it examples or classes; see `read_path`."""
    with reading(path, "data"), path.open("rb") as file:
        start = file.read(START)
    inner = start
    if start.startswith(GZIP):
        with reading(path, "gzip"), unzipped(path) as unpacked:
            inner = unpacked.read(START)
    if inner.startswith(NPY):
        return place_channels(read_npy_file(path), channels)
    if inner[:2] == b"\0\0" and len(inner) > 3 and inner[2] in IDX_TYPES and inner[3]:
        return place_channels(read_idx_file(path), channels)
    if start.startswith(GZIP):
        raise InputError(f"{path} unpacks to something that is neither IDX nor .npy: unpack it first")
    ending = path.suffix.lower()
    if start.startswith(ZIP) and _holds_arrays(path):
        return place_channels(read_npz_file(path), channels)
    if ending in IMAGE_SUFFIXES or start.startswith(_PICTURES) or start[8:12] == b"WEBP":
        return read_picture_file(path, background)
    if ending in TABLE_SUFFIXES:
        return read_table(path)
    known = foreign.describe_foreign(path, start)
    if known is None:
        raise InputError(f"{path} is of no known kind: it starts with {start[:4].hex() or 'nothing'}; give {KINDS}")
    what, remedy = known
    raise InputError(f"{path} is {what}: {remedy} ({KINDS} are read as they are)")


def _holds_arrays(path: Path) -> bool:
    """Whether a zip archive is an .npz file; a damaged one counts by its ending: the reader says what is wrong."""
    if path.suffix.lower() == ".npz":
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def _refuse_classes(path: Path, raw: RawData) -> None:
    """Refuse a file of classes in the place of examples."""
    name, values = path.name.lower(), raw.values
    called = any(word in name for word in _LABEL_WORDS) or name.startswith("y_")
    if not called or values.dtype.kind not in "iu" or values.size != len(values):
        return
    images = path.with_name(path.name.replace("labels", "images").replace("idx1", "idx3"))
    beside = f", such as {images}" if images != path and images.is_file() else ""
    raise InputError(
        f"{path} holds {len(values):,} classes, not examples: give the file of the examples{beside}; "
        "classes are passed as labels= (--labels)"
    )


def read_folder(folder: Path, background: str, channels: str | None) -> RawData:
    """An IDX file of images in a folder, or else its pictures, or those in its folders, which are then classes."""
    entries = [path for path in visible(folder) if path.is_file()]
    idx_files = {
        path.name.removesuffix(".gz"): path for path in entries if "images" in path.name and "idx" in path.name
    }
    if idx_files:
        chosen = [path for path in idx_files.values() if len(idx_files) == 1 or path.name.startswith("train")]
        if len(chosen) != 1:
            names = ", ".join(path.name for path in idx_files.values())
            raise InputError(f"folder {folder} holds several IDX files ({names}): give the path of one")
        return place_channels(read_idx_file(chosen[0]), channels)
    images = image_paths(folder)
    if images:
        raw = read_picture_files(folder.name, images, background)
        return RawData(raw.name, raw.values, None, raw.value_range, (*raw.notes, *left_out(folder, images)))
    classes = class_folders(folder)
    if classes:
        return read_class_folders(folder, classes, background)
    raise InputError(f"folder {folder} holds no IDX file and no image: {_advice(folder, entries)}")


def _advice(folder: Path, entries: list[Path]) -> str:
    """What to do about a folder without pictures."""
    if any((folder / name).exists() for name in ("zarr.json", ".zgroup", ".zarray")):
        return "it is a zarr store; pass its array in Python, or write it with numpy.save"
    for path in entries:
        if path.name.lower().endswith((".npy", ".npy.gz", ".npz", *TABLE_SUFFIXES)):
            return f"give the path of one file in it, such as {path}"
    deep = [sub for sub in visible(folder) if sub.is_dir() and class_folders(sub)]
    if deep:
        return f"its pictures lie two folders down; give one of {', '.join(str(path) for path in deep[:4])}"
    endings = sorted({path.suffix.lower() for path in entries if path.suffix})
    held = f" (it holds {', '.join(endings[:8])} files)" if endings else ""
    return f"put some there{held}; {', '.join(sorted(IMAGE_SUFFIXES))} are read"
