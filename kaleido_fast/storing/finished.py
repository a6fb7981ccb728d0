"""Files that are written at once, at the end of a run: whether one that is there is what a run would write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaleido_fast.checkpoint import Scaling
from kaleido_fast.errors import InputError
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.running.blocks import Run
from kaleido_fast.storing.draws import read_draws
from kaleido_fast.storing.record import difference, planned_record, short_record


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
    """The file of draws at ``path``, if it is what ``run`` would write; None if there is none.

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
        raise InputError(
            f"{path} is there and not of this run: {found}; give another --out, or --overwrite replaces it"
        )
    return FinishedDraws(path, run.request, stored)
