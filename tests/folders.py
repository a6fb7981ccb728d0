"""Folders that tests make and look into."""

from __future__ import annotations

from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of all files, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_folder(name: str) -> Path:
    """A new folder in the one to work in."""
    Path(name).mkdir()
    return Path(name)
