"""JSON that every reader takes: Python's own writes NaN and Infinity, which no other language knows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def json_text(value: Any, *, indent: int | None = None, sort_keys: bool = True) -> str:
    """``value`` as JSON in ASCII; numbers that are NaN or infinite become null.

    Args:
        value: dictionaries, lists, tuples, texts, numbers (numpy's too), truth values, paths, None.
        indent, sort_keys: as in `json.dumps`.
    """
    return json.dumps(_plain(value), indent=indent, sort_keys=sort_keys, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # numpy's and torch's
        return _plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
