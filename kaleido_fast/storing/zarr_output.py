"""Chunked stores of draws: a Zarr v3 group that any number of processes fill block by block.

Arrays ``draws`` (n_chains, n_draws, D), ``residual``, ``steps``, ``period``, ``outcome`` (n_chains,), and ``blocks``:
one row a block with its number and the checksums of its chunks. That row is written last, when the chunks are on
disk: a block counts when its row is there. Chunks are compressed (Zstandard) and checksummed (CRC-32C) by Zarr's
codecs. The group's attribute ``kaleido_fast`` holds the record of the run, and checksums of all metadata.
Nothing in a store depends on the time, the machine, the number of workers or the order in which blocks were written.
"""

from __future__ import annotations

import glob
import shutil
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kaleido_fast.errors import InputError
from kaleido_fast.storing.durable import durable_store, import_zarr, last_checksum
from kaleido_fast.storing.encoding import Encoding
from kaleido_fast.storing.layout import ARRAYS, Layout
from kaleido_fast.storing.store_metadata import MARKS, canonical, read_metadata, unreadable, write_metadata
from kaleido_fast.system.files import check_folder, follow, hidden, sync_folder, write_error


class ZarrOutput:
    """A store on a local or shared file system, see `BlockOutput`.

    Args:
        path: the store's folder.
        layout: as stated in its record.
        record: of the run.
        writable: whether blocks will be written.
    """

    def __init__(self, path: Path, layout: Layout, record: dict[str, Any], *, writable: bool = False) -> None:
        self.path, self.layout, self.record = path, layout, record
        self.store = durable_store(path, writable=writable)
        group = import_zarr().open_group(self.store, mode="r+" if writable else "r", use_consolidated=False)
        # Without this Zarr drops chunks that hold nothing but the fill value, such as draws that are all NaN.
        config = {"write_empty_chunks": True}
        self.arrays: dict[str, Any] = {name: group[name].with_config(config) for name in (*ARRAYS, MARKS)}
        self.fingerprint = zlib.crc32(canonical(record))
        self._last_mark: np.ndarray | None = None

    @classmethod
    def create(cls, path: Path, layout: Layout, record: dict[str, Any], *, overwrite: bool = False) -> ZarrOutput:
        """Make an empty store; it appears when its metadata are whole. The caller holds the lock.

        Raises:
            InputError: the folder cannot be written, or ``path`` is something else than a store.
        """
        import_zarr()
        check_folder(path)
        place = follow(path)
        if overwrite and place.exists():
            _check_removable(path)
        temporary = hidden(place, f".{uuid.uuid4().hex}.part")
        try:
            write_metadata(temporary, layout, record)
            if overwrite and place.exists():
                place.rename(hidden(place, f".{uuid.uuid4().hex}.part"))
            temporary.rename(place)
            sync_folder(place.parent)
        except OSError as problem:
            raise write_error(path, problem) from problem
        finally:
            remove_leftovers(path)
        return cls(path, layout, record, writable=True)

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> ZarrOutput:
        """Open an existing store.

        Raises:
            InputError: it is missing, foreign, or its metadata are damaged.
        """
        import_zarr()
        stated = read_metadata(path)
        record = stated["record"]
        encoding = Encoding.from_record(record)
        assert encoding is not None
        n_chains, n_draws, dim, chunk = (int(stated[name]) for name in ("n_chains", "n_draws", "dim", "chunk_chains"))
        try:
            return cls(path, Layout(n_chains, n_draws, dim, chunk, encoding), record, writable=writable)
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise unreadable(path, problem) from problem

    def done(self) -> np.ndarray:
        """(n_blocks,) bool: which blocks are whole; one listing of a folder."""
        done = np.zeros(self.layout.n_blocks, bool)
        for name in _names(self.path / MARKS):
            _, _, number = name.removesuffix(".0").partition("c.")
            if number.isdecimal() and int(number) < len(done):
                done[int(number)] = True
        return done

    def write(self, block: int, arrays: Mapping[str, np.ndarray]) -> None:
        """See `BlockOutput.write`."""
        rows, self._last_mark = self.layout.rows(block), None
        try:
            for name in ARRAYS:
                self.arrays[name][rows] = arrays[name]
            mark = [self.fingerprint, block, *(self.store.checksums.pop(self._key(name, block)) for name in ARRAYS)]
            self.arrays[MARKS][block] = np.array(mark, np.uint32)
            self.store.checksums.clear()
        except FileNotFoundError as problem:
            raise InputError(
                f"{self.path} was moved or removed while it was written; put it back and give the same command to go on"
            ) from problem
        except OSError as problem:
            raise write_error(self.path, problem) from problem

    def read(self, name: str, block: int) -> np.ndarray:
        """See `BlockOutput.read`."""
        place = f"{name}/{self._chunk(name, block)}"
        mark = self._mark(block)
        if mark is None:
            raise InputError(
                f"{self.path}: block {block} ({place}) is missing: the run is unfinished; "
                "give its command again to go on"
            )
        try:
            held = last_checksum(self.path / place)
            if held != mark[2 + ARRAYS.index(name)]:
                raise _damaged(self.path, place, block, "it is not the one that was written")
            return np.asarray(self.arrays[name][self.layout.rows(block)])
        except FileNotFoundError:
            raise _damaged(self.path, place, block, "it is not there") from None
        except (OSError, ValueError, RuntimeError, TypeError, KeyError) as problem:
            if isinstance(problem, InputError):
                raise
            raise _damaged(self.path, place, block, problem) from problem

    def drop_damaged(self) -> list[str]:
        """Read every whole block; forget the damaged ones, so that they are computed again. Says what was wrong."""
        found = []
        for block in np.flatnonzero(self.done()):
            try:
                for name in ARRAYS:
                    self.read(name, int(block))
            except InputError as problem:
                found.append(str(problem))
                self.forget(int(block))
        return found

    def forget(self, block: int) -> None:
        """Take back that a block is whole."""
        self._last_mark = None
        try:
            (self.path / MARKS / self._chunk(MARKS, block)).unlink(missing_ok=True)
            sync_folder(self.path / MARKS)
        except OSError as problem:
            raise write_error(self.path, problem) from problem

    def remove_parts(self) -> None:
        """Remove what a killed writer left; only while no process writes."""
        for name in (*ARRAYS, MARKS):
            for entry in _names(self.path / name):
                if entry.endswith(".part"):
                    (self.path / name / entry).unlink(missing_ok=True)

    def finish(self) -> list[str]:
        """Nothing is left to do: a store is whole when its blocks are."""
        return [str(self.path)]

    def _mark(self, block: int) -> np.ndarray | None:
        """What was noted when a block was whole, None if it is not; that of the last block asked for is remembered."""
        if self._last_mark is not None and self._last_mark[1] == block % 2**32:
            return self._last_mark
        place = f"{MARKS}/{self._chunk(MARKS, block)}"
        try:
            mark = np.asarray(self.arrays[MARKS][block])
        except (OSError, ValueError, RuntimeError, TypeError, KeyError) as problem:
            raise _damaged(self.path, place, block, problem) from problem
        if not mark.any():
            return None
        if mark[0] != self.fingerprint or mark[1] != block % 2**32:
            raise _damaged(self.path, place, block, "it belongs elsewhere")
        self._last_mark = mark
        return mark

    def _chunk(self, name: str, block: int) -> str:
        return self.arrays[name].metadata.encode_chunk_key((block, *[0] * (self.arrays[name].ndim - 1)))

    def _key(self, name: str, block: int) -> str:
        return f"{name}/{self._chunk(name, block)}"


def is_store(path: Path) -> bool:
    """Whether a path is meant as a store."""
    return path.suffix == ".zarr"


def remove_leftovers(path: Path) -> None:
    """Remove half-made and replaced stores beside ``path``; only while the lock is held."""
    begin = hidden(follow(path), "")
    for place in begin.parent.glob(f"{glob.escape(begin.name)}.*.part"):
        shutil.rmtree(place, ignore_errors=True)


def _check_removable(path: Path) -> None:
    """Only a store is replaced: anything else of that name stays."""
    if not path.is_dir() or not set(_names(path)) <= {"zarr.json", MARKS, *ARRAYS}:
        raise InputError(f"output {path} was not written by kaleido-fast and stays as it is: choose another name")


def _names(folder: Path) -> list[str]:
    try:
        return [place.name for place in folder.iterdir()]
    except OSError as problem:
        raise InputError(
            f"{folder} cannot be listed: {problem.strerror}; is the store whole and readable?"
        ) from problem


def _damaged(path: Path, place: str, block: int, problem: object) -> InputError:
    text = " ".join(str(problem).split())[:200] or type(problem).__name__
    return InputError(
        f"{path}: chunk {place} of block {block} is damaged: {text}; the run's command with --repair computes it again"
    )
