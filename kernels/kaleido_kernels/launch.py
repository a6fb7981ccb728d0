"""What one launch computes: the request, the schedule of its steps, and the tensors it fills. Shared by all kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kaleido_kernels.arguments import QUIET, LaunchKind
from kaleido_kernels.schedule import Checks, Schedule
from kaleido_kernels.shapes import INITS, NetShape
from kaleido_kernels.tile import Tile


@dataclass(frozen=True)
class LaunchRequest:
    """One launch: some chains, over steps ``first_step .. first_step + run_steps - 1`` of a schedule.

    Args:
        n_chains: rows, 0 or more.
        schedule: which steps are jittered and which end in a draw.
        seed: 0 .. 2**64 - 1, the noise key.
        first_chain: absolute id of row 0; row i is chain ``first_chain + i``.
        chain_ids: (n_chains,) int64 contiguous, absolute ids in any order instead of that; None for ``first_chain``.
        init: start noise, "uniform" or "normal"; not used with ``start``, nor by a flow.
        first_step: step of the schedule to begin with; above 0 ``start`` must be given.
        run_steps: steps to run, at least 1; None for all that are left.
        start: (n_chains, D) fp32 contiguous states before ``first_step``; None for the start noise.
        checks: when chains halt inside of the launch, which then keeps no draws; None runs all steps. Not with jitter.

    Raises:
        ValueError: a value outside of this.
    """

    n_chains: int
    schedule: Schedule
    seed: int = 0
    first_chain: int = 0
    chain_ids: Tensor | None = None
    init: str = "uniform"
    first_step: int = 0
    run_steps: int | None = None
    start: Tensor | None = None
    checks: Checks | None = None

    def __post_init__(self) -> None:
        if self.n_chains < 0:
            raise ValueError(f"n_chains is {self.n_chains}: it must be at least 0")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}: it must lie in 0 .. 2**64 - 1")
        if not 0 <= self.first_chain <= 2**63 - 1 - self.n_chains:
            raise ValueError(f"first_chain is {self.first_chain}: chain ids must lie in 0 .. 2**63 - 1")
        if self.init not in INITS:
            raise ValueError(f"init is {self.init!r}: choose one of {', '.join(INITS)}")
        n_steps = self.schedule.n_steps
        if not 0 <= self.first_step < n_steps:
            raise ValueError(f"first_step is {self.first_step}: the schedule has steps 0 .. {n_steps - 1}")
        if self.run_steps is None:
            object.__setattr__(self, "run_steps", n_steps - self.first_step)
        if not 1 <= self.n_run <= n_steps - self.first_step:
            raise ValueError(
                f"run_steps is {self.run_steps}: from step {self.first_step} 1 .. {n_steps - self.first_step} are left"
            )
        if self.first_step > 0 and self.start is None:
            raise ValueError(f"first_step is {self.first_step} but start is None: pass the states before that step")
        if self.checks is not None and self.schedule.restarts:
            raise ValueError("checks with a flow: its draws have a number of steps and never come to rest")
        if self.checks is not None and self.schedule.jitter > 0:
            raise ValueError(f"checks with jitter {self.schedule.jitter}: a jittered chain never comes to rest")

    @property
    def n_run(self) -> int:
        """Steps this launch runs."""
        return self.run_steps if self.run_steps is not None else 0

    @property
    def jitter(self) -> float:
        """Scale of the noise; 0 is off."""
        return float(self.schedule.jitter)

    def shares_on(self, device: torch.device) -> Tensor | None:
        """A flow's `Schedule.kept_shares`, (thin,) fp32 on ``device``; None where all steps go the whole way."""
        return shares_on(self.schedule, device)

    @property
    def signed_seed(self) -> int:
        """The seed as the kernels take it: int64, two's complement."""
        return self.seed - 2**64 if self.seed >= 2**63 else self.seed


def shares_on(schedule: Schedule, device: torch.device) -> Tensor | None:
    """See `LaunchRequest.shares_on`."""
    if not schedule.restarts:
        return None
    return _flow_shares(schedule.thin, schedule.jitter, schedule.noise_to, device)


@functools.lru_cache(maxsize=16)
def _flow_shares(steps: int, noise_from: float, noise_to: float, device: torch.device) -> Tensor:
    """Made once: a copy to the device waits for it."""
    shares = Schedule.flow(1, steps, noise_from, noise_to).kept_shares
    return torch.tensor(shares, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Outputs:
    """What a launch fills, contiguous.

    Args:
        final: (n_chains, D) fp32 states after the last step run.
        residual: (n_chains,) fp32, largest change of a value in the last step run.
        draws: (n_chains, n_draws, D) fp32, of which the draws that end in the launch are written; None keeps none.
        calm: (n_chains,) int32, checks in a row passed; None without checks.
        halt: (n_chains,) int32: 0 for a chain that ran all steps, s > 0 for one at rest or NaN after s steps, -s for
            one that was near its saved state after s steps; None without checks.
    """

    final: Tensor
    residual: Tensor
    draws: Tensor | None = None
    calm: Tensor | None = None
    halt: Tensor | None = None


def allocate_outputs(request: LaunchRequest, shape: NetShape, device: torch.device, keep_draws: bool = True) -> Outputs:
    """Uninitialised outputs of a launch; one with checks keeps no draws."""
    n, dim = request.n_chains, shape.dim
    final, residual = torch.empty((n, dim), device=device), torch.empty(n, device=device)
    if request.checks is not None:
        calm, halt = (torch.empty(n, dtype=torch.int32, device=device) for _ in range(2))
        return Outputs(final, residual, None, calm, halt)
    return Outputs(
        final, residual, torch.empty((n, request.schedule.n_draws, dim), device=device) if keep_draws else None
    )


def check_tensors(request: LaunchRequest, shape: NetShape, device: torch.device, outputs: Outputs) -> None:
    """Refuse tensors of another shape, type, layout or device than `LaunchRequest` and `Outputs` say."""
    n, dim, checks = request.n_chains, shape.dim, request.checks
    if checks is not None:
        filled = outputs.calm is not None and outputs.halt is not None and outputs.draws is None
        if not filled or checks.saved is None:
            raise ValueError("a launch with checks has saved states, fills calm and halt, and no draws")
    expected: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [
        ("chain_ids", request.chain_ids, (n,), torch.int64),
        ("start", request.start, (n, dim), torch.float32),
        ("final", outputs.final, (n, dim), torch.float32),
        ("residual", outputs.residual, (n,), torch.float32),
        ("draws", outputs.draws, (n, request.schedule.n_draws, dim), torch.float32),
    ]
    if checks is not None:
        expected += [
            ("checks.checks_passed", checks.checks_passed, (n,), torch.int32),
            ("checks.saved", checks.saved, (n, dim), torch.float32),
            ("calm", outputs.calm, (n,), torch.int32),
            ("halt", outputs.halt, (n,), torch.int32),
        ]
    for name, tensor, want, dtype in expected:
        if tensor is None:
            continue
        fits = tensor.shape == want and tensor.dtype == dtype and tensor.device == device and tensor.is_contiguous()
        if not fits:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}: "
                f"it must be a contiguous {want} {dtype} on {device}"
            )


OPERANDS = {"fp16x3": "*fp16", "fp16": "*fp16", "bf16": "*bf16", "tf32": "*fp32", "ieee": "*fp32"}
"""Type of a pointer to weights for each device precision."""


def kind_of(request: LaunchRequest, outputs: Outputs) -> LaunchKind:
    """What a launch is compiled for. Where it starts from given states, or is a flow, its ``init`` does not matter."""
    given = request.start is not None or request.schedule.restarts
    return LaunchKind(
        request.schedule.jitter_kind,
        QUIET.init if given else request.init,
        request.start is not None,
        request.chain_ids is not None,
        outputs.draws is not None,
        request.checks is not None,
    )


def check_tile(tile: Tile, kernel: str) -> None:
    """Refuse a tile that was made for another kernel."""
    if tile.kernel != kernel:
        raise ValueError(f"the tile is for kernel {tile.kernel!r}: pass one of the plan's candidates for {kernel!r}")
