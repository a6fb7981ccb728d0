"""What the metadata of a store state: sizes, record, and checksums of all metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kaleido_fast.errors import InputError
from kaleido_fast.storing.durable import durable_store, import_zarr
from kaleido_fast.storing.layout import ARRAYS, Layout

ENTRY, VERSION = "kaleido_fast", 1
MARKS = "blocks"
_DIMENSIONS = ("chain", "draw", "dim")


def read_metadata(path: Path) -> dict[str, Any]:
    """What the group states: sizes, ``record``; all metadata are compared with their checksums.

    Raises:
        InputError: missing, foreign or damaged.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}: give the folder of a store that kaleido-fast wrote")
    try:
        group = json.loads((path / "zarr.json").read_bytes())
        stated = group["attributes"].get(ENTRY) if group["node_type"] == "group" else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise unreadable(path, problem) from problem
    if not isinstance(stated, dict):
        raise InputError(f"{path} is not a store of draws that kaleido-fast wrote: give another path")
    if group.get("zarr_format") != 3 or stated.get("checksum") != _checksum(stated):
        raise InputError(
            f"{path}/zarr.json is damaged: its checksum does not match; restore it, or --overwrite starts anew"
        )
    if stated["version"] != VERSION:
        raise InputError(f"{path} has version {stated['version']} of the store, this release reads {VERSION}")
    for name, checksum in stated["arrays"].items():
        place = path / name / "zarr.json"
        try:
            held = _digest(json.loads(place.read_bytes()))
        except (OSError, ValueError) as problem:
            raise unreadable(place, problem) from problem
        if held != checksum:
            raise InputError(f"{place} is damaged: its checksum does not match; restore it, or --overwrite starts anew")
    return stated


def write_metadata(path: Path, layout: Layout, record: dict[str, Any]) -> None:
    """Make an empty store in a folder that is not there yet."""
    from zarr.codecs import Crc32cCodec, ZstdCodec

    zarr = import_zarr()
    store = durable_store(path, writable=True)
    group = zarr.create_group(store)
    common: dict[str, Any] = {
        "chunk_key_encoding": {"name": "default", "separator": "."},
        "compressors": [ZstdCodec(level=1), Crc32cCodec()],
        "filters": None,
    }
    chunk = min(layout.chunk_chains, layout.n_chains)
    for name, (shape, dtype) in layout.shapes().items():
        scaled = name == "draws" and dtype == "uint8"
        attributes = {"scale_factor": layout.encoding.scale, "add_offset": layout.encoding.offset} if scaled else {}
        group.create_array(
            name,
            shape=shape,
            chunks=(chunk, *shape[1:]),
            dtype=dtype,
            fill_value=np.nan if dtype.startswith("float") else 0 if dtype == "uint8" else -1,
            dimension_names=_DIMENSIONS[: len(shape)],
            attributes=attributes,
            **common,
        )
    columns = 2 + len(ARRAYS)
    group.create_array(
        MARKS,
        shape=(layout.n_blocks, columns),
        chunks=(1, columns),
        dtype="uint32",
        fill_value=0,
        dimension_names=("block", "mark"),
        **common,
    )
    names = (*ARRAYS, MARKS)
    stated: dict[str, Any] = {
        "format": "kaleido-fast store",
        "version": VERSION,
        "n_chains": layout.n_chains,
        "n_draws": layout.n_draws,
        "dim": layout.dim,
        "chunk_chains": layout.chunk_chains,
        "record": record,
        "arrays": {name: _digest(json.loads((path / name / "zarr.json").read_bytes())) for name in names},
    }
    group.attrs[ENTRY] = {**stated, "checksum": _checksum(stated)}


def canonical(value: Any) -> bytes:
    """Plain values as JSON in one form only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def _checksum(stated: Mapping[str, Any]) -> str:
    return _digest({name: value for name, value in stated.items() if name != "checksum"})


def unreadable(path: Path, problem: Exception) -> InputError:
    """The error for a store, or a part of it, that cannot be read."""
    text = " ".join(str(problem).split())[:200] or type(problem).__name__
    return InputError(f"{path} cannot be read as a store of draws: {text}; it may be damaged or of another format")
