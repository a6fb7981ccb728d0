"""Files of data that are not read, by what they start with: what they are, and how to bring them in."""

from __future__ import annotations

import zipfile
from pathlib import Path

BY_LIBRARY = "load it with its own library and pass the array, or write that with numpy.save"
UNPACK = "unpack it first"
PICTURES = "write its frames as PNG files into a folder"

_STARTS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x89HDF", "an HDF5 file", BY_LIBRARY),
    (0, b"MATLAB", "a MATLAB file", BY_LIBRARY),
    (0, b"PAR1", "a Parquet file", BY_LIBRARY),
    (0, b"ARROW1", "an Arrow file", BY_LIBRARY),
    (0, b"SQLite", "an SQLite database", BY_LIBRARY),
    (0, b"SIMPLE  =", "a FITS file", BY_LIBRARY),
    (0, b"CDF\x01", "a NetCDF file", BY_LIBRARY),
    (0, b"CDF\x02", "a NetCDF file", BY_LIBRARY),
    (0, b"\xfd7zXZ", "compressed by xz", UNPACK),
    (0, b"BZh", "compressed by bzip2", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", UNPACK),
    (0, b"7z\xbc\xaf", "a 7z archive", UNPACK),
    (0, b"Rar!", "a RAR archive", UNPACK),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"%PDF", "a PDF file", "write its pages as pictures into a folder"),
    (0, b"%!PS", "a PostScript file", "write it as a picture"),
    (8, b"AVI ", "a film", PICTURES),
    (0, b"\x1aE\xdf\xa3", "a film", PICTURES),
    (4, b"ftypheic", "a HEIC picture", "save it as PNG or JPEG"),
    (4, b"ftypmif1", "a HEIC picture", "save it as PNG or JPEG"),
    (4, b"ftyp", "a film", PICTURES),
    (8, b"WAVE", "a sound", BY_LIBRARY),
    (0, b"8BPS", "a Photoshop file", "save it as PNG"),
    (0, b"<", "an XML, SVG or HTML text", "write it as a picture or as a table of numbers"),
    (0, b"{", "a JSON text", BY_LIBRARY),
    (0, b"[", "a JSON text", BY_LIBRARY),
)
_BY_ENDING = {
    ".safetensors": ("a safetensors file", "read it with safetensors.numpy.load_file and pass the array"),
    ".pkl": ("a pickle, which can run code", BY_LIBRARY),
    ".pickle": ("a pickle, which can run code", BY_LIBRARY),
    ".npy": ("no .npy file, in spite of its name", "write it anew with numpy.save"),
    ".npz": ("no .npz file, in spite of its name", "write it anew with numpy.savez"),
}
_TORCH = (
    "a file of torch.save, which is a pickle",
    "pass torch.load(path, weights_only=True) itself, or write its tensor with numpy.save",
)


def describe_foreign(path: Path, start: bytes) -> tuple[str, str] | None:
    """What a file is that begins with ``start``, and what to do; None for an unknown kind."""
    ending = path.suffix.lower()
    if ending in (".pt", ".pth", ".ckpt"):
        return _TORCH
    if start.startswith(b"PK"):
        return _describe_zip(path)
    if start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5":
        return _BY_ENDING[".pkl"]
    for offset, mark, what, remedy in _STARTS:
        if start[offset : offset + len(mark)] == mark:
            return what, remedy
    return _BY_ENDING.get(ending)


def _describe_zip(path: Path) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "a damaged zip archive", "get it anew"
    if any(name.endswith("data.pkl") for name in names):
        return _TORCH
    if any(name.startswith(("xl/", "word/", "ppt/")) for name in names):
        return "an Office document", "save the table as CSV"
    return "a zip archive that holds no .npy file", UNPACK
