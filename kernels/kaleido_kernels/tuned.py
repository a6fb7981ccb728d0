"""Tables of tiles that were measured best on a GPU: plain Python, no torch, no Triton."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kaleido_kernels.choice import tile_from_json


def read_tuned(path: Path, device: str | None = None, triton: str | None = None) -> dict[str, Any]:
    """A tuned table: JSON {"device": ..., "triton": ..., "tiles": {key: tile}}; returns the tiles. Not read at import.

    Args:
        path: the file.
        device: name of the GPU that it must be of; None for any.
        triton: version of Triton that it must be of, in its first two numbers; None for any.

    Raises:
        ValueError: not such a file, or one of another GPU or Triton.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        tiles = table["tiles"]
        for values in tiles.values():
            tile_from_json(values)
        for name, wanted in (("device", device), ("triton", triton)):
            found = str(table.get(name, "unknown"))
            same = found == wanted if name == "device" else found.split(".")[:2] == (wanted or "").split(".")[:2]
            if wanted is not None and not same:
                raise ValueError(f"it is of {name} {found}, this is {wanted}")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        text = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} is no tuned table for here: {text}; delete it or measure it again") from error
    return dict(tiles)
