"""A block of chains on its way through the phases of a run, an engine each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kaleido_fast.engines.base import Engine, ReportSteps


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

    @classmethod
    def of(cls, residual: Tensor, n_steps: int, chain_steps: int) -> BlockEnd:
        """The end of chains that run all ``n_steps`` steps and have no known period."""
        steps = torch.full((len(residual),), n_steps, dtype=torch.int32, device=residual.device)
        return cls(residual, steps, torch.zeros_like(steps), chain_steps)


def run_phases(
    phases: Sequence[Phase], chain_ids: Tensor, z0: Tensor | None, draws: Tensor, report: ReportSteps
) -> BlockEnd:
    """Run chains through every step of all phases and fill ``draws`` (n, n_draws, D)."""
    state, n_steps = z0, phases[-1].last
    for phase in phases:
        end = phase.engine.advance(chain_ids, state, phase.first, phase.last, draws, report)
        state = end.state
    return BlockEnd.of(end.residual, n_steps, len(chain_ids) * n_steps)
