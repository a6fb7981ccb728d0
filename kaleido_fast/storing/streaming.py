"""`sample_to`: draws go to a file or a store block by block, while others are computed, by one process or by many.

A block counts when it is durably whole; the same call again computes the blocks that are missing. What is written
does not depend on interruptions, on the number of workers or on who computed which block.
"""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kaleido_fast.checkpoint import Scaling, load_checkpoint
from kaleido_fast.engines.general import ModuleEngine
from kaleido_fast.errors import CrewError, InputError, StreamInterruptedError, TerminatedError, unknown_name
from kaleido_fast.modules.identity import Watch, identify
from kaleido_fast.names import DEFAULT_MODEL
from kaleido_fast.planning.blocks import streamed_block
from kaleido_fast.planning.plan import SamplePlan
from kaleido_fast.planning.request import MAX_COUNT, SampleRequest
from kaleido_fast.progress import Callback, Meter, SampleProgress
from kaleido_fast.running.blocks import Block, Run, run_blocks
from kaleido_fast.running.engine import build_phases
from kaleido_fast.running.execution import memory_advice
from kaleido_fast.running.mixing import LEAST_DRAWS, Mixing, measure_mixing, watched_chains
from kaleido_fast.running.result import ChainArrays, SampleStats
from kaleido_fast.sampling import prepare_run
from kaleido_fast.scalars import whole_number
from kaleido_fast.storing.encoding import Encoding
from kaleido_fast.storing.layout import PER_CHAIN, BlockOutput, Layout
from kaleido_fast.storing.npy_output import NpyOutput, read_finished, read_partial, remove_rest
from kaleido_fast.storing.record import as_begun, difference, short_record, stored_record
from kaleido_fast.storing.stores import ZarrOutput, import_zarr, is_store, read_metadata
from kaleido_fast.storing.tally import Tally
from kaleido_fast.storing.writers import record_path
from kaleido_fast.system.devices import is_lack_of_memory
from kaleido_fast.system.files import follow, write_error
from kaleido_fast.system.locks import output_lock, read_token
from kaleido_fast.system.neutral import neutral
from kaleido_fast.system.outputs import check_outputs
from kaleido_fast.system.signals import stop_signals
from kaleido_fast.system.threads import threads
from kaleido_fast.system.workers import Crew, Totals, find_crew, local_device

ENDINGS = (".zarr", ".npy")
WAITING_BLOCKS = 2
_REMEDY = "give another --out or move it away"


@dataclass(frozen=True)
class StreamStats(SampleStats):
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
    stats: StreamStats | None
    damaged: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Request, model hash, engine, device and versions."""
        return short_record(self.stored)


def sample_to(
    path: str | Path,
    model: nn.Module | str | Path = DEFAULT_MODEL,
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
    crew = find_crew(alone=alone)
    try:
        source = None
        if isinstance(model, (str, Path)):
            checkpoint = load_checkpoint(model)
            source, scaling = checkpoint.path, scaling or checkpoint.card.scaling
        run = prepare_run(model, streamed=True, device=local_device(device), n_chains=n_chains, **options)
        files = _Files(Path(path), source, None if picture is None else Path(picture))
        task = _Task(files, run, dtype, chunk_chains, overwrite, repair, scaling)
        with stop_signals(), neutral(run.device), _bar(callback, show=progress and crew.leads) as told:
            if crew.leads:
                return task.lead(crew, told)
            task.follow(crew)
            return None
    except InputError as problem:
        if crew.fail(str(problem)):
            raise CrewError(str(problem), told=True) from problem
        raise
    except KeyboardInterrupt:
        crew.fail("it was interrupted")
        raise
    finally:
        crew.leave()


@dataclass(frozen=True)
class _Files:
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

    def replace_picture(self) -> None:
        """Remove the picture of an output that is begun anew."""
        if self.picture is not None:
            try:
                follow(self.picture).unlink(missing_ok=True)
            except OSError as problem:
                raise write_error(self.picture, problem) from problem


@dataclass(frozen=True)
class _Task:
    """A run and the output that it is for."""

    files: _Files
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

    def lead(self, crew: Crew, callback: Callback | None) -> StreamResult:
        """Prepare the output, take part in computing, wait for the others, count."""
        self.check(crew)
        with output_lock(self.path) as token:
            stored = self.finished_file()
            if stored is not None:
                return self.result(stored, [str(self.path), str(record_path(self.path))], None, [])
            output, damaged = self.prepare()
            done = output.done()
            crew.share("output", {"token": token, "done": np.packbits(done).tobytes().hex()})
            crew.confirm(None)
            if done.all() and isinstance(output, ZarrOutput):
                return self.result(output.record, [str(self.path)], None, damaged)
            computed, tally = self.compute(output, done, crew, callback)
            stats = self.stats(output, tally, crew.totals(), computed)
            return self.result(output.record, output.finish(), stats, damaged)

    def follow(self, crew: Crew) -> None:
        """Compute blocks of the output that the first worker has prepared."""
        shared = crew.share("output", None)
        problem, output = None, None
        if read_token(self.path) != shared["token"]:
            problem = (
                f"{self.path.absolute()} is not the folder that the first worker writes to: --out has to lie on "
                "storage that all workers share"
            )
        else:
            output = ZarrOutput.open(self.path, writable=True)
            problem = difference(output.record, as_begun(self.record(output.layout.encoding), output.record))
            problem = problem and f"it would compute something else than the first worker: {problem}"
        crew.confirm(problem)
        assert output is not None
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(shared["done"]), np.uint8))
        done = bits[: output.layout.n_blocks].astype(bool)
        if not done.all():
            self.compute(output, done, crew, None)

    def check(self, crew: Crew) -> None:
        """Refuse what can be refused without looking into the output."""
        if self.path.suffix not in ENDINGS:
            raise unknown_name(
                "format of draws that are written in blocks", self.path.suffix or self.path.name, ENDINGS
            )
        subject = self.run.subject
        if not subject.model_hash:
            raise InputError(
                f"this {type(subject.module).__name__} cannot be told from other models: {subject.untold}; a run that "
                "goes on later could mix two: use fast_sample, or keep that out of the module"
            )
        if self.run.request.trace is not None:
            raise InputError("trace is not written to files: use fast_sample, or leave it out")
        if is_store(self.path):
            import_zarr()
        # What is there is looked at when the lock is held, with what it says of its run.
        stores = [self.path] if is_store(self.path) else []
        check_outputs(self.files.written, {"model": self.files.source}, overwrite=True, stores=stores)
        if stores:
            return
        if crew.size > 1:
            raise InputError(
                f"{crew.size} workers cannot share {self.path}: give a .zarr store, or one process or --alone"
            )
        if self.repair:
            raise InputError(f"{self.path} has no checksums: --repair is for .zarr stores; --overwrite starts anew")

    def layout(self) -> Layout:
        """Shapes of a new output."""
        run, n = self.run, self.run.request.n_chains
        chunk = self.chunk_chains
        if chunk is None:  # whatever is at work at once: block_chains changes no byte
            chunk = streamed_block(run.plan.tile_rows, run.subject.dim * run.request.n_draws)
        chunk = whole_number("chunk_chains", chunk, 1, MAX_COUNT)
        tile = run.plan.tile_rows
        if chunk < n and chunk % tile:
            rounded = -(-chunk // tile) * tile
            text = f"chunk_chains {chunk:,} is rounded up to {rounded:,}, whole tiles of {tile:,}"
            warnings.warn(text, stacklevel=5)
            chunk = rounded
        encoding = Encoding.choose(self.dtype, run.subject.data_range, run.request.precision)
        return Layout(n, run.request.n_draws, run.subject.dim, min(chunk, n), encoding)

    def record(self, encoding: Encoding | None = None) -> dict[str, Any]:
        """Of the output, see `stored_record`; in another ``encoding`` where no type was asked for."""
        run = self.run
        if encoding is None or self.dtype is not None:
            encoding = Encoding.choose(self.dtype, run.subject.data_range, run.request.precision)
        return stored_record(run, encoding, self.scaling)

    def finished_file(self) -> dict[str, Any] | None:
        """The record of an .npy that is whole and of this very run; None where there is something to compute.

        Raises:
            InputError: the file is another run's, or nobody knows whose.
        """
        if is_store(self.path) or self.overwrite or not self.path.exists() or read_partial(self.path) is not None:
            return None
        stored = read_finished(self.path)
        found = "no record that fits is beside it"
        try:
            if stored is not None:
                found = difference(stored, as_begun(self.record(Encoding.from_record(stored)), stored))
        except InputError:
            found = "the record beside it is of something else"
        if found:
            raise InputError(
                f"{self.path} is there and not of this run: {found}; give another --out, or --overwrite replaces it"
            )
        remove_rest(self.path)
        return stored

    def prepare(self) -> tuple[BlockOutput, list[str]]:
        """The output, begun or found, and the damage that was found in it."""
        if is_store(self.path):
            return self.prepare_store()
        begun = None if self.overwrite else read_partial(self.path)
        if begun is None:
            check_outputs(self.files.beside, overwrite=self.overwrite, ours=self.own_record(), remedy=_REMEDY)
            layout = self.layout()
            _check_space(self.path, layout.n_bytes, certain=True)
            output = NpyOutput.create(self.path, layout, self.record(), overwrite=self.overwrite)
            if self.overwrite:
                self.files.replace_picture()
            return output, []
        chunk, stored = begun.chunk_chains, begun.record
        encoding = Encoding.from_record(stored)
        self.refuse_difference(stored, encoding)
        if not begun.overwrite:  # whatever has appeared since it began is not ours, but for its last steps
            moved = [self.path] if begun.ends else []
            found = {"output": self.path, "record": record_path(self.path)}
            check_outputs(found, ours=[*moved, *self.own_record()], remedy="move it away to go on")
        layout = self.layout()
        layout = Layout(layout.n_chains, layout.n_draws, layout.dim, chunk, encoding or layout.encoding)
        return NpyOutput.resume(self.path, layout, stored), []

    def own_record(self) -> list[Path]:
        """The .json beside the output, where it is the record of this very run."""
        path = record_path(self.path)
        try:
            stored = json.loads(path.read_text())
            return [] if difference(stored, self.record(Encoding.from_record(stored))) else [path]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError):
            return []

    def prepare_store(self) -> tuple[ZarrOutput, list[str]]:
        if self.overwrite or not self.path.exists():
            check_outputs(self.files.beside, overwrite=self.overwrite, remedy=_REMEDY)
            layout = self.layout()
            output = ZarrOutput.create(self.path, layout, self.record(), overwrite=self.overwrite)
            if self.overwrite:
                self.files.replace_picture()
            _check_space(self.path, layout.n_bytes, certain=False)
            return output, []
        stated = read_metadata(self.path)
        self.refuse_difference(stated["record"], Encoding.from_record(stated["record"]))
        output = ZarrOutput.open(self.path, writable=True)
        chunk, asked = output.layout.chunk_chains, self.chunk_chains
        if asked is not None and asked != chunk and self.layout().chunk_chains != chunk:
            raise InputError(f"{self.path} has chunks of {chunk:,} chains, asked for are {asked:,}: leave that out")
        output.remove_parts()
        return output, output.drop_damaged() if self.repair else []

    def refuse_difference(self, stored: dict[str, Any], encoding: Encoding | None) -> None:
        """Refuse an output that another run began."""
        found = difference(stored, as_begun(self.record(encoding), stored))
        if found:
            raise InputError(
                f"{self.path} belongs to another run: {found}; ask for the same to go on, or --overwrite starts anew"
            )

    def compute(
        self, output: BlockOutput, done: np.ndarray, crew: Crew, callback: Callback | None
    ) -> tuple[_Computed, Tally]:
        """Compute and write blocks until none is left for anybody; an interruption says what is kept.

        Every worker counts its own chains and its share of those that were there before: the leader gets all counts.
        """
        tally, whole = Tally(), Tally()
        try:
            with threads(output.record.get("threads")):
                computed = self.compute_missing(output, done, crew, tally, callback)
            count_blocks(output, np.flatnonzero(done)[crew.rank :: crew.size].tolist(), tally)
            for counts in crew.gather("tally", tally.plain()):
                whole.include(counts)
        except KeyboardInterrupt as stop:
            raise self.interrupted(output, terminated=isinstance(stop, TerminatedError)) from stop
        return computed, whole

    def compute_missing(
        self, output: BlockOutput, done: np.ndarray, crew: Crew, tally: Tally, callback: Callback | None
    ) -> _Computed:
        began = time.perf_counter()
        layout, run = output.layout, self.run
        missing = np.flatnonzero(~done).tolist()
        if crew.leads and crew.size > max(1, len(missing)):
            warnings.warn(f"{crew.size} workers for {len(missing)} blocks: some have nothing to do", stacklevel=3)
        phases = build_phases(run.subject, run.request, run.plan, run.device)
        engine = phases[0].engine
        watch = Watch(*engine.read_modules) if isinstance(engine, ModuleEngine) else None  # others hold copies
        if watch is not None and identify(run.subject.module).digest != run.subject.model_hash:
            raise InputError(
                "the model changed while the output was prepared, whose record names it as it was: nothing is written; "
                "put it back and give the same command to go on, or --overwrite starts anew"
            )
        before = layout.n_chains - sum(layout.length(block) for block in missing)
        meter = Meter(layout.n_chains, run.request.schedule.n_steps, _for_all(callback, crew, before), before)
        setup = time.perf_counter() - began

        def write(block: Block) -> None:
            number = block.rows.start // layout.chunk_chains
            arrays = _as_arrays(block.chains, layout.encoding)
            output.write(number, arrays)
            tally.add(arrays["residual"], arrays["steps"], arrays["outcome"])
            crew.count(len(block.chains), block.chain_steps)

        with _Writer(write) as writer:
            try:
                spans = (layout.rows(block) for block in crew.take(missing))
                for block in run_blocks(run, phases, spans, meter):
                    _refuse_change(watch)
                    writer.put(_on_host(block))
                writer.finish()
                while crew.leads and crew.totals().blocks < len(missing):
                    crew.wait()
                    meter.add(0)
            except KeyboardInterrupt:
                with contextlib.suppress(InputError):
                    writer.finish()
                raise
            except (RuntimeError, MemoryError) as problem:
                if is_lack_of_memory(problem):
                    raise memory_advice(run) from None
                raise
        compiling = sum(getattr(phase.engine, "compile_seconds", 0.0) for phase in phases)
        return _Computed(setup, time.perf_counter() - began - setup, compiling)

    def interrupted(self, output: BlockOutput, *, terminated: bool) -> StreamInterruptedError:
        """What is kept, in one line."""
        layout = output.layout
        kept = sum(layout.length(int(block)) for block in np.flatnonzero(output.done()))
        if not kept and isinstance(output, NpyOutput):
            output.discard()
        rest = f"kept in {self.path}; the same command goes on from there" if kept else "kept"
        what = "terminated" if terminated else "interrupted"
        text = f"{what}: {kept:,} of {layout.n_chains:,} chains are {rest}"
        return StreamInterruptedError(text, terminated=terminated)

    def stats(self, output: BlockOutput, tally: Tally, totals: Totals, computed: _Computed) -> StreamStats:
        """Figures of the run."""
        request, run = self.run.request, self.run
        return StreamStats.of(
            request,
            run.plan,
            str(run.device),
            tally.figures(freezes=request.freezes, mixing=stored_mixing(output)),
            chain_steps=totals.chain_steps,
            seconds=computed.seconds,
            setup_seconds=computed.setup_seconds,
            compile_seconds=computed.compile_seconds,
            new_chains=totals.chains,
        )

    def result(
        self, stored: dict[str, Any], files: list[str], stats: StreamStats | None, damaged: list[str]
    ) -> StreamResult:
        """What the caller gets."""
        run = self.run
        return StreamResult(self.path, tuple(files), run.request, run.plan, stored, stats, tuple(damaged))


def _refuse_change(watch: Watch | None) -> None:
    """Refuse to write what a model that is no longer the record's may have computed."""
    changed = "" if watch is None else watch.changed()
    if changed:
        raise InputError(
            f"{changed} of the model changed while it was sampled: blocks written before are whole, this one is not "
            "written; put the weights back and give the same command to go on"
        )


def count_blocks(output: BlockOutput, blocks: list[int], tally: Tally) -> None:
    """Count the chains of blocks that were written earlier."""
    for block in blocks:
        tally.add(*(output.read(name, block) for name in ("residual", "steps", "outcome")))


def stored_mixing(output: BlockOutput) -> Mixing | None:
    """See `measure_mixing`: of the first chains, read back as they are stored."""
    layout = output.layout
    if layout.n_draws < LEAST_DRAWS:
        return None
    wanted, chunk = watched_chains(layout.n_draws), layout.chunk_chains
    n_blocks = min(layout.n_blocks, -(-wanted // chunk))
    stored = [output.read("draws", block)[: wanted - block * chunk] for block in range(n_blocks)]
    return measure_mixing(torch.from_numpy(layout.encoding.decode(np.concatenate(stored))))


@dataclass(frozen=True)
class _Computed:
    """How long this process has worked."""

    setup_seconds: float
    seconds: float
    compile_seconds: float


def _check_space(path: Path, n_bytes: int, *, certain: bool) -> None:
    free = shutil.disk_usage(path.parent).free
    if n_bytes <= free:
        return
    if certain:
        raise InputError(
            f"output {path} needs {n_bytes:,} bytes, {free:,} are free there: free some or write elsewhere"
        )
    warnings.warn(f"{path} may need {n_bytes:,} bytes before compression, {free:,} are free there", stacklevel=5)


def _on_host(block: Block) -> Block:
    return Block(block.rows, block.chains.to_host(), block.chain_steps)


def _as_arrays(chains: ChainArrays, encoding: Encoding) -> dict[str, np.ndarray]:
    arrays = {name: getattr(chains, name).numpy() for name in PER_CHAIN}
    return {"draws": encoding.encode(chains.draws.numpy()), **arrays}


def _for_all(callback: Callback | None, crew: Crew, before: int) -> Callback | None:
    """Progress of all workers together."""
    if callback is None or crew.size == 1:
        return callback

    def tell(state: SampleProgress) -> None:
        done = before + crew.totals().chains
        n_steps = state.chain_steps // state.n_chains
        callback(SampleProgress(done, state.n_chains, done * n_steps, state.chain_steps, state.seconds))

    return tell


class _Writer:
    """A thread that writes blocks as they come, at most `WAITING_BLOCKS` behind."""

    def __init__(self, write: Callable[[Block], None]) -> None:
        self.write = write
        self.queue: queue.Queue[Block | None] = queue.Queue(WAITING_BLOCKS)
        self.problem: BaseException | None = None
        self.dropped = False
        self.thread = threading.Thread(target=self._run, name="kaleido-writer", daemon=True)

    def __enter__(self) -> _Writer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the block at hand; what waits is dropped, unless `finish` was called before."""
        self.dropped = True
        self._end()

    def put(self, block: Block | None) -> None:
        """Hand over a block; raises what the thread met."""
        while True:
            if self.problem is not None:
                raise self.problem
            with contextlib.suppress(queue.Full):
                return self.queue.put(block, timeout=0.1)

    def finish(self) -> None:
        """Wait until all that was handed over is written; raises what the thread met."""
        self._end()
        if self.problem is not None:
            raise self.problem

    def _end(self) -> None:
        while self.thread.is_alive():
            with contextlib.suppress(queue.Full):
                self.queue.put(None, timeout=0.1)
                self.thread.join()

    def _run(self) -> None:
        try:
            while (block := self.queue.get()) is not None:
                if not self.dropped:
                    self.write(block)
        except BaseException as problem:
            self.problem = problem


@contextlib.contextmanager
def _bar(callback: Callback | None, *, show: bool) -> Iterator[Callback | None]:
    if not show:
        yield callback
        return
    from kaleido_fast.system.bars import sampling_bar

    with sampling_bar(callback) as bar:
        yield bar
