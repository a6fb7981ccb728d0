"""Whether a file of draws that is there is what a run would write: then nothing is left to compute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaleido_fast.checkpoint import Scaling
from kaleido_fast.errors import InputError
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.running.blocks import Run
from kaleido_fast.storing.draws import read_draws
from kaleido_fast.storing.npy_output import read_finished, read_partial, remove_rest
from kaleido_fast.storing.opening import StoringTask
from kaleido_fast.storing.record import difference, planned_record, short_record
from kaleido_fast.storing.zarr_output import is_store


@dataclass(frozen=True)
class FinishedDraws:
    """A run that had been finished before: the file, what was asked for, and the record in the file."""

    path: Path
    request: SampleRequest
    stored: dict[str, Any]
    stats: None = None

    def record(self) -> dict[str, Any]:
        """Request, model hash, engine, device and versions."""
        return short_record(self.stored)


def find_finished(path: Path, run: Run, scaling: Scaling | None) -> FinishedDraws | None:
    """The file of draws at ``path``, if it is what ``run`` would write at its end; None if there is none.

    Raises:
        InputError: the file is another run's, or it does not say whose it is.
    """
    if not path.exists():
        return None
    try:
        stored = read_draws(path).record
        found = difference(stored, planned_record(run, scaling))
    except (InputError, AttributeError):
        found = "it holds no draws that can be read"
    if found:
        raise _of_another_run(path, found)
    return FinishedDraws(path, run.request, stored)


def find_finished_npy(task: StoringTask) -> dict[str, Any] | None:
    """The record of an .npy that was written block by block, if it is whole and of this same run.

    None where there is something to compute.

    Raises:
        InputError: the file is another run's, or no record says whose it is.
    """
    path = task.path
    if is_store(path) or task.overwrite or not path.exists() or read_partial(path) is not None:
        return None
    stored = read_finished(path)
    found = "there is no record beside it that fits"
    try:
        if stored is not None:
            found = task.difference(stored)
    except InputError:
        found = "the record beside it belongs to another file"
    if found:
        raise _of_another_run(path, found)
    remove_rest(path)
    return stored


def _of_another_run(path: Path, found: str) -> InputError:
    return InputError(f"{path} is there and not of this run: {found}; give another --out, or --overwrite replaces it")
