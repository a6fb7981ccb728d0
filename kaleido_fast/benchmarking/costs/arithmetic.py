"""The arithmetic: bytes, files and operations of a store, expected times, work lost to preemption, random runs."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from kaleido_fast.planning.blocks import WAITING_BLOCKS
from kaleido_fast.storing.layout import ARRAYS, Layout

FILES_PER_BLOCK = len(ARRAYS) + 1  # a chunk of each array and the block's mark
METADATA_FILES = len(ARRAYS) + 2  # zarr.json of the group, of each array and of the marks
CALLS_PER_FILE = 5  # of a file system: create, flush, rename, open its folder, flush that
READS_PER_COUNT = 1 + 3 * 2  # of a block: its mark; checksum and chunk of residual, steps and outcome
NAMES_PER_LISTING = 1000  # keys that one request of an object store lists


@dataclass(frozen=True)
class LargeRun:
    """A run and the machines it is given.

    Args:
        layout: shapes of the store.
        n_steps: steps of a chain.
        rate: chain-steps a second of one worker.
        workers: devices at work at once.
        group: workers that restart together: all of a torchrun, 1 in an array job.
        bandwidth: bytes a second that one worker can write.
        operation_seconds: to make one small file durable on the storage.
        stored_share: bytes on disk per byte of the arrays.
        preemptions: per worker and second.
        restart_seconds: from a preemption until the group computes again.
    """

    layout: Layout
    n_steps: int
    rate: float
    workers: int = 1
    group: int = 1
    bandwidth: float = 5e8
    operation_seconds: float = 0.02
    stored_share: float = 1.0
    preemptions: float = 0.0
    restart_seconds: float = 120.0

    @property
    def chain_steps(self) -> int:
        """Work of the whole run."""
        return self.layout.n_chains * self.n_steps

    @property
    def block_seconds(self) -> float:
        """Time to compute one block."""
        return self.layout.chunk_chains * self.n_steps / self.rate

    @property
    def write_seconds(self) -> float:
        """Time to write one block, which is beside computing the next."""
        stored = self.stored_share * self.layout.n_bytes / self.layout.n_blocks
        return FILES_PER_BLOCK * self.operation_seconds + stored / self.bandwidth

    @property
    def paced_seconds(self) -> float:
        """Time from one block of a worker to its next: the longer of computing and writing."""
        return max(self.block_seconds, self.write_seconds)

    @property
    def lag_seconds(self) -> float:
        """Time from a block's being computed to its being durable: where writing is slower, others wait before it."""
        waiting = WAITING_BLOCKS if self.write_seconds > self.block_seconds else 0
        return (waiting + 1) * self.write_seconds

    @property
    def failures(self) -> float:
        """Preemptions a second that stop a group: of any of its workers."""
        return self.preemptions * self.group


def storage(run: LargeRun) -> dict[str, int]:
    """Bytes, files and operations of a store, exact but for ``stored_bytes``.

    ``gets_to_resume`` are of a run whose blocks were there already, all but the last: its workers share them.
    """
    layout = run.layout
    files = layout.n_blocks * FILES_PER_BLOCK + METADATA_FILES
    return {
        "blocks": layout.n_blocks,
        "bytes": layout.n_bytes,
        "stored_bytes": round(layout.n_bytes * run.stored_share),
        "bytes_per_draws_chunk": _chunk_bytes(layout),
        "files": files,
        "file_system_calls": layout.n_blocks * FILES_PER_BLOCK * CALLS_PER_FILE,
        "puts": files + 1,  # the group's zarr.json is written twice
        "lists_per_start": -(-layout.n_blocks // NAMES_PER_LISTING),
        "gets_to_resume": layout.n_blocks * READS_PER_COUNT,
    }


def _chunk_bytes(layout: Layout) -> int:
    return layout.length(0) * layout.n_draws * layout.dim * np.dtype(layout.encoding.dtype).itemsize


def expected_seconds(n_blocks: float, block: float, lag: float, restart: float, failures: float) -> float:
    """Expected time until a worker's blocks are durable where it is stopped at random, its first start included.

    A block that is computed counts ``lag`` later, when it is written; a stop loses what does not count yet. Stops are
    a Poisson process, so that from one durable block to the next it takes, with L for ``failures``,
    exp(L (restart + lag)) (exp(L block) - 1) / L on average: the formula of checkpointing, a block for a checkpoint.

    Args:
        n_blocks: one after the other.
        block, lag, restart: seconds.
        failures: stops a second.
    """
    idle = restart + lag
    if failures * (block + idle) < 1e-12:
        return n_blocks * block + idle
    try:
        each = math.exp(failures * idle) * math.expm1(failures * block) / failures
        return n_blocks * each + math.expm1(failures * idle) / failures
    except OverflowError:
        return math.inf


def lost_per_stop(block: float, lag: float, failures: float) -> float:
    """Expected seconds of computing that a worker loses when it is stopped at a random moment while it computes."""
    if failures * (block + lag) < 1e-6:  # the difference below would be of rounding alone
        return block / 2 + lag
    try:
        return 1 / failures - block * math.exp(-failures * lag) / math.expm1(failures * block)
    except OverflowError:  # no block is ever whole: all work is lost
        return 1 / failures


def times(run: LargeRun) -> dict[str, float]:
    """Expected times, and what preemption adds; infinite where stops come so fast that no block gets done.

    Of several groups it is one by itself: the slowest of many takes longer, see `simulate`.
    """
    rounds, lag = -(-run.layout.n_blocks // run.workers), run.lag_seconds
    whole = expected_seconds(rounds, run.paced_seconds, lag, run.restart_seconds, 0)
    wall = expected_seconds(rounds, run.paced_seconds, lag, run.restart_seconds, run.failures)
    return {
        "device_hours": run.chain_steps / run.rate / 3600,
        "block_seconds": run.block_seconds,
        "write_seconds": run.write_seconds,
        "wall_hours": whole / 3600,
        "wall_hours_preempted": wall / 3600,
        "held_device_hours": run.workers * wall / 3600,
        "count_hours": storage(run)["gets_to_resume"] * run.operation_seconds / run.workers / 3600,
        "preemptions": run.preemptions * run.workers * wall if run.preemptions else 0.0,
        "lost_seconds_per_stop": lost_per_stop(run.paced_seconds, lag, run.failures),
        "added_share": wall / whole - 1,
    }


def simulate(run: LargeRun, seed: int) -> tuple[float, int]:
    """One random run: seconds until its last block is durable, and how often a group was stopped.

    Blocks are dealt out to the groups beforehand, as to the jobs of an array; in a group a free worker takes the next.
    """
    dice, slowest, stops = random.Random(seed), 0.0, 0
    n_groups = run.workers // run.group
    for number in range(n_groups):
        left = (run.layout.n_blocks + n_groups - 1 - number) // n_groups
        seconds = 0.0
        while left:
            lived = dice.expovariate(run.failures) if run.failures else math.inf
            ready = run.restart_seconds + run.lag_seconds
            needed = ready + -(-left // run.group) * run.paced_seconds
            if lived >= needed:
                seconds, left = seconds + needed, 0
            else:
                rounds = int(max(0.0, lived - ready) / run.paced_seconds)
                seconds, left, stops = seconds + lived, left - rounds * run.group, stops + 1
        slowest = max(slowest, seconds)
    return slowest, stops
