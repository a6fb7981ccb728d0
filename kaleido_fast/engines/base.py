"""What every engine offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kaleido_fast.planning.request import SampleRequest
from kaleido_kernels.schedule import Checks

ReportSteps = Callable[[int], None]
"""Called with the number of chain-steps done since the last call; may raise to stop the run."""


@dataclass(frozen=True)
class Advanced:
    """Chains after some steps: ``state`` (n, D) and ``residual`` (n,) fp32 of the last step run."""

    state: Tensor
    residual: Tensor


@dataclass(frozen=True)
class Halts:
    """Which chains of a run with checks went on to its end, and which halted on the way.

    Args:
        running, arrived, returned: (k,) int64 each, in order, together all places 0 .. n - 1: chains that go on, that
            are at rest or NaN, and that were back at their earlier state.
        steps: (n,) int32, number of steps after which a chain halted; 0 for one that goes on.
        steps_sum: the sum of ``steps``.
    """

    running: Tensor
    arrived: Tensor
    returned: Tensor
    steps: Tensor
    steps_sum: int

    @classmethod
    def from_signed(cls, halt: Tensor) -> Halts:
        """Decode what a kernel stores, (n,) int32.

        It is 0 for a chain that goes on, s for one that came to rest after s steps, -s for one that was back at its
        earlier state then.

        The host waits for the device once, for four numbers.
        """
        steps, sign = halt.abs(), halt.sign()
        sizes = torch.stack([*((sign == value).sum() for value in (-1, 0, 1)), steps.sum()])
        n_returned, n_running, n_arrived, steps_sum = sizes.tolist()
        returned, running, arrived = sign.argsort(stable=True).split([n_returned, n_running, n_arrived])
        return cls(running, arrived, returned, steps, steps_sum)


@dataclass(frozen=True)
class Checked(Advanced):
    """Chains after some steps, or after the check at which they halted.

    Args:
        checks_passed: (n,) int32, checks in a row passed.
        halts: which of them halted, and when.
    """

    checks_passed: Tensor
    halts: Halts


CheckedRun = Callable[[Tensor, Tensor | None, int, int, Checks, ReportSteps], Checked]
"""As `Engine.advance`, without draws, but a chain halts at the first check that says so."""


class Engine(Protocol):
    """An engine holds one packed model and one request, and advances any chains of it over any range of steps."""

    def with_request(self, request: SampleRequest) -> Engine:
        """The same packed weights for another request, of the same precision and kernel."""
        ...

    def start(self, chain_ids: Tensor) -> Tensor:
        """Start noise of the chains, (n, D)."""
        ...

    def advance(
        self,
        chain_ids: Tensor,
        state: Tensor | None,
        first_step: int,
        last_step: int,
        draws: Tensor | None,
        report: ReportSteps,
    ) -> Advanced:
        """Run steps ``first_step`` .. ``last_step - 1``.

        Args:
            chain_ids: (n,) int64 absolute chain ids, in any order, on the engine's device.
            state: (n, D) states before ``first_step``; None for the start noise (``first_step`` is 0 then).
            first_step, last_step: half-open range of steps of the request's schedule, ``first_step < last_step``.
            draws: (n, n_draws, D), filled at the draws that fall into the range; None keeps none.
            report: progress.

        Any split of a run into ranges, and any choice and order of chains, gives the same bits.
        """
        ...

    @property
    def checked(self) -> CheckedRun | None:
        """Runs many checks in one call, without the host; None for an engine that has to come back at each."""
        ...
