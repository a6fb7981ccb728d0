"""Tables of the tiles that were measured best on a GPU: the user's own and those that were shipped."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kaleido_kernels
from kaleido_fast.system.folders import user_data
from kaleido_fast.system.versions import library_versions
from kaleido_kernels.tuned import read_tuned

TUNED = Path(kaleido_kernels.__file__).parent / "tuned"


def tuned_tiles(gpu: str, folders: Sequence[Path] | None = None) -> dict[str, Any]:
    """Tiles measured best on a GPU, from table NAME.json of each folder that has one; the first folder wins.

    A table that is malformed, or of another GPU or Triton, is passed over with one line of warning.

    Args:
        gpu: name of the GPU.
        folders: None for the user's own tables and then the shipped ones.
    """
    triton = library_versions("triton")["triton"]
    tiles: dict[str, Any] = {}
    for folder in reversed([user_data() / "tuned", TUNED] if folders is None else folders):
        path = folder / table_name(gpu)
        if not path.is_file():
            continue
        try:
            tiles |= read_tuned(path, gpu, triton)
        except ValueError as problem:
            warnings.warn(f"ignored: {problem}", stacklevel=2)
    return tiles


def tables_of(gpu: str) -> tuple[tuple[Path, int], ...]:
    """The tables of a GPU that exist, with the times of their last change."""
    paths = [folder / table_name(gpu) for folder in (user_data() / "tuned", TUNED)]
    return tuple((path, path.stat().st_mtime_ns) for path in paths if path.is_file())


@functools.lru_cache(maxsize=8)  # reading takes longer than a small run
def tuned_in(gpu: str, tables: tuple[tuple[Path, int], ...]) -> dict[str, Any]:
    """`tuned_tiles`, read once as long as the tables are the same."""
    return tuned_tiles(gpu, [path.parent for path, _ in tables])


def table_name(gpu: str) -> str:
    """File name of a GPU's tuned table."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", gpu) + ".json"
