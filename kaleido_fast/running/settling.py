"""Chains that have arrived leave the working set; the others go on. Any engine runs underneath.

At steps that are multiples of ``check_every``, a chain whose last residual was below ``tol`` at ``patience`` checks in
a row is frozen. Checks look at the chain alone: it freezes at the same step in any batch. The test for cycles is
Brent's ("An improved Monte Carlo factorization algorithm", 1980): one saved state a chain, renewed after 1, 2, 4, ...
checks. Checks lie multiples of ``check_every`` apart, which an odd period meets late; so the last steps of a run, up to
``max_period`` and a quarter of all, are run singly and each is compared with the state before them.

Steps are run in windows. Most engines come back at every check; one that checks chains itself
(`kaleido_fast.engines.base.Engine.checked`) runs from one renewal to the next, and chains halt on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kaleido_fast.engines.base import Advanced, Checked, Checks, Engine, Report
from kaleido_fast.planning.request import SampleRequest

NEVER = 2**31 - 1  # checks in a row that no chain passes


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
    """One block with freezing. ``live``: rows still running; ``state``, ``checks_passed``, ``saved`` are of these."""

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
        self.checks_passed = torch.zeros(n, dtype=torch.int32, device=device)
        self.state = z0
        self.saved: Tensor | None = None
        self.checks_between, self.renew_at = 1, self._next_check(self.freeze_from)
        n_steps = self.schedule.n_steps
        singly = min(request.max_period, n_steps // 4) if request.max_period > 1 else 0
        self.singly_from = max(self.freeze_from, n_steps - singly)

    def run(self) -> BlockEnd:
        for engine, first, last in self._windows():
            if not len(self.live):
                break
            self._run_window(engine, first, last)
            draw = self.schedule.draw_after(last)
            if draw is not None and self.state is not None:
                self.draws[self.live, draw] = self.state
            if last > self.singly_from:
                self._compare_with_saved(last - self.singly_from)
            elif last in (self.renew_at, self.singly_from) and last < self.schedule.n_steps:
                self._renew_saved(last)
        return self.end

    def _windows(self) -> Iterator[tuple[Engine, int, int]]:
        """Phases cut at draws, at checks or renewals, and, where steps are run singly, at each."""
        for phase in self.phases:
            first = phase.first
            while first < phase.last:
                last = self._next_check(first) if phase.engine.checked is None else max(first + 1, self.renew_at)
                last = min(last, phase.last, self.schedule.next_draw_end(first), max(first + 1, self.singly_from))
                yield phase.engine, first, last
                first = last

    def _next_check(self, step: int) -> int:
        return (step // self.request.check_every + 1) * self.request.check_every

    def _run_window(self, engine: Engine, first: int, last: int) -> None:
        """Run the live chains up to ``last``; those that settle on the way leave, as do those that walk their cycle.

        Where there are checks the host waits for the device once, for four numbers, and for more only where a cycle is
        to be measured.
        """
        staying = []
        waiting = [(first, torch.arange(len(self.live), device=self.live.device))]
        while waiting:
            begin, places = waiting.pop()
            halt = self._run(engine, begin, last, places)
            if halt is None:
                staying.append(places)
                self.end.chain_steps += (last - begin) * len(places)
                continue
            on, settled, back, steps_to_halts = _parted(halt)
            staying.append(places[on])
            self.end.chain_steps += last * len(on) + steps_to_halts - begin * len(places)
            self._freeze(places[settled], halt[settled], self.schedule.draws_done(begin))
            for step in (-halt[back]).unique().tolist() if len(back) else ():
                group = places[back[halt[back] == -step]]
                group = group[~self._measure_cycles(engine, step, group)]
                if step < last and len(group):
                    waiting.append((step, group))
                else:
                    staying.append(group)
        self._keep(staying[0] if len(staying) == 1 else torch.cat(staying).sort().values)

    def _run(self, engine: Engine, first: int, last: int, places: Tensor) -> Tensor | None:
        """Run some of the live chains up to ``last`` or to where they halt; ``Checked.halt``, None without a check."""
        every, rows = self.request.check_every, self.live[places]
        state, checks = self._part(self.state, places), self._checks(last, places)
        if engine.checked is not None and last - first > every:
            made: Advanced = engine.checked(self.chains[rows], state, first, last, checks, self.report)
        else:
            made = engine.advance(self.chains[rows], state, first, last, None, self.report)
            if last % every == 0 and last < self.schedule.n_steps:
                made = check_chains(made, checks, last)
        self.end.residual[rows] = made.residual
        self.state = self._put(self.state, places, made.state)
        if not isinstance(made, Checked):
            return None
        self.checks_passed = self._put(self.checks_passed, places, made.checks_passed)
        return made.halt

    def _put(self, values: Tensor | None, places: Tensor, new: Tensor) -> Tensor:
        """``values`` of the live chains with those of ``places`` renewed; copied only where they are not all."""
        return new if values is None or len(places) == len(self.live) else values.index_copy(0, places, new)

    def _part(self, values: Tensor | None, places: Tensor) -> Tensor | None:
        """What of the live chains is theirs; copied only where they are not all."""
        return values if values is None or len(places) == len(self.live) else values[places]

    def _checks(self, last: int, places: Tensor) -> Checks:
        request = self.request
        patience = request.patience if last > self.freeze_from else NEVER
        saved = self._part(self.saved, places) if last <= self.singly_from else None
        passed = self._part(self.checks_passed, places)
        assert passed is not None
        return Checks(self.tol, patience, request.check_every, passed, saved)

    def _compare_with_saved(self, steps: int) -> None:
        """Give chains that are where they were ``steps`` ago, and not at rest, that period. Nothing waits."""
        assert self.state is not None and self.saved is not None
        back = (self.state - self.saved).abs().amax(dim=1) < self.tol
        period, moves = self.end.period[self.live], self.end.residual[self.live] >= self.tol
        self.end.period[self.live] = torch.where(back & moves & (period == 0), steps, period)

    def _renew_saved(self, step: int) -> None:
        """Save the states that chains may come back to; what is known to go round is not looked for again."""
        assert self.state is not None
        longest = self.request.max_period if self.request.max_period > 1 else self.schedule.n_steps
        self.checks_between = min(2 * self.checks_between, longest)
        self.renew_at = step + self.checks_between * self.request.check_every
        if self.request.max_period == 1:
            return
        if step == self.singly_from:
            self.saved = self.state.clone()
        else:
            known = self.end.period[self.live] != 0
            self.saved = self.state.masked_fill(known[:, None], torch.inf)

    def _freeze(self, places: Tensor, steps: Tensor, first_draw: int) -> None:
        """Draws still to come of these chains, from ``first_draw`` on, are their state of now."""
        assert self.state is not None
        rows = self.live[places]
        self.end.steps[rows] = steps
        self.end.period[rows] = torch.isfinite(self.end.residual[rows]).to(torch.int32)
        self.draws[rows, first_draw:] = self.state[places][:, None].to(self.draws.dtype)

    def _keep(self, places: Tensor) -> None:
        """Go on with these of the live chains."""
        if len(places) == len(self.live):
            return
        assert self.state is not None
        self.live, self.state, self.checks_passed = self.live[places], self.state[places], self.checks_passed[places]
        self.saved = None if self.saved is None else self.saved[places]

    def _measure_cycles(self, engine: Engine, step: int, places: Tensor) -> Tensor:
        """Step chains singly until they return: the exact period, up to ``max_period``. True for those that walk it."""
        assert self.state is not None and self.saved is not None
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
            self.saved[part[cycles]] = torch.inf
            if self.request.retire_cycles:
                self._walk(rows, torch.stack(orbit, dim=1)[cycles], period[cycles].to(torch.int64), step)
            found.append(cycles & self.request.retire_cycles)
        return torch.cat(found)

    def _walk(self, rows: Tensor, orbit: Tensor, period: Tensor, step: int) -> None:
        """Fill the draws still to come from the cycle: the state after s more steps is orbit[s mod period]."""
        self.end.steps[rows] = step
        each = torch.arange(len(rows), device=rows.device)
        for draw in range(self.schedule.draws_done(step - 1), self.schedule.n_draws):
            place = (self.schedule.draw_end(draw) - step) % period
            self.draws[rows, draw] = orbit[each, place].to(self.draws.dtype)
        last = (self.schedule.n_steps - step) % period
        before = (last - 1) % period
        self.end.residual[rows] = (orbit[each, last] - orbit[each, before]).abs().amax(dim=1).to(torch.float32)

    def _chains_at_once(self) -> int:
        """Orbits are kept in at most about 64 MiB."""
        return max(1, 2**24 // ((self.request.max_period + 1) * self.draws.shape[2]))


def check_chains(end: Advanced, checks: Checks, step: int) -> Checked:
    """A check after ``step`` steps: what `kaleido_fast.engines.base.Checked` says of each chain."""
    passed = torch.where(end.residual < checks.tol, checks.checks_passed + 1, 0)
    settled = (passed >= checks.patience) | torch.isnan(end.residual)  # a NaN stays one: nothing more can come of it
    back = torch.zeros_like(settled)
    if checks.saved is not None:
        back = (end.state - checks.saved).abs().amax(dim=1) < checks.tol
    halt = torch.where(settled, step, torch.where(back, -step, 0)).to(torch.int32)
    return Checked(end.state, end.residual, passed, halt)


def _parted(halt: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Places of chains that go on, have settled, are back, each in order, and the sum of steps at which chains halted.

    The host waits for the device once.
    """
    kind = halt.sign() % 3
    counts = [*((kind == value).sum() for value in range(3)), halt.abs().sum()]
    *sizes, steps = torch.stack(counts).tolist()
    on, settled, back = kind.argsort(stable=True).split(sizes)
    return on, settled, back, steps
