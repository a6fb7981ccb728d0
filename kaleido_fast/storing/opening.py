"""How the output of a run is opened: begun, continued where it is the same run's, or refused before any work."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaleido_fast.checkpoint import Scaling
from kaleido_fast.errors import InputError, unknown_name, warn_caller
from kaleido_fast.names import BLOCK_ENDINGS
from kaleido_fast.planning.blocks import stored_block
from kaleido_fast.planning.options import MAX_COUNT
from kaleido_fast.running.blocks import Run
from kaleido_fast.scalars import whole_number
from kaleido_fast.storing.durable import import_zarr
from kaleido_fast.storing.encoding import Encoding
from kaleido_fast.storing.layout import BlockOutput, Layout
from kaleido_fast.storing.npy_output import Begun, NpyOutput, read_partial
from kaleido_fast.storing.record import as_begun, difference, names_no_kernel, stored_record
from kaleido_fast.storing.store_metadata import read_metadata
from kaleido_fast.storing.writers import record_path
from kaleido_fast.storing.zarr_output import ZarrOutput, is_store
from kaleido_fast.system.files import follow, write_error
from kaleido_fast.system.locks import read_token
from kaleido_fast.system.outputs import check_outputs

_REMEDY = "give another --out or move it away"


@dataclass(frozen=True)
class OutputFiles:
    """The output, what will be beside it, and the checkpoint that is sampled, where it is a file."""

    path: Path
    source: Path | None
    picture: Path | None

    @property
    def written(self) -> dict[str, Path | None]:
        """All that is written, by what it is."""
        return {"output": self.path, **self.beside}

    @property
    def beside(self) -> dict[str, Path | None]:
        """All but the output itself."""
        return {"record": None if is_store(self.path) else record_path(self.path), "picture": self.picture}

    def remove_picture(self) -> None:
        """Remove the picture of an output that is begun anew."""
        if self.picture is not None:
            try:
                follow(self.picture).unlink(missing_ok=True)
            except OSError as problem:
                raise write_error(self.picture, problem) from problem


@dataclass(frozen=True)
class StoringTask:
    """A run and how its draws are stored; options as in `kaleido_fast.storing.sample_to.sample_to`."""

    files: OutputFiles
    run: Run
    dtype: str | None
    chunk_chains: int | None
    overwrite: bool
    repair: bool
    scaling: Scaling | None

    @property
    def path(self) -> Path:
        """The output."""
        return self.files.path

    def layout(self) -> Layout:
        """Shapes of a new output."""
        run, n = self.run, self.run.request.n_chains
        chunk = self.chunk_chains
        if chunk is None:  # not what is at work at once: block_chains changes no byte
            chunk = stored_block(run.plan.tile_rows, run.subject.dim * run.request.n_draws)
        chunk = whole_number("chunk_chains", chunk, 1, MAX_COUNT)
        tile = run.plan.tile_rows
        if chunk < n and chunk % tile:
            rounded = -(-chunk // tile) * tile
            text = f"chunk_chains {chunk:,} is rounded up to {rounded:,}, whole tiles of {tile:,}"
            warn_caller(text, UserWarning)
            chunk = rounded
        return Layout(n, run.request.n_draws, run.subject.dim, min(chunk, n), self.encoding())

    def encoding(self) -> Encoding:
        """How draws of a new output are stored."""
        return Encoding.choose(self.dtype, self.run.subject.data_range, self.run.request.precision)

    def record(self, stored: dict[str, Any] | None = None) -> dict[str, Any]:
        """The record of a new output; where no type of draws was asked for, with the encoding of one that is there."""
        encoding = None if stored is None else Encoding.from_record(stored)
        if encoding is None or self.dtype is not None:
            encoding = self.encoding()
        return stored_record(self.run, encoding, self.scaling)

    def difference(self, stored: dict[str, Any]) -> str:
        """What sets this run apart from that of an output, by its record; "" where it may go on with it.

        Raises:
            InputError: the record states an encoding that makes no sense.
        """
        return difference(stored, as_begun(self.record(stored), stored))


def check_task(task: StoringTask, n_workers: int) -> None:
    """Refuse what can be refused without looking into the output.

    Raises:
        InputError: it cannot be stored, or not at this path, or not by so many workers.
    """
    path = task.path
    if path.suffix not in BLOCK_ENDINGS:
        raise unknown_name("format of draws that are written in blocks", path.suffix or path.name, BLOCK_ENDINGS)
    subject = task.run.subject
    if not subject.model_hash:
        raise InputError(
            f"this {type(subject.module).__name__} cannot be told from other models: {subject.unidentified}; a run "
            "that goes on later could mix two: use fast_sample, or keep that out of the module"
        )
    if task.run.request.trace is not None:
        raise InputError("trace is not written to files: use fast_sample, or leave it out")
    if is_store(path):
        import_zarr()
    # What is there is looked at when the lock is held, with what it says of its run.
    stores = [path] if is_store(path) else []
    check_outputs(task.files.written, {"model": task.files.source}, overwrite=True, stores=stores)
    if stores:
        return
    if n_workers > 1:
        raise InputError(f"{n_workers} workers cannot share {path}: give a .zarr store, or one process or --alone")
    if task.repair:
        raise InputError(f"{path} has no checksums: --repair is for .zarr stores; --overwrite starts anew")


def open_output(task: StoringTask) -> tuple[BlockOutput, list[str]]:
    """The output, begun or found, and the damage that was found in it. The caller holds the lock.

    Raises:
        InputError: it cannot be begun, or it is another run's.
    """
    if is_store(task.path):
        if task.overwrite or not task.path.exists():
            return _begin_store(task), []
        return _continue_store(task)
    begun = None if task.overwrite else read_partial(task.path)
    return (_begin_npy(task) if begun is None else _continue_npy(task, begun)), []


def open_shared_store(task: StoringTask, token: str) -> ZarrOutput:
    """The store that the first worker has opened, for another one.

    Args:
        task: what this worker would store.
        token: of the first worker's lock, which lies in the folder that it writes to.

    Raises:
        InputError: it is not there, or this worker would compute something else.
    """
    if read_token(task.path) != token:
        raise InputError(
            f"{task.path.absolute()} is not the folder that the first worker writes to: --out has to lie on "
            "storage that all workers share"
        )
    output = ZarrOutput.open(task.path, writable=True)
    problem = task.difference(output.record)
    if problem:
        raise InputError(f"it would compute something other than the first worker: {problem}")
    return output


def _begin_npy(task: StoringTask) -> NpyOutput:
    check_outputs(task.files.beside, overwrite=task.overwrite, ours=_own_record(task), remedy=_REMEDY)
    layout = task.layout()
    _check_space(task.path, layout.n_bytes, certain=True)
    output = NpyOutput.create(task.path, layout, task.record(), overwrite=task.overwrite)
    if task.overwrite:
        task.files.remove_picture()
    return output


def _continue_npy(task: StoringTask, begun: Begun) -> NpyOutput:
    path, stored = task.path, begun.record
    _refuse_difference(task, stored)
    if not begun.overwrite:  # what has appeared since it began is not ours, but for its last steps
        moved = [path] if begun.ends else []
        found = {"output": path, "record": record_path(path)}
        check_outputs(found, ours=[*moved, *_own_record(task)], remedy="move it away to go on")
    layout = task.layout()
    encoding = Encoding.from_record(stored) or layout.encoding
    layout = Layout(layout.n_chains, layout.n_draws, layout.dim, begun.chunk_chains, encoding)
    return NpyOutput.resume(path, layout, stored)


def _own_record(task: StoringTask) -> list[Path]:
    """The .json beside the output, if it is the record of this same run."""
    path = record_path(task.path)
    try:
        stored = json.loads(path.read_text())
        return [] if difference(stored, task.record(stored)) else [path]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError):
        return []


def _begin_store(task: StoringTask) -> ZarrOutput:
    check_outputs(task.files.beside, overwrite=task.overwrite, remedy=_REMEDY)
    layout = task.layout()
    output = ZarrOutput.create(task.path, layout, task.record(), overwrite=task.overwrite)
    if task.overwrite:
        task.files.remove_picture()
    _check_space(task.path, layout.n_bytes, certain=False)
    return output


def _continue_store(task: StoringTask) -> tuple[ZarrOutput, list[str]]:
    path, asked = task.path, task.chunk_chains
    _refuse_difference(task, read_metadata(path)["record"])
    output = ZarrOutput.open(path, writable=True)
    chunk = output.layout.chunk_chains
    if asked is not None and asked != chunk and task.layout().chunk_chains != chunk:
        raise InputError(f"{path} has chunks of {chunk:,} chains, asked for are {asked:,}: leave that out")
    output.remove_parts()
    return output, output.drop_damaged() if task.repair else []


def _refuse_difference(task: StoringTask, stored: dict[str, Any]) -> None:
    """Refuse an output that another run began."""
    found = task.difference(stored)
    if found:
        raise InputError(
            f"{task.path} belongs to another run: {found}; ask for the same to go on, or --overwrite starts anew"
        )
    if names_no_kernel(stored):
        warn_caller(
            f"{task.path} was begun by an earlier version, which could record a wrong kernel: whether the same one "
            "goes on is not checked",
            UserWarning,
        )


def _check_space(path: Path, n_bytes: int, *, certain: bool) -> None:
    free = shutil.disk_usage(path.parent).free
    if n_bytes <= free:
        return
    if certain:
        raise InputError(
            f"output {path} needs {n_bytes:,} bytes, {free:,} are free there: free some or write elsewhere"
        )
    warn_caller(f"{path} may need {n_bytes:,} bytes before compression, {free:,} are free there", UserWarning)
