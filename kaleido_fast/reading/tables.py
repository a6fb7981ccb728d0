"""Text files of numbers: one example a line."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from kaleido_fast.errors import InputError
from kaleido_fast.reading.raw_data import MAX_BYTES, RawData, reading

TABLE_SUFFIXES = (".csv", ".tsv", ".tab", ".txt", ".dat")
LABEL_COLUMNS = ("label", "labels", "class", "target")
INDEX_COLUMNS = ("", "unnamed: 0")  # as pandas writes and reads it
MISSING = ("", "na", "n/a", "null", "none", "?")
MAX_TEXT = MAX_BYTES // 4  # a digit and a comma become 8 bytes


def read_table(path: Path) -> RawData:
    """A table: values between commas, semicolons, tabs or spaces, with or without a first line of names.

    A column called label, labels, class or target holds the classes; a first column without a name is an index, as
    pandas writes it, and left out.
    """
    n_bytes = path.stat().st_size
    if n_bytes > MAX_TEXT:
        raise InputError(f"{path} has {n_bytes:,} bytes: tables of at most {MAX_TEXT:,} are read; save it as .npy")
    with reading(path, "a table of numbers"):
        delimiter, names, start = _layout(path)
        with path.open(encoding="utf-8-sig") as file:
            values = np.loadtxt(file, delimiter=delimiter, skiprows=start, ndmin=2, quotechar='"')
        if names is None:
            notes = (f"no line of names: each line is an example of {values.shape[1]:,} values, without a label",)
            return RawData(path.name, values, None, None, notes)
        if len(names) != values.shape[1]:
            raise InputError(f"{path} has {len(names)} names and {values.shape[1]} columns: give each column one")
        return _named(path, values, names)


def _layout(path: Path) -> tuple[str | None, list[str] | None, int]:
    """What stands between values (None for spaces), the names if the first line holds any, and where values start."""
    with path.open(encoding="utf-8-sig") as file:
        lines = ((i, line) for i, line in enumerate(file) if _is_content(line))
        start, line = next(lines, (0, ""))
        delimiter = next((mark for mark in ("\t", ";", ",") if mark in line), None)
        cells = line.split() if delimiter is None else next(csv.reader([line.strip("\r\n")], delimiter=delimiter))
        names = [cell.strip() for cell in cells]
        has_names = not all(map(_is_number, names))
        if not line or (has_names and next(lines, None) is None):
            raise InputError(f"{path} holds no line of numbers: put one example on each line")
    if has_names:
        _refuse_half_names(path, names)
    return delimiter, names if has_names else None, start + has_names


def _refuse_half_names(path: Path, names: list[str]) -> None:
    """Refuse a first line that may be an example with a value missing: passed over, it would be lost in silence."""
    words = [name for i, name in enumerate(names) if not (_is_number(name) or _is_special(i, name))]
    if words and (any(map(_is_number, names)) or all(name.lower() in MISSING for name in names)):
        raise InputError(
            f"{path}: its first line may be names or an example, with {words[0]!r} in it: "
            "give every column a name, and every example all of its values"
        )


def _is_special(i: int, name: str) -> bool:
    """Whether a column is the classes or an index, whose names stand beside numbered columns too."""
    return name.lower() in LABEL_COLUMNS or (i == 0 and name.lower() in INDEX_COLUMNS)


def _is_content(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _named(path: Path, values: np.ndarray, names: list[str]) -> RawData:
    """Columns by their names: classes, an index, and what is left."""
    label = next((i for i, name in enumerate(names) if name.lower() in LABEL_COLUMNS), None)
    index = 0 if names[0].lower() in INDEX_COLUMNS else None
    kept = [i for i in range(len(names)) if i not in (label, index)]
    notes = []
    if index is not None:
        notes.append("its first column has no name: an index, left out")
    if label is not None:
        notes.append(f"its column {names[label]!r} holds the classes")
    if not kept:
        notes.append("there are no others")  # as examples it is refused, as classes it serves
    labels = None if label is None else values[:, label]
    return RawData(path.name, values[:, kept], labels, None, tuple(notes))
