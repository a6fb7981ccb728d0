"""Tiles as plain values, and tables of those measured best on a GPU: plain Python, no torch, no Triton."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from kaleido_kernels.kernels import plan
from kaleido_kernels.shapes import KERNELS, NetShape, next_power_of_two
from kaleido_kernels.tile import AnyTile

FIELD_TYPES = {"kernel": str, "use_tma": bool, "in_turns": bool}
"""Types of a tile's values that are no counts."""


def tile_to_json(tile: AnyTile) -> dict[str, Any]:
    """A tile as plain values."""
    return {"kernel": tile.kernel, **asdict(cast("Any", tile))}


def tile_from_json(values: dict[str, Any]) -> AnyTile:
    """The inverse of `tile_to_json`.

    Raises:
        ValueError: values that no tile has.
    """
    try:
        fields = dict(values)
        for name, value in fields.items():
            if type(value) is not FIELD_TYPES.get(name, int):  # 64.0 and true are no counts
                raise ValueError(f"not a tile: {values}: {name} is {value!r}")
        kernel = fields.pop("kernel", None)
        if kernel not in KERNELS:
            raise ValueError(f"not a tile: {values}: kernel is {kernel!r}: choose one of {', '.join(KERNELS)}")
        return plan(kernel).tile_of(**fields)
    except TypeError as error:
        raise ValueError(f"not a tile: {values}: {error}") from error


def tuned_key(shape: NetShape, precision: str) -> str:
    """The key of a tuned table: padded width, depth, activation and device precision."""
    width = next_power_of_two(max(shape.hidden, 1))
    return f"w{width}-d{shape.dim}-l{shape.n_layers}-{shape.activation}-{precision}"


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
