"""The blocks that an output lacks are computed, written and counted, by this worker and others."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import numpy as np
import torch

from kaleido_fast.engines.general import ModuleEngine
from kaleido_fast.errors import InputError, StreamInterruptedError, TerminatedError, warn_caller
from kaleido_fast.modules.identity import Watch, identify
from kaleido_fast.progress import Callback, Meter, SampleProgress
from kaleido_fast.running.blocks import Block, Run, run_blocks
from kaleido_fast.running.engine import build_phases
from kaleido_fast.running.execution import memory_advice
from kaleido_fast.running.mixing import LEAST_DRAWS, Mixing, measure_mixing, watched_chains
from kaleido_fast.running.phases import Phase
from kaleido_fast.running.result import ChainArrays
from kaleido_fast.storing.encoding import Encoding
from kaleido_fast.storing.layout import CHAIN_DTYPES, BlockOutput
from kaleido_fast.storing.npy_output import NpyOutput
from kaleido_fast.storing.tally import Tally
from kaleido_fast.storing.write_behind import WriteBehind
from kaleido_fast.system.memory import is_lack_of_memory
from kaleido_fast.system.threads import threads
from kaleido_fast.system.workers import Workers


@dataclass(frozen=True)
class Spent:
    """Seconds that this process has worked."""

    setup_seconds: float
    seconds: float
    compile_seconds: float


def fill(
    output: BlockOutput, done: np.ndarray, run: Run, workers: Workers, callback: Callback | None
) -> tuple[Spent, Tally]:
    """Compute and write blocks until none is left for any worker; an interruption says what is kept.

    Every worker counts its own chains and its share of those that were there before; the first one gets all counts.

    Args:
        output: open for writing.
        done: (n_blocks,) bool, the same for all workers: blocks that were whole before.
        run: what is computed.
        workers: the workers.
        callback: gets the progress of all workers together.

    Raises:
        InputError: the model changed, a disk is full, another worker cannot go on.
        SamplingMemoryError: the memory ran out.
        StreamInterruptedError: Ctrl-C or SIGTERM.
    """
    tally, whole = Tally(), Tally()
    try:
        with threads(output.record.get("threads")):
            spent = _Filling(output, run, workers, tally).compute(np.flatnonzero(~done).tolist(), callback)
        tally.add_blocks(output, np.flatnonzero(done)[workers.rank :: workers.size].tolist())
        for counts in workers.gather("tally", tally.plain()):
            whole.include(counts)
    except KeyboardInterrupt as stop:
        raise _interrupted(output, terminated=isinstance(stop, TerminatedError)) from stop
    return spent, whole


@dataclass(frozen=True)
class _Filling:
    """What the steps of computing and writing share; ``tally`` counts the chains that this worker computes."""

    output: BlockOutput
    run: Run
    workers: Workers
    tally: Tally

    def compute(self, missing: list[int], callback: Callback | None) -> Spent:
        """Compute and write those of the missing blocks that this worker takes."""
        began = time.perf_counter()
        layout, run, workers = self.output.layout, self.run, self.workers
        if workers.is_first and workers.size > max(1, len(missing)):
            warn_caller(f"{workers.size} workers for {len(missing)} blocks: some have nothing to do", UserWarning)
        phases = build_phases(run.subject, run.request, run.plan, run.device)
        watch = _watch_model(run, phases)
        before = layout.n_chains - sum(layout.length(block) for block in missing)
        meter = Meter(layout.n_chains, run.request.schedule.n_steps, _for_all(callback, workers, before), before)
        setup = time.perf_counter() - began
        with WriteBehind(self.write) as writer:
            try:
                spans = (layout.rows(block) for block in workers.take(missing))
                for block in run_blocks(run, phases, spans, meter):
                    _refuse_change(watch)
                    writer.put(Block(block.rows, block.chains.to_host(), block.chain_steps))
                writer.finish()
                while workers.is_first and workers.totals().blocks < len(missing):
                    workers.wait()
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
        return Spent(setup, time.perf_counter() - began - setup, compiling)

    def write(self, block: Block) -> None:
        """Write and count a block; called by the writer's thread."""
        layout = self.output.layout
        arrays = _as_arrays(block.chains, layout.encoding)
        self.output.write(block.rows.start // layout.chunk_chains, arrays)
        self.tally.add(arrays["residual"], arrays["steps"], arrays["outcome"])
        self.workers.count(len(block.chains), block.chain_steps)


def _watch_model(run: Run, phases: list[Phase]) -> Watch | None:
    """What notices that the caller changes a module while it is sampled; None for engines that hold copies."""
    engine = phases[0].engine
    if not isinstance(engine, ModuleEngine):
        return None
    watch = Watch(*engine.read_modules)
    if identify(run.subject.module).digest != run.subject.model_hash:
        raise InputError(
            "the model changed while the output was prepared: nothing is written; "
            "put it back and give the same command to go on, or --overwrite starts anew"
        )
    return watch


def _refuse_change(watch: Watch | None) -> None:
    """Refuse to write a block that the model may have computed after it changed."""
    changed = "" if watch is None else watch.changed()
    if changed:
        raise InputError(
            f"{changed} of the model changed while it was sampled: blocks written before are whole, this one is not "
            "written; put the weights back and give the same command to go on"
        )


def _for_all(callback: Callback | None, workers: Workers, before: int) -> Callback | None:
    """Progress of all workers together; ``before`` chains were there when they began."""
    if callback is None or workers.size == 1:
        return callback

    def report(state: SampleProgress) -> None:
        done = before + workers.totals().chains
        n_steps = state.chain_steps // state.n_chains
        callback(SampleProgress(done, state.n_chains, done * n_steps, state.chain_steps, state.seconds))

    return report


def _as_arrays(chains: ChainArrays, encoding: Encoding) -> dict[str, np.ndarray]:
    """Arrays as they are stored, of chains in memory of the host."""
    arrays = {name: getattr(chains, name).numpy() for name in CHAIN_DTYPES}
    return {"draws": encoding.encode(chains.draws.numpy()), **arrays}


def _interrupted(output: BlockOutput, *, terminated: bool) -> StreamInterruptedError:
    """What is kept, in one line."""
    layout = output.layout
    kept = sum(layout.length(int(block)) for block in np.flatnonzero(output.done()))
    if not kept and isinstance(output, NpyOutput):
        output.discard()
    rest = f"kept in {output.path}; the same command goes on from there" if kept else "kept"
    what = "terminated" if terminated else "interrupted"
    text = f"{what}: {kept:,} of {layout.n_chains:,} chains are {rest}"
    return StreamInterruptedError(text, terminated=terminated)


def stored_mixing(output: BlockOutput) -> Mixing | None:
    """See `measure_mixing`: of the first chains, read back as they are stored."""
    layout = output.layout
    if layout.n_draws < LEAST_DRAWS:
        return None
    wanted, chunk = watched_chains(layout.n_draws), layout.chunk_chains
    n_blocks = min(layout.n_blocks, -(-wanted // chunk))
    stored = [output.read("draws", block)[: wanted - block * chunk] for block in range(n_blocks)]
    return measure_mixing(torch.from_numpy(layout.encoding.decode(np.concatenate(stored))))
