"""Hashes of results and of files, without what may change from run to run: times, versions, paths."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.bits.case import Note

TIMES = {"seconds", "setup_seconds", "compile_seconds", "chain_steps_per_second"}
VOLATILE = TIMES | {"versions", "created_with", "path", "checksum"}  # checksums are of records with versions


def plain(value: Any) -> Any:
    """Values of a record without the volatile ones, also in JSON texts inside of it."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items() if key not in VOLATILE}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return plain(json.loads(value))
        except ValueError:
            return value
    return value


def feed(digest: hashlib._Hash, value: Any) -> None:
    """Add a value: arrays by type, shape and bytes, all others by their text."""
    if isinstance(value, Note):
        return
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, dict):
        kept = {str(key): inner for key, inner in value.items() if key not in VOLATILE}
        digest.update(f"{{{len(kept)}".encode())
        for key in sorted(kept):
            digest.update(key.encode())
            feed(digest, kept[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for inner in value:
            feed(digest, inner)
    else:
        cleaned = plain(value)
        feed(digest, cleaned) if isinstance(cleaned, (dict, list)) else digest.update(f"{value!r};".encode())


def feed_files(digest: hashlib._Hash, folder: Path) -> None:
    """Add every file below a folder: its name and its content."""
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode())
        feed(digest, contents(path))


def contents(path: Path) -> Any:
    """What a file holds; records inside of it as values, so that volatile ones can be left out."""
    whole = path.read_bytes()
    if path.suffix == ".json":
        return whole.decode()
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: str(arrays[name]) if arrays[name].dtype.kind == "U" else arrays[name] for name in arrays}
    length = int.from_bytes(whole[:8], "little")
    if whole[8:9] == b"{" and length < len(whole):  # safetensors: the header's length, the header, tensors
        return [whole[8 : 8 + length].decode(), hashlib.sha256(whole[8 + length :]).hexdigest()]
    return hashlib.sha256(whole).hexdigest()
