"""Freezing: chains that have arrived leave the working set; the others go on. Any engine runs underneath.

At steps that are multiples of ``check_every``, a chain whose last residual was below ``tol`` at ``patience`` checks in
a row is frozen. Checks look at the chain alone: it freezes at the same step in any batch. They also compare it with an
earlier state of its own, to find cycles: see `kaleido_fast.running.cycles`.

Steps are run in windows. Most engines come back at every check; one that checks chains itself
(`kaleido_fast.engines.base.Engine.checked`) runs from one renewal of the earlier states to the next, and chains halt on
the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kaleido_fast.engines.base import Advanced, Checked, Engine, Halts, ReportSteps
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.running.cycles import (
    Walk,
    are_back,
    chains_at_once,
    follow,
    renewals,
    renewed,
    steps_run_singly,
)
from kaleido_fast.running.phases import BlockEnd, Phase, run_phases
from kaleido_kernels.schedule import Checks, Schedule

NEVER = 2**31 - 1  # checks in a row that no chain passes


def run_block(
    phases: Sequence[Phase],
    request: SampleRequest,
    chain_ids: Tensor,
    z0: Tensor | None,
    draws: Tensor,
    report: ReportSteps,
) -> BlockEnd:
    """Run chains through all phases and fill ``draws`` (n, n_draws, D); those that arrive are frozen, if asked for."""
    if not request.freezes:
        return run_phases(phases, chain_ids, z0, draws, report)
    policy = Policy.of(request, phases)
    windows = policy.windows(phases)
    block = _Block(policy, chain_ids, draws, report)
    running = block.begin(next(windows), z0)
    for window in windows:
        if not len(running):
            break
        block.run(window, running)
    return block.end


@dataclass(frozen=True)
class Window:
    """Steps of a run after which the host looks at the chains.

    Args:
        engine: runs them.
        first, last: steps ``first`` .. ``last - 1``.
        renews: whether chains' states at its end become their earlier ones.
        single_steps: steps run one by one so far; each is compared with the state before the first of them.
    """

    engine: Engine
    first: int
    last: int
    renews: bool
    single_steps: int


@dataclass(frozen=True)
class Policy:
    """When chains are looked at, what for, and what follows.

    Args:
        tol, patience, check_every, max_period, retire_cycles, schedule: of the request.
        freeze_from: step from which on chains are frozen and compared with their earlier states.
        singly_from: step from which on steps are run one by one.
    """

    tol: float
    patience: int
    check_every: int
    max_period: int
    retire_cycles: bool
    schedule: Schedule
    freeze_from: int
    singly_from: int

    @classmethod
    def of(cls, request: SampleRequest, phases: Sequence[Phase]) -> Policy:
        """The policy of a request that freezes chains, over the phases of its run."""
        assert request.tol is not None
        n_steps = request.schedule.n_steps
        freeze_from = phases[-1].first  # what stands still in a low precision is not yet a fixed point of the network
        return cls(
            tol=request.tol,
            patience=request.patience,
            check_every=request.check_every,
            max_period=request.max_period,
            retire_cycles=request.retire_cycles,
            schedule=request.schedule,
            freeze_from=freeze_from,
            singly_from=max(freeze_from, n_steps - steps_run_singly(request.max_period, n_steps)),
        )

    def windows(self, phases: Sequence[Phase]) -> Iterator[Window]:
        """Phases cut at draws, at checks or renewals, and, where steps are run one by one, at each step."""
        schedule, singly_from, looks_for_cycles = self.schedule, self.singly_from, self.max_period > 1
        most_checks = self.max_period if looks_for_cycles else schedule.n_steps
        renewing = renewals(self._next_check(self.freeze_from), self.check_every, most_checks)
        renew_at = next(renewing)
        for phase in phases:
            first = phase.first
            while first < phase.last:
                look_at = self._next_check(first) if phase.engine.checked is None else renew_at
                last = min(look_at, phase.last, schedule.next_draw_end(first), max(first + 1, singly_from))
                renews = last == singly_from or last == renew_at < singly_from
                renews = renews and looks_for_cycles and last < schedule.n_steps
                yield Window(phase.engine, first, last, renews, max(0, last - singly_from))
                if last == renew_at:
                    renew_at = next(renewing)
                first = last

    def _next_check(self, step: int) -> int:
        return (step // self.check_every + 1) * self.check_every

    def is_check(self, step: int) -> bool:
        """Whether chains are checked after ``step`` steps; at the end of a run there is nothing left to save."""
        return step % self.check_every == 0 and step < self.schedule.n_steps

    def checks(self, last: int, checks_passed: Tensor, earlier_state: Tensor | None) -> Checks:
        """What a window that ends at ``last`` looks for; the arguments are the chains' own."""
        patience = self.patience if last > self.freeze_from else NEVER
        if last > self.singly_from:  # each step is compared at its end, with or without a check
            earlier_state = None
        return Checks(self.tol, patience, self.check_every, checks_passed, earlier_state)


@dataclass
class Running:
    """The chains of a block that still run, a row each: what a window starts from."""

    # Which they are: rows of the block, in order (m,) int64, and their ids (m,) int64.
    rows: Tensor
    chain_ids: Tensor

    # Where they are: states (m, D), and the checks in a row that they have passed (m,) int32.
    state: Tensor
    checks_passed: Tensor

    # Where they may come back to (m, D); None before the first renewal, and where no cycle is looked for.
    earlier_state: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def everyone(self) -> Tensor:
        """(m,) int64, the places of all of them."""
        return torch.arange(len(self), device=self.rows.device)

    def part(self, places: Tensor) -> Running:
        """Some of them; copied only where they are not all."""
        if len(places) == len(self):
            return self
        earlier_state = None if self.earlier_state is None else self.earlier_state[places]
        return Running(
            self.rows[places], self.chain_ids[places], self.state[places], self.checks_passed[places], earlier_state
        )

    def take(self, places: Tensor, made: Advanced) -> None:
        """Renew some of them by what an engine made of them."""
        self.state = self._put(self.state, places, made.state)
        if isinstance(made, Checked):
            self.checks_passed = self._put(self.checks_passed, places, made.checks_passed)

    def _put(self, values: Tensor, places: Tensor, new: Tensor) -> Tensor:
        return new if len(places) == len(self) else values.index_copy(0, places, new)

    def forget(self, places: Tensor) -> None:
        """Stop looking for cycles of some of them: no chain comes back to infinity."""
        if self.earlier_state is not None:
            self.earlier_state[places] = torch.inf

    def keep(self, places: Tensor) -> None:
        """Go on with some of them."""
        kept = self.part(places)
        self.rows, self.chain_ids, self.state = kept.rows, kept.chain_ids, kept.state
        self.checks_passed, self.earlier_state = kept.checks_passed, kept.earlier_state


class _Block:
    """A block with freezing: where draws go, and what is known of the chains' end, as windows are run."""

    def __init__(self, policy: Policy, chain_ids: Tensor, draws: Tensor, report: ReportSteps) -> None:
        self.policy, self.chain_ids, self.draws, self.report = policy, chain_ids, draws, report
        residual = torch.zeros(len(chain_ids), dtype=torch.float32, device=chain_ids.device)
        self.end = BlockEnd.of(residual, policy.schedule.n_steps, 0)

    def begin(self, window: Window, z0: Tensor | None) -> Running:
        """Run the first window, from ``z0`` or from start noise, which engines make in the launch of their first steps.

        From here on there is a state, but no earlier one, so no chain can be back at it.
        """
        running, halts = self._start(window, z0)
        staying, _ = self._sort(window, window.first, running, running.everyone(), halts)
        self._finish(window, running, staying)
        return running

    def run(self, window: Window, running: Running) -> None:
        """Run chains up to the window's end; those that arrive on the way leave, as do those on a cycle.

        Where there are checks the host waits for the device once, for four numbers, and for more only where a cycle is
        to be measured.
        """
        staying: list[Tensor] = []
        # A chain halts where it is back at its earlier state, and need not go round for that: one that creeps to rest
        # is back at each check until it has passed enough of them, one on a cycle longer than is looked for comes near
        # by chance. They go on from there, in launches of their own, and may be back again before the window ends: so
        # it takes a stack. Its order is free, as chains do not depend on their company.
        waiting = [(window.first, running.everyone())]
        while waiting:
            first, places = waiting.pop()
            halts = self._go_on(window, first, running, places)
            stay, halted = self._sort(window, first, running, places, halts)
            staying += stay
            waiting += halted
        self._finish(window, running, staying)

    def _start(self, window: Window, z0: Tensor | None) -> tuple[Running, Halts | None]:
        """All chains after the first window, and how they halted; see `_advance`."""
        n, device = len(self.chain_ids), self.chain_ids.device
        passed = torch.zeros(n, dtype=torch.int32, device=device)
        made = self._advance(window, window.first, self.chain_ids, z0, self.policy.checks(window.last, passed, None))
        running = Running(torch.arange(n, device=device), self.chain_ids, made.state, passed)
        return running, self._take(running, running.rows, made)

    def _go_on(self, window: Window, first: int, running: Running, places: Tensor) -> Halts | None:
        """Run some of the chains on from ``first``; says how they halted, see `_advance`."""
        group = running.part(places)
        checks = self.policy.checks(window.last, group.checks_passed, group.earlier_state)
        made = self._advance(window, first, group.chain_ids, group.state, checks)
        return self._take(running, places, made)

    def _advance(self, window: Window, first: int, chain_ids: Tensor, state: Tensor | None, checks: Checks) -> Advanced:
        """Run chains from ``first`` to the window's end or to where they halt; `Checked` if there was a check."""
        engine, last = window.engine, window.last
        if engine.checked is not None and last - first > checks.every:
            return engine.checked(chain_ids, state, first, last, checks, self.report)
        made = engine.advance(chain_ids, state, first, last, None, self.report)
        return check_chains(made, checks, last) if self.policy.is_check(last) else made

    def _take(self, running: Running, places: Tensor, made: Advanced) -> Halts | None:
        """Note what an engine made of some of the chains; returns how they halted, None without a check."""
        running.take(places, made)
        self.end.residual[running.rows[places]] = made.residual
        return made.halts if isinstance(made, Checked) else None

    def _sort(
        self, window: Window, first: int, running: Running, places: Tensor, halts: Halts | None
    ) -> tuple[list[Tensor], list[tuple[int, Tensor]]]:
        """What becomes of chains that were run from ``first`` on.

        Returns:
            Places of those that stay, and (step, places) of those that halted before the window's end and go on.
        """
        last = window.last
        if halts is None:
            self.end.chain_steps += (last - first) * len(places)
            return [places], []
        self.end.chain_steps += last * len(halts.running) + halts.steps_sum - first * len(places)
        staying, halted = [places[halts.running]], []
        if len(halts.arrived):
            first_draw = self.policy.schedule.draws_done(first)  # a window ends at the next draw, if not before
            self._freeze(running, places[halts.arrived], halts.steps[halts.arrived], first_draw)
        if len(halts.returned):
            steps = halts.steps[halts.returned]
            for step in steps.unique().tolist():
                group = self._measure_cycles(window.engine, step, running, places[halts.returned[steps == step]])
                if step < last and len(group):
                    halted.append((step, group))
                else:
                    staying.append(group)
        return staying, halted

    def _freeze(self, running: Running, places: Tensor, steps: Tensor, first_draw: int) -> None:
        """Draws still to come of these chains, from ``first_draw`` on, are their state of now."""
        rows = running.rows[places]
        self.end.steps[rows] = steps
        self.end.period[rows] = torch.isfinite(self.end.residual[rows]).to(torch.int32)
        self.draws[rows, first_draw:] = running.state[places][:, None].to(self.draws.dtype)

    def _measure_cycles(self, engine: Engine, step: int, running: Running, places: Tensor) -> Tensor:
        """Measure the periods of chains that were back at their earlier state after ``step`` steps.

        Returns:
            Places of those that go on: all but the cycles that are walked from here.
        """
        policy, going_on = self.policy, []
        for part in places.split(chains_at_once(policy.max_period, self.draws.shape[2])):
            rows = running.rows[part]
            orbits = follow(engine, running.chain_ids[part], running.state[part], policy.tol, policy.max_period)
            self.end.chain_steps += orbits.chain_steps
            is_cycle = orbits.period > 1  # a chain that is back after a single step comes to rest
            self.end.period[rows[is_cycle]] = orbits.period[is_cycle]
            running.forget(part[is_cycle])
            if policy.retire_cycles:
                self._retire(rows[is_cycle], orbits.walk(is_cycle), step)
                part = part[~is_cycle]
            going_on.append(part)
        return torch.cat(going_on)

    def _retire(self, rows: Tensor, walk: Walk, step: int) -> None:
        """Take what is still to come of chains, which have run ``step`` steps, from their walk round the cycle."""
        schedule = self.policy.schedule
        self.end.steps[rows] = step
        first_draw = schedule.draws_done(step - 1)  # one after this very step is not kept yet
        for draw in range(first_draw, schedule.n_draws):
            self.draws[rows, draw] = walk.after(schedule.draw_end(draw) - step).to(self.draws.dtype)
        self.end.residual[rows] = walk.residual_after(schedule.n_steps - step)

    def _finish(self, window: Window, running: Running, staying: list[Tensor]) -> None:
        """At a window's end: go on with those that stay, keep the draw that is due, look for cycles from outside."""
        running.keep(staying[0] if len(staying) == 1 else torch.cat(staying).sort().values)
        draw = self.policy.schedule.draw_after(window.last)
        if draw is not None:
            self.draws[running.rows, draw] = running.state
        if window.single_steps:
            self._compare(running, window.single_steps)
        elif window.renews:
            running.earlier_state = renewed(running.state, self.end.period[running.rows])

    def _compare(self, running: Running, steps: int) -> None:
        """Give chains that are where they were ``steps`` ago, and not at rest, that period. The host does not wait."""
        back = are_back(running.state, running.earlier_state, self.policy.tol)
        period, moves = self.end.period[running.rows], self.end.residual[running.rows] >= self.policy.tol
        self.end.period[running.rows] = torch.where(back & moves & (period == 0), steps, period)


def check_chains(made: Advanced, checks: Checks, step: int) -> Checked:
    """A check after ``step`` steps, by the host: what kernels do inside of a launch (`kaleido_kernels.steps`)."""
    passed = torch.where(made.residual < checks.tol, checks.checks_passed + 1, 0)
    arrived = (passed >= checks.patience) | torch.isnan(made.residual)  # a NaN stays one: nothing more can come of it
    back = are_back(made.state, checks.saved, checks.tol)
    halt = torch.where(arrived, step, torch.where(back, -step, 0)).to(torch.int32)
    return Checked(made.state, made.residual, passed, Halts.from_signed(halt))
