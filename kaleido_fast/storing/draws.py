"""Draws in a file or a store, read as they are asked for: only what is looked at is held in memory."""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset

from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.names import OUTPUT_ENDINGS
from kaleido_fast.storing.encoding import Encoding
from kaleido_fast.storing.layout import CHAIN_DTYPES
from kaleido_fast.storing.writers import record_path
from kaleido_fast.storing.zarr_output import ZarrOutput, is_store
from kaleido_fast.system.tensor_files import open_tensors

HELD_CHUNKS = 4
MAGIC = {".npy": b"\x93NUMPY", ".npz": b"PK"}


class StoredDraws:
    """An array (n_chains, n_draws, D) in model values whose chunks are read, checked and decoded on demand.

    It takes NumPy's indices: an int, a slice, an array of ints or of truth values for chains, and anything for the
    other axes. ``numpy.asarray`` reads all of it.
    """

    def __init__(self, output: ZarrOutput) -> None:
        layout = output.layout
        self.output, self.shape, self.ndim = output, (layout.n_chains, layout.n_draws, layout.dim), 3
        stored = layout.encoding.dtype
        self.dtype = np.dtype("float32" if stored == "uint8" else stored)
        self._held: OrderedDict[int, np.ndarray] = OrderedDict()

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=object))

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, (int, np.integer)):
            place = range(len(self))[first]
            chunk = self.output.layout.chunk_chains
            return self._chunk(place // chunk)[(place % chunk, *rest)]
        if isinstance(first, slice):
            return self._gather(np.arange(*first.indices(len(self))))[(slice(None), *rest)]
        return self._gather(np.arange(len(self))[np.asarray(first)])[(slice(None), *rest)]

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        """Rows (k,) in any order, each chunk read once."""
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        chunk = self.output.layout.chunk_chains
        blocks = rows // chunk
        for block in np.unique(blocks):
            mine = blocks == block
            out[mine] = self._chunk(int(block))[rows[mine] - block * chunk]
        return out

    def _chunk(self, block: int) -> np.ndarray:
        if block in self._held:
            self._held.move_to_end(block)
            return self._held[block]
        values = self.output.layout.encoding.decode(self.output.read("draws", block))
        self._held[block] = values
        if len(self._held) > HELD_CHUNKS:
            self._held.popitem(last=False)
        return values


@dataclass(frozen=True)
class DrawsFile:
    """A file of draws as read back: ``draws`` (n_chains, n_draws, D), and the record beside it.

    Draws of a store are a `StoredDraws`, which reads what is asked for and takes NumPy's indices.
    """

    draws: Any
    record: dict[str, Any]
    path: Path


def read_draws(path: Path) -> DrawsFile:
    """Read a file of draws back; a .npy stays on disk (memory-mapped) unless it holds bytes; a store stays there too.

    Raises:
        InputError: missing, foreign or damaged.
    """
    if path.suffix == ".zarr":
        store = ZarrOutput.open(path)
        return DrawsFile(StoredDraws(store), store.record, path)
    if not path.is_file():
        raise InputError(f"{path} is not a file: give a .npy, .npz or .safetensors file of draws, or a .zarr store")
    try:
        draws, record = _read(path)
    except (OSError, ValueError, KeyError, EOFError, RecursionError, SafetensorError, zipfile.BadZipFile) as problem:
        text = " ".join(str(problem).split())
        raise InputError(
            f"{path} cannot be read as draws: {text}; it may be cut short or of another format"
        ) from problem
    encoding = Encoding.from_record(record)
    if encoding is not None and encoding.dtype == "uint8" == str(draws.dtype):
        draws = encoding.decode(draws)
    if draws.ndim != 3 or draws.dtype.kind != "f":
        raise InputError(f"{path} holds {draws.dtype} of shape {draws.shape}: draws are floats (chains, draws, D)")
    return DrawsFile(draws, record, path)


def _read(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    magic = MAGIC.get(path.suffix, b"")
    with path.open("rb") as raw:
        if raw.read(len(magic)) != magic:  # NumPy would speak of pickles, and how to load them
            raise ValueError(f"it does not begin like a {path.suffix} file")
    if path.suffix == ".npy":
        beside = record_path(path)
        record = json.loads(beside.read_text()) if beside.is_file() else {}
        return np.load(path, mmap_mode="r", allow_pickle=False), _checked_record(record)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return archive["draws"], _checked_record(json.loads(str(archive["record"])))
    if path.suffix == ".safetensors":
        with open_tensors(path, "np") as file:
            return file.get_tensor("draws"), _checked_record(json.loads((file.metadata() or {})["record"]))
    raise unknown_name("format", path.suffix, OUTPUT_ENDINGS)


def _checked_record(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InputError("the record beside the draws is not a JSON object")
    return record


class Draws(Dataset):
    """Draws of a run as a map-style torch `Dataset`: item k is the tensor (n_draws, D) of chain k, in model values.

    Args:
        path: a .zarr store, or a .npy, .npz or .safetensors file of draws.

    Raises:
        InputError: missing, foreign or damaged; damaged chunks of a store are found when they are read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open()

    def _open(self) -> None:
        self.output = ZarrOutput.open(self.path) if is_store(self.path) else None
        if self.output is not None:
            self.record: dict[str, Any] = self.output.record
            self.values: Any = StoredDraws(self.output)
            return
        file = read_draws(self.path)
        self.record, self.values = file.record, file.draws

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n_chains, n_draws, D)."""
        return self.values.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Tensor:
        return torch.from_numpy(np.array(self.values[index]))

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """A batch for a `DataLoader`: each chunk is read once."""
        return list(self[np.asarray(indices)])

    def per_chain(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """``residual``, ``steps``, ``period`` or ``outcome`` of chains; of stores only."""
        if name not in CHAIN_DTYPES or self.output is None:
            raise InputError(f"{self.path} has no {name!r}: stores have {', '.join(CHAIN_DTYPES)}")
        first, last, step = rows.indices(len(self))
        chunk = self.output.layout.chunk_chains
        blocks = range(first // chunk, -(-last // chunk))
        if not blocks:
            return np.zeros(0, CHAIN_DTYPES[name])
        read = np.concatenate([self.output.read(name, block) for block in blocks])
        return read[first - blocks[0] * chunk : last - blocks[0] * chunk : step]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # workers of a DataLoader open it anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._open()


def open_draws(path: str | Path) -> Draws:
    """Open a file or store of draws; see `Draws`."""
    return Draws(path)
