"""What a benchmark has found, and figures derived from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kaleido_fast.benchmarking.cases import BenchNetwork
from kaleido_fast.benchmarking.cold import FirstCall
from kaleido_fast.benchmarking.timing import Ratio, Spread, compare, spread


@dataclass(frozen=True)
class Timings:
    """One contestant's raw seconds, with the seconds that building it took in its process."""

    kind: str  # "engine" or "peer"
    seconds: list[float]
    build_seconds: float
    error: float  # the largest, in data units
    error_at: dict[str, int]  # step, chain, dim
    relative_error: float  # norm of all errors over that of the states


@dataclass(frozen=True)
class NetworkResult:
    """All that was measured on one network in one precision.

    Args:
        network, n_chains, n_steps, flops_per_step: the work.
        precision: of the engines; peers have operands of as many bits.
        timings: by contestant.
        ceiling_seconds, ceiling_flops: raw, of so many operations in a large matrix product.
        skipped: contestants that were not timed, and why.
        others_share: of the cores' time, used by other processes while contestants were timed; None if not known.
        first_calls: by engine: {"cold": ..., "cached": ...}.
    """

    network: BenchNetwork
    n_chains: int
    n_steps: int
    flops_per_step: int
    precision: str
    timings: dict[str, Timings]
    ceiling_seconds: list[float]
    ceiling_flops: int
    skipped: dict[str, str]
    others_share: float | None = None
    first_calls: dict[str, dict[str, FirstCall]] = field(default_factory=dict)

    @property
    def chain_steps(self) -> int:
        return self.n_chains * self.n_steps

    @property
    def engines(self) -> list[str]:
        return [name for name, timing in self.timings.items() if timing.kind == "engine"]

    @property
    def peers(self) -> list[str]:
        return [name for name, timing in self.timings.items() if timing.kind == "peer"]

    def speed(self, name: str) -> Spread:
        """Chain-steps a second of a contestant; p20 is the slow end."""
        seconds = spread(self.timings[name].seconds)
        work = self.chain_steps
        return Spread(work / seconds.median, work / seconds.p80, work / seconds.p20)

    def flops(self, name: str) -> float:
        """Floating-point operations a second, counted from the sizes of the layers."""
        return self.speed(name).median * self.flops_per_step

    def ceiling(self) -> float:
        """Floating-point operations a second of the large matrix product in the same run."""
        return self.ceiling_flops / spread(self.ceiling_seconds).median

    def ratio(self, engine: str, peer: str) -> Ratio:
        """Speed of an engine over that of a peer."""
        return compare(self.timings[engine].seconds, self.timings[peer].seconds)


@dataclass(frozen=True)
class BenchReport:
    """Results of all networks, and where they were measured.

    Args:
        results: one for each network and precision.
        about: the machine, the code, the command.
        quick: whether timings were short.
        lost: what made the device fail, or empty; what is ``unmeasured`` was left out for that reason.
        failures: engines that failed, a line each.
    """

    results: list[NetworkResult]
    about: dict[str, Any]
    quick: bool
    lost: str = ""
    unmeasured: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
