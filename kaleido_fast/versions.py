"""Versions of what a result depends on."""

from __future__ import annotations

import functools
import platform
from importlib import metadata


def library_versions(*names: str) -> dict[str, str]:
    """Versions of kaleido-fast, Python, torch, numpy and of any further distributions that are installed."""
    versions = {"python": platform.python_version()}
    for name in ("kaleido-fast", "torch", "numpy", *names):
        versions[name] = _version(name)
    return versions


@functools.cache  # looking through all that is installed takes a millisecond
def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
