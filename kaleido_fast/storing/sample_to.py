"""`sample_to`: draws go to a file or a store block by block, while others are computed, by one process or by many.

A block counts when it is durably whole; the same call again computes the blocks that are missing. What is written
does not depend on interruptions, on the number of workers or on which worker computed which block.

`opening` begins an output or finds one that is there; `filling` computes the blocks that it lacks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from kaleido_fast.checkpoint import Checkpoint, Scaling, load_checkpoint
from kaleido_fast.names import DEFAULT_MODEL
from kaleido_fast.planning.plan import SamplePlan
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.progress import Callback
from kaleido_fast.running.blocks import Run
from kaleido_fast.running.result import SampleStats
from kaleido_fast.sampling import prepare_run
from kaleido_fast.storing.filling import Spent, fill, stored_mixing
from kaleido_fast.storing.finished import find_finished_npy
from kaleido_fast.storing.layout import BlockOutput
from kaleido_fast.storing.opening import (
    OutputFiles,
    StoringTask,
    check_task,
    open_output,
    open_shared_store,
)
from kaleido_fast.storing.record import short_record
from kaleido_fast.storing.tally import Tally
from kaleido_fast.storing.writers import record_path
from kaleido_fast.storing.zarr_output import ZarrOutput
from kaleido_fast.system.locks import output_lock
from kaleido_fast.system.neutral import neutral
from kaleido_fast.system.signals import stop_signals
from kaleido_fast.system.workers import Totals, Workers, find_workers, local_device


@dataclass(frozen=True)
class StoredStats(SampleStats):
    """Figures of a run; chain-steps, seconds and speed are of this call's chains, all others of the whole run.

    Args:
        new_chains: chains that this call computed, by all workers.
    """

    new_chains: int

    @property
    def work_saved(self) -> float:
        return 1 - self.chain_steps / max(1, self.new_chains * self.n_steps)


@dataclass(frozen=True)
class StreamResult:
    """What `sample_to` wrote.

    Args:
        path: the output.
        files: all that belong to it.
        request: what was asked for, with every default and the seed filled in.
        plan: how it was run.
        stored: the record in the output.
        stats: figures; None where the run had been finished before.
        damaged: chunks that ``repair`` found and computed again, a line each.
    """

    path: Path
    files: tuple[str, ...]
    request: SampleRequest
    plan: SamplePlan
    stored: dict[str, Any]
    stats: StoredStats | None
    damaged: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Request, model hash, engine, device and versions."""
        return short_record(self.stored)


def sample_to(
    path: str | Path,
    model: nn.Module | Checkpoint | str | Path = DEFAULT_MODEL,
    *,
    n_chains: int,
    dtype: str | None = None,
    chunk_chains: int | None = None,
    overwrite: bool = False,
    repair: bool = False,
    scaling: Scaling | None = None,
    picture: str | Path | None = None,
    device: str | None = None,
    alone: bool = False,
    callback: Callback | None = None,
    progress: bool = False,
    **options: Any,
) -> StreamResult | None:
    """Sample into a .zarr store or a .npy file; memory does not grow with the number of chains.

    In processes started by ``torchrun`` each computes some of the blocks of one store. Called again after an
    interruption of whatever kind it computes what is missing, and the output ends up the same to the bit.

    Args:
        path: the output; its ending picks the format.
        model: as in `fast_sample`.
        n_chains: number of chains.
        dtype: "float32", "float16" or "uint8" (the data range in 255 steps); None keeps what is computed.
        chunk_chains: chains of a block, which is a chunk of the store; rounded up to whole tiles. None lets the plan
            choose, or takes that of an unfinished output.
        overwrite: begin anew where the output exists, and replace what else is there under the names of its files.
        repair: read every chunk of a store, and compute the damaged ones again.
        scaling: raw data to model values, for the record; None takes the checkpoint's.
        picture: a picture of the draws that the caller will write. A run that begins refuses one that exists, or
            removes it to ``overwrite``; one that goes on leaves it alone.
        alone: this process computes all blocks of an output of its own, although ``torchrun`` started others beside it.
        device: as in `fast_sample`; None gives each worker of a machine a GPU of its own where there are some.
        callback, progress: as in `fast_sample`, for all workers together.
        options: all others of `fast_sample` but ``z0`` and ``trace``.

    Returns:
        What was written; None in workers other than the first.

    Raises:
        InputError: a value that cannot be used, an output of another run, one being written by another process, a file
            that would be overwritten, a disk that is full. Blocks that were whole stay.
        StreamInterruptedError: Ctrl-C or SIGTERM.
    """
    workers = find_workers(alone=alone)
    try:
        with workers.failing_together():
            source = None
            if isinstance(model, (str, Path)):
                model = load_checkpoint(model)
            if isinstance(model, Checkpoint):
                source, scaling = model.path, scaling or model.card.scaling
            run = prepare_run(model, stored=True, device=local_device(device), n_chains=n_chains, **options)
            files = OutputFiles(Path(path), source, None if picture is None else Path(picture))
            task = StoringTask(files, run, dtype, chunk_chains, overwrite, repair, scaling)
            with stop_signals(), neutral(run.device), _bar(callback, show=progress and workers.is_first) as reported:
                if workers.is_first:
                    return _store(task, workers, reported)
                _help_store(task, workers)
                return None
    finally:
        workers.leave()


def _store(task: StoringTask, workers: Workers, callback: Callback | None) -> StreamResult:
    """Rank 0: open the output, take part in computing, wait for the others, count."""
    check_task(task, workers.size)
    with output_lock(task.path) as token:
        stored = find_finished_npy(task)
        if stored is not None:
            return _result(task, stored, [str(task.path), str(record_path(task.path))])
        output, damaged = open_output(task)
        done = output.done()
        workers.broadcast("output", {"token": token, "done": np.packbits(done).tobytes().hex()})
        workers.confirm(None)
        if done.all() and isinstance(output, ZarrOutput):
            return _result(task, output.record, [str(task.path)], damaged=damaged)
        spent, tally = fill(output, done, task.run, workers, callback)
        stats = _stats(task.run, output, tally, workers.totals(), spent)
        return _result(task, output.record, output.finish(), stats, damaged)


def _help_store(task: StoringTask, workers: Workers) -> None:
    """All other ranks: compute blocks of the store that rank 0 has opened."""
    shared = workers.broadcast("output", None)
    output = open_shared_store(task, shared["token"])
    workers.confirm(None)
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(shared["done"]), np.uint8))
    done = bits[: output.layout.n_blocks].astype(bool)
    if not done.all():
        fill(output, done, task.run, workers, None)


def _stats(run: Run, output: BlockOutput, tally: Tally, totals: Totals, spent: Spent) -> StoredStats:
    """Figures of the run: of all chains, and of the work of this call."""
    return StoredStats.of(
        run.request,
        run.plan,
        str(run.device),
        tally.figures(freezes=run.request.freezes, mixing=stored_mixing(output)),
        chain_steps=totals.chain_steps,
        **vars(spent),
        new_chains=totals.chains,
    )


def _result(
    task: StoringTask,
    stored: dict[str, Any],
    files: list[str],
    stats: StoredStats | None = None,
    damaged: list[str] | None = None,
) -> StreamResult:
    request, plan = task.run.request, task.run.plan
    return StreamResult(task.path, tuple(files), request, plan, stored, stats, tuple(damaged or ()))


@contextlib.contextmanager
def _bar(callback: Callback | None, *, show: bool) -> Iterator[Callback | None]:
    """The callback, with a progress bar beside it if asked for."""
    if not show:
        yield callback
        return
    from kaleido_fast.system.bars import sampling_bar

    with sampling_bar(callback) as bar:
        yield bar
