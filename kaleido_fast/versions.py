"""Versions of what a result depends on, and of this package itself."""

from __future__ import annotations

import functools
import platform
import re
from importlib import metadata
from pathlib import Path

PACKAGE = "kaleido-fast"
NOT_INSTALLED = "not installed"


def library_versions(*names: str) -> dict[str, str]:
    """Versions of kaleido-fast, Python, torch, numpy and of any further distributions that are installed."""
    versions = {"python": platform.python_version(), PACKAGE: package_version()}
    for name in ("torch", "numpy", *names):
        versions[name] = _version(name)
    return versions


@functools.cache
def package_version() -> str:
    """This package's version: the installed one's, else that of the checkout it runs from, else "unknown"."""
    installed = _version(PACKAGE)
    if installed != NOT_INSTALLED:
        return installed
    try:
        project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(rf'^name = "{PACKAGE}"\nversion = "([^"]+)"$', project, re.MULTILINE)
    return found[1] if found else "unknown"


@functools.cache  # looking through all that is installed takes a millisecond
def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED
