"""Chains that have arrived leave the working set; the others go on. Any engine runs underneath.

Steps are run in windows of ``check_every``. After a window a chain whose last residual was below ``tol``, at
``patience`` checks in a row, is frozen. Checks fall on fixed absolute steps and look at the chain alone: a chain
freezes at the same step in any batch. The test for cycles is Brent's ("An improved Monte Carlo factorization
algorithm", 1980): one saved state a chain, renewed after 1, 2, 4, ... windows. Ends of windows lie multiples of
``check_every`` apart, which an odd period meets late; so the last steps of a run, up to ``max_period`` and a quarter of
all, are run singly and each is compared with the state before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kaleido_fast.engines.base import Engine, Report
from kaleido_fast.plan import SampleRequest


@dataclass(frozen=True)
class Phase:
    """Steps ``first .. last - 1`` of a run and the engine that runs them."""

    engine: Engine
    first: int
    last: int


@dataclass
class BlockEnd:
    """What is known of the chains of a block at its end.

    Args:
        residual: (n,) fp32, of the last step run.
        steps: (n,) int32, steps run before the chain was frozen or the run ended.
        period: (n,) int32: 1 for a frozen fixed point, p for a cycle that was found, else 0.
        chain_steps: steps run, summed over chains, the search for exact periods included.
    """

    residual: Tensor
    steps: Tensor
    period: Tensor
    chain_steps: int


def run_block(
    phases: Sequence[Phase], request: SampleRequest, chains: Tensor, z0: Tensor | None, draws: Tensor, report: Report
) -> BlockEnd:
    """Run chains through all phases and fill ``draws`` (n, n_draws, D)."""
    n, n_steps, device = len(chains), request.schedule.n_steps, chains.device
    if request.freezes:
        return _SettlingBlock(phases, request, chains, z0, draws, report).run()
    state = z0
    for phase in phases:
        end = phase.engine.advance(chains, state, phase.first, phase.last, draws, report)
        state = end.state
    steps = torch.full((n,), n_steps, dtype=torch.int32, device=device)
    return BlockEnd(end.residual, steps, torch.zeros_like(steps), n * n_steps)


class _SettlingBlock:
    """One block with freezing. ``live`` holds the rows still running; ``state``, ``calm``, ``saved`` are of these."""

    def __init__(
        self,
        phases: Sequence[Phase],
        request: SampleRequest,
        chains: Tensor,
        z0: Tensor | None,
        draws: Tensor,
        report: Report,
    ) -> None:
        n, device = len(chains), chains.device
        self.phases, self.request, self.chains, self.draws, self.report = phases, request, chains, draws, report
        self.schedule = request.schedule
        self.tol = float("nan") if request.tol is None else request.tol
        self.freeze_from = phases[-1].first  # what settles in a low precision is not yet a fixed point of the network
        steps = torch.full((n,), self.schedule.n_steps, dtype=torch.int32, device=device)
        self.end = BlockEnd(torch.zeros(n, dtype=torch.float32, device=device), steps, torch.zeros_like(steps), 0)
        self.live = torch.arange(n, device=device)
        self.calm = torch.zeros(n, dtype=torch.int32, device=device)
        self.state = z0
        self.saved: Tensor | None = None
        self.windows_since_saved, self.next_save = 0, 1
        n_steps = self.schedule.n_steps
        singly = min(request.max_period, n_steps // 4) if request.max_period > 1 else 0
        self.singly_from = max(self.freeze_from, n_steps - singly)

    def run(self) -> BlockEnd:
        for phase, first, last in self._windows():
            if not len(self.live):
                break
            end = phase.engine.advance(self.chains[self.live], self.state, first, last, None, self.report)
            self.end.chain_steps += (last - first) * len(self.live)
            self.state = end.state
            self.end.residual[self.live] = end.residual
            draw = self.schedule.draw_after(last)
            if draw is not None:
                self.draws[self.live, draw] = self.state
            if last == self.singly_from < self.schedule.n_steps:
                self.saved = end.state.clone()
            elif last > self.singly_from:
                self._compare_with_saved(last - self.singly_from, end.residual)
            if last % self.request.check_every == 0 and last < self.schedule.n_steps:
                self._check(phase.engine, last, end.residual)
        return self.end

    def _windows(self) -> Iterator[tuple[Phase, int, int]]:
        """Phases cut at checks, at draws and, where steps are run singly, at each."""
        every = self.request.check_every
        for phase in self.phases:
            first = phase.first
            while first < phase.last:
                last = min(phase.last, (first // every + 1) * every, self.schedule.next_draw_end(first))
                last = min(last, max(first + 1, self.singly_from))
                yield phase, first, last
                first = last

    def _compare_with_saved(self, steps: int, residual: Tensor) -> None:
        """Give chains that are where they were ``steps`` ago, and not at rest, that period. Nothing waits."""
        assert self.state is not None and self.saved is not None
        back = (self.state - self.saved).abs().amax(dim=1) < self.tol
        period = self.end.period[self.live]
        self.end.period[self.live] = torch.where(back & (residual >= self.tol) & (period == 0), steps, period)

    def _check(self, engine: Engine, step: int, residual: Tensor) -> None:
        """Freeze what has arrived after ``step`` steps, and look for cycles among the rest.

        The host waits for the device once, for three numbers, and for more only where a cycle is to be measured.
        """
        assert self.state is not None
        self.calm = torch.where(residual < self.tol, self.calm + 1, 0)
        lost = torch.isnan(residual)  # a NaN stays one: nothing more can come of it
        arrived = (self.calm >= self.request.patience) & (step > self.freeze_from)
        period = torch.where(arrived, 1, self.end.period[self.live])
        self.end.period[self.live] = torch.where(lost, 0, period)
        settled = lost | arrived
        back = (period == 0) & ~settled & self._is_back(step)
        stay, gone, back_places = _parted(torch.where(settled, 1, torch.where(back, 2, 0)))
        if len(back_places):
            turning = self._measure_cycles(engine, step, back_places)
            walk = turning if self.request.retire_cycles else torch.zeros_like(turning)
            self.end.steps[self.live[back_places[walk]]] = step
            stay = torch.cat((stay, back_places[~walk])).sort().values
        self._freeze(gone, step)
        if len(stay) < len(self.live):
            self.live, self.state, self.calm = self.live[stay], self.state[stay], self.calm[stay]
            self.saved = None if self.saved is None else self.saved[stay]

    def _freeze(self, places: Tensor, step: int) -> None:
        """Draws still to come of these chains are their state of now."""
        assert self.state is not None
        rows, first = self.live[places], self.schedule.draws_done(step)
        self.end.steps[rows] = step
        self.draws[rows, first:] = self.state[places][:, None].to(self.draws.dtype)

    def _is_back(self, step: int) -> Tensor:
        """Which chains are where they were when last saved; saves states when it is time to."""
        assert self.state is not None
        back = torch.zeros(len(self.live), dtype=torch.bool, device=self.live.device)
        if self.request.max_period == 1 or not self.freeze_from < step < self.singly_from:
            return back
        self.windows_since_saved += 1
        if self.saved is not None:
            back = (self.state - self.saved).abs().amax(dim=1) < self.tol
        if self.windows_since_saved >= self.next_save or self.saved is None:
            self.saved = self.state.clone()
            self.windows_since_saved = 0
            self.next_save = min(2 * self.next_save, self.request.max_period)
        return back

    def _measure_cycles(self, engine: Engine, step: int, places: Tensor) -> Tensor:
        """Step chains singly until they return: the exact period, up to ``max_period``. True where there is one."""
        assert self.state is not None
        found = []
        for part in places.split(self._chains_at_once()):
            orbit = [self.state[part]]
            period = torch.zeros(len(part), dtype=torch.int32, device=part.device)
            for p in range(1, self.request.max_period + 1):
                # Without jitter a step does not depend on its number.
                orbit.append(engine.advance(self.chains[self.live[part]], orbit[-1], 0, 1, None, lambda _: None).state)
                self.end.chain_steps += len(part)
                returned = ((orbit[-1] - orbit[0]).abs().amax(dim=1) < self.tol) & (period == 0)
                period[returned] = p
                if bool((period > 0).all()):
                    break
            cycles = period > 1
            rows = self.live[part[cycles]]
            self.end.period[rows] = period[cycles]
            if self.request.retire_cycles:
                self._walk(rows, torch.stack(orbit, dim=1)[cycles], period[cycles].to(torch.int64), step)
            found.append(cycles)
        return torch.cat(found)

    def _walk(self, rows: Tensor, orbit: Tensor, period: Tensor, step: int) -> None:
        """Fill the draws still to come from the cycle: the state after s more steps is orbit[s mod period]."""
        each = torch.arange(len(rows), device=rows.device)
        for draw in range(self.schedule.draws_done(step), self.schedule.n_draws):
            place = (self.schedule.draw_end(draw) - step) % period
            self.draws[rows, draw] = orbit[each, place].to(self.draws.dtype)
        last = (self.schedule.n_steps - step) % period
        before = (last - 1) % period
        self.end.residual[rows] = (orbit[each, last] - orbit[each, before]).abs().amax(dim=1).to(torch.float32)

    def _chains_at_once(self) -> int:
        """Orbits are kept in at most about 64 MiB."""
        return max(1, 2**24 // ((self.request.max_period + 1) * self.draws.shape[2]))


def _parted(kind: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places (n,) of kinds 0, 1 and 2, in order; the host waits for the device once."""
    counts = (kind[:, None] == torch.arange(3, device=kind.device)).sum(dim=0).tolist()
    stay, gone, back = kind.argsort(stable=True).split(counts)
    return stay, gone, back
