"""Files of safetensors under every name that the system allows, and with the system's own errors."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


@contextlib.contextmanager
def open_tensors(path: Path, framework: str) -> Iterator[Any]:
    """`safetensors.safe_open`, which by itself writes but does not read files whose names are not UTF-8.

    Args:
        path: the file.
        framework: "pt" or "np", the kind of the tensors.

    Raises:
        SafetensorError, OSError, ...: as `safe_open`.
    """
    try:
        str(path).encode()
        path.open("rb").close()  # what may not be read is said not to exist
    except UnicodeEncodeError:
        with path.open("rb") as opened, safe_open(f"/dev/fd/{opened.fileno()}", framework=framework) as file:
            yield file
    else:
        with safe_open(path, framework=framework) as file:
            yield file


def write_tensors(save: Callable[..., None], tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
    """A ``save_file`` of safetensors, whose own error hides that a disk is full.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        save(tensors, path, metadata)
    except SafetensorError as problem:
        number = re.search(r"\(os error (\d+)\)", str(problem))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from problem
