"""What readers of data give, and what they share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from kaleido_fast.errors import InputError

MAX_BYTES = 1 << 30  # of one array out of a file; as bytes, it becomes 4 GiB of fp32
_NATURAL_RANGES = {"u1": (0.0, 255.0), "b1": (0.0, 1.0)}


@dataclass(frozen=True)
class RawData:
    """Examples as they are stored: ``values`` (n, ...) in any real type, classes (n,) or None.

    ``value_range`` holds the raw values that stand for black and white where the source defines them; ``notes`` what a
    reader of the data should know.
    """

    name: str
    values: np.ndarray
    labels: np.ndarray | None = None
    value_range: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a parser throws at damaged bytes into one line.

    Parsers of foreign bytes raise a dozen kinds of exceptions (`struct.error`, `SyntaxError`, `MemoryError`, ...),
    hence the broad net.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except InputError:
        raise
    except Exception as problem:
        text = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise InputError(
            f"{path} cannot be read as {kind}: {text}; it may be damaged or of another format"
        ) from problem


def natural_range(dtype: np.dtype) -> tuple[float, float] | None:
    """The raw values that mean black and white in bytes and truth values; None for other types."""
    return _NATURAL_RANGES.get(dtype.str.lstrip("|<>="))
