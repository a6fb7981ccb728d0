"""Folders of the user, after each platform's custom."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_cache() -> Path | None:
    """The folder for what the program can make again; it need not exist. None for a user without a home folder."""
    folder = _folder("XDG_CACHE_HOME", Path(".cache"), "Caches")
    return folder if folder.is_absolute() else None


def user_data() -> Path:
    """The folder for what the program keeps for the user; it need not exist."""
    return _folder("XDG_DATA_HOME", Path(".local", "share"), "Application Support")


def _folder(variable: str, usual: Path, on_mac: str) -> Path:
    """Ours in the folder that the variable names, else in the usual one of the home folder."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - does not fail where there is no home
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / on_mac
    else:  # XDG Base Directory Specification: a relative path there is to be ignored
        given = Path(os.environ.get(variable, ""))
        base = given if given.is_absolute() else home / usual
    return base / "kaleido-fast"
