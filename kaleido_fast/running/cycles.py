"""Cycles: finds chains that go round, measures their periods, and gives their later draws without running them.

The search is Brent's ("An improved Monte Carlo factorization algorithm", 1980): one earlier state a chain, renewed
after 1, 2, 4, ... checks; a chain that is back at it may go round. Checks lie multiples of ``check_every`` apart, which
an odd period meets late. So the last steps of a run, at most ``max_period`` and at most a quarter of all, are run one
by one, and each state is compared with the one before these steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kaleido_fast.engines.base import Engine
from kaleido_fast.planning.blocks import ORBIT_VALUES


def renewals(first: int, check_every: int, most_checks: int) -> Iterator[int]:
    """Steps after which earlier states are renewed: ``first``, then 2, 4, 8, ... checks on, at most ``most_checks``."""
    step, checks = first, 1
    while True:
        yield step
        checks = min(2 * checks, most_checks)
        step += checks * check_every


def steps_run_singly(max_period: int, n_steps: int) -> int:
    """How many steps at the end of a run are run one by one; none where no cycle is looked for."""
    return min(max_period, n_steps // 4) if max_period > 1 else 0


def renewed(state: Tensor, period: Tensor) -> Tensor:
    """New earlier states: ``state`` (n, D), but infinite, which nothing comes back to, where a ``period`` is known."""
    return state.masked_fill((period != 0)[:, None], torch.inf)


def are_back(state: Tensor, earlier_state: Tensor | None, tol: float) -> Tensor:
    """(n,) bool: no value is ``tol`` or more away from the chain's earlier state; false for all where there is none."""
    if earlier_state is None:
        return torch.zeros(len(state), dtype=torch.bool, device=state.device)
    return (state - earlier_state).abs().amax(dim=1) < tol


@dataclass(frozen=True)
class Orbits:
    """Chains that were followed step by step.

    Args:
        states: k + 1 of (n, D): after 0 .. k steps.
        period: (n,) int32, steps after which a chain was first back at ``states[0]``; 0 for one that was not.
    """

    states: list[Tensor]
    period: Tensor

    @property
    def chain_steps(self) -> int:
        """Steps run, summed over chains."""
        return (len(self.states) - 1) * len(self.period)

    def walk(self, chosen: Tensor) -> Walk:
        """The chains of a mask (n,), each with a period, on their way from ``states[0]``."""
        return Walk(torch.stack(self.states, dim=1)[chosen], self.period[chosen].to(torch.int64))


def follow(engine: Engine, chain_ids: Tensor, state: Tensor, tol: float, max_period: int) -> Orbits:
    """Run chains step by step from ``state`` (n, D) until all have been back at it, at most ``max_period`` steps."""
    states = [state]
    period = torch.zeros(len(state), dtype=torch.int32, device=state.device)
    for p in range(1, max_period + 1):
        # Step 0 stands for any: chains are frozen only without jitter, when a step does not depend on its number.
        states.append(engine.advance(chain_ids, states[-1], 0, 1, None, lambda _: None).state)
        period[are_back(states[-1], state, tol) & (period == 0)] = p
        if bool((period > 0).all()):
            break
    return Orbits(states, period)


def chains_at_once(max_period: int, dim: int) -> int:
    """How many chains of ``dim`` values to follow at once: their orbits stay in memory."""
    return max(1, ORBIT_VALUES // ((max_period + 1) * dim))


@dataclass(frozen=True)
class Walk:
    """Chains on their cycles: ``orbit`` (n, k + 1, D) has a whole round of each, ``period`` (n,) int64 its length."""

    orbit: Tensor
    period: Tensor

    def after(self, steps: int) -> Tensor:
        """(n, D): the states after ``steps`` steps more."""
        chains = torch.arange(len(self.period), device=self.period.device)
        return self.orbit[chains, steps % self.period]

    def residual_after(self, steps: int) -> Tensor:
        """(n,) fp32: the residual of the last of ``steps`` steps more."""
        return (self.after(steps) - self.after(steps - 1)).abs().amax(dim=1).to(torch.float32)
