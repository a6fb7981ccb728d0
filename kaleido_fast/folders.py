"""Folders of a person, after each platform's custom."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_cache() -> Path | None:
    """The folder for what the program can make again; it need not exist. None for a user without a home folder."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - does not fail where there is no home
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:  # XDG Base Directory Specification: a relative path there is to be ignored
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        base = given if given.is_absolute() else home / ".cache"
    return base / "kaleido-fast" if base.is_absolute() else None
