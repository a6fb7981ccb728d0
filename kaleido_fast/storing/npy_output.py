"""An .npy file written block by block, beside which a folder ``NAME.npy.partial`` lives until the file is whole.

The folder holds ``draws.npy``, an .npy for each array that is known of chains, ``blocks.npy`` (one byte a block, set
when the block is on disk) and ``record.json``. Blocks are written with plain writes at their places: through a memory
map, a full disk would be a signal (SIGBUS) and not an error. Unlike a store it has no checksums, and one writer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kaleido_fast.errors import InputError
from kaleido_fast.storing.durable import write_rows_durably
from kaleido_fast.storing.layout import CHAIN_DTYPES, Layout
from kaleido_fast.storing.writers import record_path
from kaleido_fast.system.files import atomic_path, follow, partial, remove_parts, sync_folder, write_error

RECORD, MARKS = "record.json", "blocks"


class NpyOutput:
    """See `BlockOutput`; ``path`` is the final name."""

    def __init__(self, path: Path, layout: Layout, record: dict[str, Any]) -> None:
        self.path, self.layout, self.record = path, layout, record
        self.folder = partial_folder(path)
        self.shapes = {**layout.shapes(), MARKS: ((layout.n_blocks,), "uint8")}
        self.offsets = {name: self._header_bytes(name) for name in self.shapes}

    @classmethod
    def create(cls, path: Path, layout: Layout, record: dict[str, Any], *, overwrite: bool = False) -> NpyOutput:
        """Begin a file; ``overwrite`` throws an earlier unfinished one away. The caller holds the lock."""
        folder = partial_folder(path)
        shapes = {**layout.shapes(), MARKS: ((layout.n_blocks,), "uint8")}
        try:
            if overwrite and (folder / RECORD).is_file():
                shutil.rmtree(folder)
            remove_rest(path)
            if folder.exists():
                raise InputError(f"{folder} is there and no run has left it: move it away or give another --out")
            folder.mkdir()
            for name, (shape, dtype) in shapes.items():
                made = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.dtype(dtype), shape)
                made.flush()
                del made
            stated = {"chunk_chains": layout.chunk_chains, "record": record, "overwrite": overwrite}
            with atomic_path(folder / RECORD) as temporary:  # last: a folder without it is not begun
                temporary.write_text(json.dumps(stated))
            sync_folder(folder)
            sync_folder(folder.parent)
        except OSError as problem:
            raise write_error(path, problem) from problem
        return cls(path, layout, record)

    @classmethod
    def resume(cls, path: Path, layout: Layout, record: dict[str, Any]) -> NpyOutput:
        """Go on with an unfinished file, also one that was killed just after it got its final name."""
        draws = partial_folder(path) / "draws.npy"
        if path.is_file() and not draws.exists():
            follow(path).replace(draws)
        return cls(path, layout, record)

    def done(self) -> np.ndarray:
        """(n_blocks,) bool: which blocks are whole."""
        return self._load(MARKS, slice(0, self.layout.n_blocks)).astype(bool)

    def write(self, block: int, arrays: Mapping[str, np.ndarray]) -> None:
        """See `BlockOutput.write`."""
        first = self.layout.rows(block).start
        try:
            for name in self.layout.shapes():
                self._store(name, first, arrays[name])
            self._store(MARKS, block, np.ones(1, np.uint8))
        except FileNotFoundError as problem:
            raise InputError(
                f"{self.folder} was moved or removed while it was written; put it back and give the same command"
            ) from problem
        except OSError as problem:
            raise write_error(self.path, problem) from problem

    def read(self, name: str, block: int) -> np.ndarray:
        """See `BlockOutput.read`."""
        return self._load(name, self.layout.rows(block))

    def finish(self) -> list[str]:
        """Give the file its final name, and put its record beside it."""
        beside = record_path(self.path)
        try:
            remove_parts(beside)
            with atomic_path(beside) as temporary:
                temporary.write_text(json.dumps(self.record, sort_keys=True, indent=1) + "\n")
            (self.folder / "draws.npy").replace(follow(self.path))
            sync_folder(self.folder.parent)
            self.discard()
        except OSError as problem:
            raise write_error(self.path, problem) from problem
        return [str(self.path), str(beside)]

    def discard(self) -> None:
        """Remove the folder; without its record, which goes first, it is nothing that a run goes on with."""
        (self.folder / RECORD).unlink()
        shutil.rmtree(self.folder)

    def _header_bytes(self, name: str) -> int:
        with (self.folder / f"{name}.npy").open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            return file.tell()

    def _row(self, name: str) -> tuple[int, tuple[int, ...], np.dtype]:
        """Bytes, shape and type of one row of an array."""
        shape, dtype = self.shapes[name]
        kind = np.dtype(dtype)
        return int(np.prod(shape[1:], dtype=np.int64)) * kind.itemsize, shape[1:], kind

    def _store(self, name: str, first: int, values: np.ndarray) -> None:
        row_bytes, _, kind = self._row(name)
        data = memoryview(np.ascontiguousarray(values, kind).tobytes())
        write_rows_durably(self.folder / f"{name}.npy", self.offsets[name] + first * row_bytes, data)

    def _load(self, name: str, rows: slice) -> np.ndarray:
        row_bytes, shape, dtype = self._row(name)
        try:
            with (self.folder / f"{name}.npy").open("rb") as file:
                file.seek(self.offsets[name] + rows.start * row_bytes)
                held = file.read((rows.stop - rows.start) * row_bytes)
            return np.frombuffer(held, dtype).reshape(-1, *shape)
        except (OSError, ValueError) as problem:
            raise InputError(f"{self.folder} cannot be read: {problem}; delete it to start anew") from problem


def partial_folder(path: Path) -> Path:
    """Where the blocks of an unfinished .npy are: where the file will be, that they can become it by a new name."""
    return partial(follow(path))


def remove_rest(path: Path) -> None:
    """Remove a folder that holds nothing but what a run leaves that is killed before its record is there, or after."""
    folder = partial_folder(path)
    ours = {f"{name}.npy" for name in ("draws", *CHAIN_DTYPES, MARKS)}
    if folder.is_dir() and all(file.name in ours or file.name.startswith(f".{RECORD}.") for file in folder.iterdir()):
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Begun:
    """What an unfinished .npy says of itself.

    Args:
        chunk_chains: chains of a block.
        record: of the run.
        overwrite: whether it may replace the files that bear its names.
        ends: whether it was stopped when all was in place but for this folder's end.
    """

    chunk_chains: int
    record: dict[str, Any]
    overwrite: bool
    ends: bool


def read_partial(path: Path) -> Begun | None:
    """What is known of an unfinished .npy; None if none was begun.

    Raises:
        InputError: it was, and is damaged.
    """
    place = partial_folder(path) / RECORD
    if not place.is_file():
        return None
    try:
        stated = json.loads(place.read_text())
        ends = not (place.parent / "draws.npy").exists()
        overwrite = bool(stated.get("overwrite", False))  # those of earlier versions do not say
        return Begun(int(stated["chunk_chains"]), dict(stated["record"]), overwrite, ends)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise InputError(f"{place} is damaged: delete {place.parent} to start anew") from problem


def read_finished(path: Path) -> dict[str, Any] | None:
    """The record beside a whole .npy; None if there is none that fits the file."""
    try:
        record = json.loads(record_path(path).read_text())
        request = record["request"]
        shape = np.load(path, mmap_mode="r").shape
        whole = shape[:2] == (request["n_chains"], request["n_draws"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None
