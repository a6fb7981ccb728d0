"""Stores of neighbouring chains, such as those of an array job, become the store that one run would have written."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kaleido_fast.errors import InputError, StreamInterruptedError, TerminatedError
from kaleido_fast.storing.layout import ARRAYS, Layout
from kaleido_fast.storing.record import difference, names_no_kernel
from kaleido_fast.storing.zarr_output import ZarrOutput, is_store
from kaleido_fast.system.locks import output_lock
from kaleido_fast.system.outputs import check_outputs
from kaleido_fast.system.signals import stop_signals


def join_stores(
    path: str | Path,
    parts: Sequence[str | Path],
    *,
    overwrite: bool = False,
    callback: Callable[[int, int], None] | None = None,
) -> ZarrOutput:
    """Join stores into one; parts may come in any order and stay as they are.

    All must hold the same run but for ``first_chain`` and ``n_chains``, and be finished, without gaps or overlaps.
    Every chunk is checked as it is read. After an interruption the same call goes on.

    Args:
        path: the store to write.
        parts: stores to read.
        overwrite: replace an existing store.
        callback: called with blocks done and blocks in all.

    Raises:
        InputError: parts of different runs, an unfinished part, a gap, an overlap, or a damaged chunk.
        StreamInterruptedError: Ctrl-C or SIGTERM.
    """
    path = Path(path)
    if not is_store(path):
        raise InputError(f"output {path}: stores are joined into a store, whose name ends in .zarr")
    sources = {f"part {i}": part for i, part in enumerate(parts, 1)}
    check_outputs({"joined store": path}, sources, overwrite=True, stores=[path], remedy="give another name")
    opened = _ordered([ZarrOutput.open(Path(part)) for part in parts])
    layout, record = _whole(opened)
    with output_lock(path):
        if path.exists() and not overwrite:
            output = ZarrOutput.open(path, writable=True)
            found = difference(output.record, record)
            if found:
                raise InputError(f"{path} belongs to another run: {found}; give another name, or --overwrite")
            output.remove_parts()
        else:
            output = ZarrOutput.create(path, layout, record, overwrite=overwrite)
        try:
            with stop_signals():
                _copy(opened, output, callback)
        except KeyboardInterrupt as stop:
            terminated = isinstance(stop, TerminatedError)
            kept = f"{int(output.done().sum()):,} of {output.layout.n_blocks:,} chunks are in {path}"
            text = f"{'terminated' if terminated else 'interrupted'}: {kept}; the same command goes on from there"
            raise StreamInterruptedError(text, terminated=terminated) from stop
    return output


def _copy(parts: list[ZarrOutput], output: ZarrOutput, callback: Callable[[int, int], None] | None) -> None:
    """Write the blocks that are missing."""
    missing, n_blocks = np.flatnonzero(~output.done()).tolist(), output.layout.n_blocks
    for i, block in enumerate(missing):
        rows = output.layout.rows(block)
        output.write(block, {name: _gather(parts, name, rows) for name in ARRAYS})
        if callback is not None:
            callback(n_blocks - len(missing) + i + 1, n_blocks)


def _first(part: ZarrOutput) -> int:
    return int(part.record["request"]["first_chain"])


def _ordered(parts: list[ZarrOutput]) -> list[ZarrOutput]:
    """Parts by their first chain, if they belong together."""
    if not parts:
        raise InputError("nothing to join: give the stores of the parts")
    parts = sorted(parts, key=_first)
    for part in parts:
        missing = int((~part.done()).sum())
        if missing:
            raise InputError(f"{part.path} is unfinished: {missing:,} blocks are missing; give its command again first")
    base = next((part for part in parts if not names_no_kernel(part.record)), parts[0])
    for before, part in itertools.pairwise(parts):
        found = difference(_common(base.record), _common(part.record))
        if found:
            raise InputError(f"{base.path} and {part.path} are of different runs: {found}")
        end, first = _first(before) + before.layout.n_chains, _first(part)
        if first != end:
            what = "overlap" if first < end else "leave a gap"
            raise InputError(
                f"{before.path} ends before chain {end:,} and {part.path} begins with chain {first:,}: they {what}"
            )
    return parts


def _common(record: dict[str, Any]) -> dict[str, Any]:
    request = {name: value for name, value in record["request"].items() if name not in ("first_chain", "n_chains")}
    return {**record, "request": request}


def _whole(parts: list[ZarrOutput]) -> tuple[Layout, dict[str, Any]]:
    """Shapes and record of all parts together."""
    first = parts[0].layout
    n_chains = sum(part.layout.n_chains for part in parts)
    record = {**parts[0].record, "request": {**parts[0].record["request"], "n_chains": n_chains}}
    return Layout(n_chains, first.n_draws, first.dim, first.chunk_chains, first.encoding), record


def _gather(parts: list[ZarrOutput], name: str, rows: slice) -> np.ndarray:
    """Rows of the joined run, read from the parts that hold them."""
    found, begin = [], 0
    for part in parts:
        low, high = max(rows.start - begin, 0), min(rows.stop - begin, part.layout.n_chains)
        if low < high:
            chunk = part.layout.chunk_chains
            first, last = low // chunk, -(-high // chunk)
            held = np.concatenate([part.read(name, block) for block in range(first, last)])
            found.append(held[low - first * chunk : high - first * chunk])
        begin += part.layout.n_chains
    return np.concatenate(found)
