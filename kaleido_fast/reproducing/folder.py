"""The folders that reports are written into."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from kaleido_fast.errors import InputError
from kaleido_fast.system.files import check_writable

UNFINISHED = ".unfinished"
"""A file in a report's folder until the report is whole; it holds the names of the report's files."""


def make_folder(folder: Path) -> None:
    """Make a folder if need be, and refuse one that cannot be written, before any work is done."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {folder} is a file: give a folder")
    if not folder.exists():
        check_writable(folder)
        folder.mkdir()
    check_writable(folder / "report.md")


def check_report_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, but for files of a report that was stopped, unless to ``overwrite``."""
    if overwrite:
        return
    try:
        ours = (folder / UNFINISHED).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        ours = []
    found = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and path.name not in ours)
    if found:
        raise InputError(
            f"{folder} holds {found[0]} already, and files of a report could overwrite others: give another --out, or "
            "--overwrite replaces those of the same names"
        )


@contextlib.contextmanager
def made_folders(folders: Sequence[Path]) -> Iterator[None]:
    """Make folders, parents first, before any work is done; at the end those go that are still empty."""
    made = [folder for folder in folders if not folder.exists()]
    try:
        for folder in folders:
            make_folder(folder)
        yield
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()
