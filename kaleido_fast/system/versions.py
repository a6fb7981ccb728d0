"""Versions of what a result depends on, and of this package itself."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import platform
import re
import sys
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
    """This package's version: the installed one's, that of the checkout it runs from, or a digest of the sources.

    The digest keeps apart what differs: an unfinished run is not continued by other sources.
    """
    installed = _version(PACKAGE)
    if installed != NOT_INSTALLED:
        return installed
    try:
        project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return _digest()
    found = re.search(rf'^name = "{PACKAGE}"\nversion = "([^"]+)"$', project, re.MULTILINE)
    return found[1] if found else _digest()


def _digest() -> str:
    """Name for sources of no known version."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return f"unknown (sources {digest.hexdigest()[:12]})"


def find_kernels() -> None:
    """Make ``kaleido_kernels`` importable in a checkout that is not installed, where it lies in a folder of its own."""
    folder = Path(__file__).parents[2] / "kernels"
    if importlib.util.find_spec("kaleido_kernels") is None and (folder / "kaleido_kernels").is_dir():
        sys.path.append(str(folder))


@functools.cache  # looking through all that is installed takes a millisecond
def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED
