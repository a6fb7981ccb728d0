"""Versions of what a result depends on."""

from __future__ import annotations

import platform
from importlib import metadata


def library_versions(*names: str) -> dict[str, str]:
    """Versions of kaleido-fast, Python, torch, numpy and of any further distributions that are installed."""
    versions = {"python": platform.python_version()}
    for name in ("kaleido-fast", "torch", "numpy", *names):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
