"""Files of safetensors under every name that the system allows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open


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
    except UnicodeEncodeError:
        with path.open("rb") as opened, safe_open(f"/dev/fd/{opened.fileno()}", framework=framework) as file:
            yield file
    else:
        with safe_open(path, framework=framework) as file:
            yield file
