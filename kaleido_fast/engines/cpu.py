"""The CPU engine: tiles of chains that stay in cache through all layers and many steps, in loops compiled by numba."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from kaleido_fast.engines.base import Advanced, ReportSteps
from kaleido_fast.engines.loops.arrays import NONE, Tile
from kaleido_fast.engines.loops.schedule import pack_steps, start_kind
from kaleido_fast.engines.team import Call, Pace, Team
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.planning.cpu_tiles import (
    few_chains,
    steps_per_call,
    team_members,
    tile_chains,
    unit_chains,
    working_threads,
)
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.system.cores import useful_threads
from kaleido_fast.system.crew import helped


class CpuEngine:
    """Loops on all cores that ``torch.get_num_threads()`` allows; needs numba.

    Args:
        model: the network; its weights are copied into the order in which the loops read them.
        request: what to compute, in fp32 or bf16; `kaleido_fast.engines.loops.choice` says how.

    Raises:
        InputError: another precision, or numba compiles nothing in this process (NUMBA_DISABLE_JIT).
    """

    def __init__(self, model: KaleidoMLP, request: SampleRequest) -> None:
        # numba takes half a second to import: only a program that samples pays for it.
        from kaleido_fast.engines.loops.choice import loops_for

        self.loops = loops_for(request.precision)
        self.request, self.spec = request, model.spec
        self.layers, self.steps = self.loops.pack(model), pack_steps(request)
        self.paces: dict[int, Pace] = {}  # of teams, by the number of chains
        # Compiles, or loads, the loops: setting up, not sampling.
        self.start(torch.zeros(1, dtype=torch.int64, device="cpu"))

    checked = None  # it comes back at every check

    def with_request(self, request: SampleRequest) -> CpuEngine:
        """See `kaleido_fast.engines.base.Engine.with_request`."""
        other = copy.copy(self)
        other.request, other.steps = request, pack_steps(request)
        return other

    def start(self, chain_ids: Tensor) -> Tensor:
        """Start noise of the chains, (n, D)."""
        return self.advance(chain_ids, None, 0, 0, None, lambda _: None).state

    def advance(
        self,
        chain_ids: Tensor,
        state: Tensor | None,
        first_step: int,
        last_step: int,
        draws: Tensor | None,
        report: ReportSteps,
    ) -> Advanced:
        """See `kaleido_fast.engines.base.Engine.advance`; ``report`` is called from the calling thread only."""
        n, dim = len(chain_ids), self.spec.dim
        final = np.empty((n, dim), np.float32) if state is None else _copied(state, (n, dim))
        residual = np.zeros(n, np.float32)
        kept, target = _draw_buffer(draws, self.request.n_draws, dim)
        run = _Run(
            self, chain_ids.cpu().contiguous().numpy(), state is None, first_step, last_step, target, final, residual
        )
        run.go(report)
        if draws is not None and kept is not None and kept is not draws:
            draws.copy_(kept)
        return Advanced(torch.from_numpy(final), torch.from_numpy(residual))


class _Run:
    """One call of `CpuEngine.advance`: units of chains that threads take one after the other."""

    def __init__(
        self,
        engine: CpuEngine,
        chain_ids: np.ndarray,
        from_start: bool,
        first_step: int,
        last_step: int,
        draws: np.ndarray,
        final: np.ndarray,
        residual: np.ndarray,
    ) -> None:
        spec = engine.spec
        self.engine, self.chain_ids, self.draws, self.final, self.residual = engine, chain_ids, draws, final, residual
        self.first_step, self.last_step = first_step, last_step
        self.start = start_kind(engine.request) if from_start else NONE
        steps = max(1, last_step - first_step)
        threads = working_threads(spec.widths, len(chain_ids) * steps // engine.loops.speed, useful_threads())
        self.tile = tile_chains(spec.widths, engine.loops.lanes, len(chain_ids), threads, engine.loops.extra)
        self.few = few_chains(len(chain_ids), threads, engine.loops.few)
        self.n_threads = min(threads, -(-len(chain_ids) // (self.few or self.tile)))
        self.members = 1
        if engine.loops.shares:
            self.members = team_members(spec.widths, engine.loops.lanes, engine.loops.few, len(chain_ids), threads)
        if self.members > 1:
            self.n_threads, self.tile = 1, -(-len(chain_ids) // engine.loops.lanes) * engine.loops.lanes
        self.step_flops = -(-spec.flops_per_step // engine.loops.speed)  # as many in fp32 take as long
        self.flops = self.step_flops * steps
        self.taken = 0
        self.taking = threading.Lock()
        self.done: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.stopped = False

    def go(self, report: ReportSteps) -> None:
        """Run all units; the calling thread works too, and alone reports."""
        if self.members > 1:
            self._go_as_team(report)
            return
        if self.n_threads == 1:
            for chain_steps in self._work():
                report(chain_steps)
            return
        with helped(self._work_quietly, self.n_threads - 1, self._stop) as finish:
            for chain_steps in self._work():
                report(chain_steps)
                self._report_others(report)
            finish()
        self._report_others(report)

    def _stop(self) -> None:
        self.stopped = True

    def _go_as_team(self, report: ReportSteps) -> None:
        """Run all chains as one unit whose layers threads share."""
        engine, n = self.engine, len(self.chain_ids)
        team = Team(engine.loops.make_tile(engine.spec, self.tile), self.members, engine.paces.setdefault(n, Pace()))
        team.prepare(self._call(slice(0, 0), self.draws[:0], NONE, 0, 0))
        with helped(team.follow, self.members - 1, team.stop):
            try:
                team.gather()
                for chain_steps in self._run_unit(slice(0, n), team.lead, team.cut):
                    report(chain_steps)
            finally:
                team.stop()

    def _report_others(self, report: ReportSteps) -> None:
        while not self.done.empty():
            report(self.done.get())

    def _work_quietly(self) -> None:
        for chain_steps in self._work():
            self.done.put(chain_steps)

    def _work(self) -> Iterator[int]:
        """Take units until there are none; yields the chain-steps of every call."""
        tile = self.engine.loops.make_tile(self.engine.spec, self.tile)
        while not self.stopped:
            rows = self._take()
            if rows is None:
                return
            yield from self._run_unit(rows, lambda call, _: call(tile))

    def _take(self) -> slice | None:
        """The next unit; None when all are taken."""
        with self.taking:
            left = len(self.chain_ids) - self.taken
            if not left:
                return None
            first = self.taken
            unit = self.few or unit_chains(left, self.tile, self.n_threads, self.flops)
            self.taken += min(left, unit)
            return slice(first, self.taken)

    def _run_unit(
        self, rows: slice, run: Callable[[Call, int], None], cut: Callable[[int], int] = lambda steps: steps
    ) -> Iterator[int]:
        """Run a unit in calls of the loops, of as many steps as ``cut`` says; yields the chain-steps of each."""
        draws = self.draws[rows] if len(self.draws) else self.draws
        final, start, step = self.final[rows], self.start, self.first_step
        call_steps = steps_per_call(self.step_flops, len(final), self.members)
        while not self.stopped:
            last = min(step + cut(call_steps), self.last_step)
            run(self._call(rows, draws, start, step, last), last - step)
            yield (last - step) * len(final)
            if last >= self.last_step:
                return
            start, step = NONE, last

    def _call(self, rows: slice, draws: np.ndarray, start: int, step: int, last: int) -> Call:
        engine, chain_ids, final, residual = self.engine, self.chain_ids[rows], self.final[rows], self.residual[rows]

        def call(tile: Tile) -> None:
            engine.loops.advance(
                engine.layers, engine.steps, tile, chain_ids, final, start, step, last, draws, final, residual
            )

        return call


def _copied(state: Tensor, shape: tuple[int, int]) -> np.ndarray:
    values = np.empty(shape, np.float32)
    values[:] = state.detach().cpu().numpy()
    return values


def _draw_buffer(draws: Tensor | None, n_draws: int, dim: int) -> tuple[Tensor | None, np.ndarray]:
    """(tensor that takes the draws, the same memory as an array): ``draws`` itself where the loops can write to it."""
    if draws is None:
        return None, np.empty((0, n_draws, dim), np.float32)
    fits = draws.dtype == torch.float32 and draws.is_contiguous() and draws.device.type == "cpu"
    kept = draws if fits else draws.to("cpu", torch.float32).contiguous()
    return kept, kept.detach().numpy()
