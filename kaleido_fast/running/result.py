"""What a run returns."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kaleido_fast.planning.plan import SamplePlan
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.running.mixing import Mixing, measure_mixing
from kaleido_fast.system.versions import library_versions

Stats = TypeVar("Stats", bound="SampleStats")


class Outcome(enum.IntEnum):
    """How a chain ended; `advice` says what to do about it.

    A flow is not asked whether it would stay where it ends: each of its chains that is finite counts as moving.
    """

    FIXED_POINT = 0
    CYCLE = 1
    MOVING = 2
    NON_FINITE = 3

    @property
    def advice(self) -> str:
        """What the outcome means, and what to do next."""
        return _ADVICE[self]


_ADVICE = {
    Outcome.FIXED_POINT: "the last residual was below tol: the chain has arrived",
    Outcome.CYCLE: "the chain runs round a cycle: its draws are states of that cycle",
    Outcome.MOVING: "the chain was still moving: raise burn_in, train with noise, or expect it where jitter is on and "
    "with the sampler 'flow', whose draws are complete after their steps wherever chains would go next",
    Outcome.NON_FINITE: "the state is NaN or infinite: look for huge weights, or use precision='fp32'",
}

_POINTS = (0, 10, 50, 90, 99, 100)  # of quantiles, in percent
_FIRST_BIN = 8  # steps: two checks at the default distance, before which nothing is frozen


@dataclass(frozen=True)
class SampleStats:
    """Figures of a run.

    Args:
        n_chains, n_steps: size of the run.
        chain_steps: steps summed over chains that were really run.
        seconds: wall time of the engine.
        setup_seconds: wall time before it (packing weights).
        compile_seconds: part of ``seconds`` spent on compiling a kernel that was not cached.
        residual_quantiles: 0, 10, 50, 90, 99, 100 % of the last residuals, NaN left out.
        outcome_shares: share of chains by outcome name.
        steps_quantiles: 0, 10, 50, 90, 99, 100 % of the steps that chains were run before they arrived.
        steps_histogram: chains that arrived, by the steps they took, in bins that double: {"1-8": 12, "9-16": 70, ...};
            chains that did not arrive are in none.
        mixing: how independent draws of a chain are; None for less than 4 draws a chain, and where none differ.
        engine, device, precision: what really ran.
        versions: of the libraries.
    """

    n_chains: int
    n_steps: int
    chain_steps: int
    seconds: float
    setup_seconds: float
    compile_seconds: float
    residual_quantiles: dict[str, float]
    outcome_shares: dict[str, float]
    steps_quantiles: dict[str, float]
    steps_histogram: dict[str, int]
    mixing: Mixing | None
    engine: str
    device: str
    precision: str
    versions: dict[str, str]

    @classmethod
    def of(
        cls: type[Stats], request: SampleRequest, plan: SamplePlan, device: str, found: ChainFigures, **measured: Any
    ) -> Stats:
        """Figures of a run that has ended.

        Args:
            request, plan: what was asked for, and how it was run.
            device: where.
            found: figures of its chains.
            measured: all other fields: ``chain_steps`` and seconds.
        """
        return cls(
            n_chains=request.n_chains,
            n_steps=request.schedule.n_steps,
            **vars(found),
            engine=plan.engine,
            device=device,
            precision=request.precision,
            versions=library_versions(),
            **measured,
        )

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain values, those that follow from others too."""
        plain = {field.name: getattr(self, field.name) for field in fields(SampleStats)}
        plain["mixing"] = None if self.mixing is None else self.mixing.to_dict()
        return {**plain, "work_saved": self.work_saved, "chain_steps_per_second": self.chain_steps_per_second}

    @property
    def work_saved(self) -> float:
        """Share of the chain-steps that freezing spared."""
        return 1 - self.chain_steps / (self.n_chains * self.n_steps)

    @property
    def chain_steps_per_second(self) -> float:
        """Throughput."""
        return self.chain_steps / self.seconds if self.seconds > 0 else float("inf")


@dataclass(frozen=True)
class ChainArrays:
    """What a run finds out about chains, one row a chain; shapes and types as in `SampleResult`."""

    draws: Tensor
    residual: Tensor
    steps: Tensor
    period: Tensor
    outcome: Tensor

    @classmethod
    def empty(cls, n: int, request: SampleRequest, dim: int, device: torch.device) -> ChainArrays:
        """Arrays to be filled, for ``n`` chains."""
        dtype = torch.float64 if request.precision == "fp64" else torch.float32
        return cls(
            torch.empty(n, request.n_draws, dim, dtype=dtype, device=device),
            torch.empty(n, dtype=torch.float32, device=device),
            torch.empty(n, dtype=torch.int32, device=device),
            torch.empty(n, dtype=torch.int32, device=device),
            torch.empty(n, dtype=torch.int8, device=device),
        )

    def __getitem__(self, rows: slice) -> ChainArrays:
        """A view of some rows."""
        return ChainArrays(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.residual)

    def to_host(self) -> ChainArrays:
        """The same in memory of the host."""
        return ChainArrays(*(getattr(self, field.name).cpu() for field in fields(self)))


@dataclass(frozen=True)
class ChainFigures:
    """Figures of the chains of a run, see `SampleStats`."""

    residual_quantiles: dict[str, float]
    outcome_shares: dict[str, float]
    steps_quantiles: dict[str, float]
    steps_histogram: dict[str, int]
    mixing: Mixing | None

    @classmethod
    def of(cls, chains: ChainArrays, request: SampleRequest) -> ChainFigures:
        """Figures of chains that are all in memory; where none is frozen, all have run all steps."""
        all_steps = quantiles_of(len(chains), lambda places: [float(request.schedule.n_steps)] * len(places))
        return cls(
            residual_quantiles=residual_quantiles(chains.residual),
            outcome_shares=outcome_shares(chains.outcome),
            steps_quantiles=quantiles(chains.steps.to(torch.float32)) if request.freezes else all_steps,
            steps_histogram=steps_histogram(chains.steps, chains.outcome) if request.freezes else {},
            mixing=measure_mixing(chains.draws),
        )


@dataclass(frozen=True)
class SampleResult:
    """Draws and what is known about each chain; tensors lie on the device that computed them.

    Args:
        draws: (n_chains, n_draws, D) in model values, each an output of the network.
        residual: (n_chains,) fp32, max over D of |x_{t+1} - input_t| at the last step, in data units.
        steps: (n_chains,) int32, steps that the chain was run.
        period: (n_chains,) int32: 1 for a fixed point, p for a cycle of p states, 0 for neither found.
        outcome: (n_chains,) int8 of `Outcome`.
        trace: (chains, steps, D) states asked for with ``trace``, else None.
        stats: figures of the run.
        request: what was asked for, with every default and the seed filled in.
        plan: how it was run.
        model_hash: SHA-256 of the model; of a module that is not an MLP see `kaleido_fast.modules.identity.identify`,
            "" where it has none.
    """

    draws: Tensor
    residual: Tensor
    steps: Tensor
    period: Tensor
    outcome: Tensor
    trace: Tensor | None
    stats: SampleStats
    request: SampleRequest
    plan: SamplePlan
    model_hash: str

    @property
    def final(self) -> Tensor:
        """(n_chains, D) last states, which are the last draws."""
        return self.draws[:, -1]

    def record(self) -> dict[str, Any]:
        """What to write beside the draws so that the run can be repeated: request, model hash, versions, engine."""
        return {
            "request": self.request.as_dict(),
            "model_hash": self.model_hash,
            "engine": self.stats.engine,
            "device": self.stats.device,
            "versions": self.stats.versions,
        }


def find_outcomes(final: Tensor, residual: Tensor, period: Tensor, tol: float | None) -> tuple[Tensor, Tensor]:
    """How each chain ended: outcome (n,) int8 and period (n,) int32, which go together.

    Args:
        final: (n, D) last states.
        residual: (n,) of the last step: below ``tol`` the chain rests, whatever was found before.
        period: (n,) int32, as found on the way: 1 frozen, p a cycle, else 0.
        tol: None judges no chain to rest.
    """
    outcome = torch.full(residual.shape, Outcome.MOVING, dtype=torch.int8, device=residual.device)
    # Filled, not indexed: looking up where a mask is true could wait for the device.
    outcome.masked_fill_(period > 1, Outcome.CYCLE)
    if tol is not None:
        outcome.masked_fill_((residual < tol) | (period == 1), Outcome.FIXED_POINT)
    largest = final.abs().amax(dim=1)  # NaN if one is; a test of each value takes a CPU twenty times as long
    outcome.masked_fill_(~torch.isfinite(largest), Outcome.NON_FINITE)
    fixed, lost = outcome == Outcome.FIXED_POINT, outcome == Outcome.NON_FINITE
    return outcome, period.masked_fill(fixed, 1).masked_fill(lost, 0)


def outcome_shares(outcome: Tensor) -> dict[str, float]:
    """Share of chains by outcome, every outcome named."""
    return shares_of(torch.bincount(outcome.to(torch.int64), minlength=len(Outcome)).tolist())


def shares_of(counts: Sequence[int]) -> dict[str, float]:
    """Shares of all by outcome, from how many chains have each."""
    total = max(1, sum(counts))
    return {kind.name.lower(): counts[kind] / total for kind in Outcome}


def residual_quantiles(residual: Tensor) -> dict[str, float]:
    """Quantiles of the finite residuals; NaN where there is none."""
    return quantiles(residual[torch.isfinite(residual)])


def quantiles(values: Tensor) -> dict[str, float]:
    """Values (n,) at 0, 10, 50, 90, 99 and 100 % of their order; NaN for none."""

    def at(places: list[int]) -> list[float]:
        if values.device.type == "cpu":  # 100,000 values are sorted in 9 ms, parted in 2
            return np.partition(values.numpy(), places)[places].tolist()
        return values.sort().values[places].tolist()

    return quantiles_of(len(values), at)


def quantiles_of(n: int, at: Callable[[list[int]], Sequence[float]]) -> dict[str, float]:
    """Quantiles of ``n`` values, of which ``at`` gives those at some places of their order; NaN for none."""
    values = at([round(p / 100 * (n - 1)) for p in _POINTS]) if n else [float("nan")] * len(_POINTS)
    return {f"{p}%": value for p, value in zip(_POINTS, values, strict=True)}


def steps_histogram(steps: Tensor, outcome: Tensor) -> dict[str, int]:
    """Count chains that arrived (fixed point or cycle) by their steps, (n,) each, in bins 1-8, 9-16, 17-32, ..."""
    arrived = steps[(outcome == Outcome.FIXED_POINT) | (outcome == Outcome.CYCLE)]
    most = int(arrived.max()) if len(arrived) else 0
    return histogram_of(most, lambda first, last: int(((arrived >= first) & (arrived <= last)).sum()))


def histogram_of(most: int, count: Callable[[int, int], int]) -> dict[str, int]:
    """Counts in bins 1-8, 9-16, ... up to ``most`` steps; ``count`` gives how many took from so many to so many."""
    counts: dict[str, int] = {}
    first, last = 1, _FIRST_BIN
    while first <= most:
        counts[f"{first}-{last}"] = count(first, last)
        first, last = last + 1, 2 * last
    return counts
