"""What is asked for: the options of a run, checked."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.names import (
    DEFAULT_BURN_IN,
    DEFAULT_CHECK_EVERY,
    DEFAULT_JITTER,
    DEFAULT_MAX_PERIOD,
    DEFAULT_PATIENCE,
    DEFAULT_SETTLE,
    DEFAULT_THIN,
    DEFAULT_TOL,
    ENGINES,
    INITS,
    KERNELS,
    LOW_PRECISIONS,
    NOISES,
    PRECISIONS,
)
from kaleido_fast.scalars import plain_fields, whole_number
from kaleido_kernels.schedule import MAX_STEPS, Schedule

RECOMMENDABLE = ("burn_in", "thin", "jitter", "settle", "tol")
MAX_COUNT = 2**62
MAX_PERIOD = 2**16
MAX_TILE = 2**20


@dataclass(frozen=True)
class Trace:
    """States to record for pictures: ``chains`` (absolute ids) at ``steps`` (0 is the start noise)."""

    chains: tuple[int, ...]
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        plain_fields(self)


@dataclass(frozen=True)
class SampleRequest:
    """What a run computes; two equal requests give the same bits on one engine, precision and kind of device (on a CPU
    engine "reference" also takes the same number of threads).

    Args:
        n_chains: number of chains, at least 1.
        first_chain: absolute id of the first one, 0 .. 2**62.
        burn_in: steps before the draws.
        n_draws: draws kept per chain.
        thin: steps per draw.
        seed: 0 .. 2**64 - 1.
        init: start noise: "uniform" over the data range or "normal" clipped to it.
        noise: jitter noise: "normal", "uniform" or "upstream".
        jitter: scale of the jitter noise in units of half the data range; 0 is off.
        settle: steps without jitter before each draw; not used by "upstream" noise, which comes after every step.
        tol: without jitter, a chain whose residual is below it is frozen (see `kaleido_fast.running.freezing`); None
            runs every step. Jittered runs never freeze.
        patience: checks in a row below ``tol`` before a chain is frozen.
        check_every: steps between checks; they fall on multiples of it.
        max_period: longest cycle looked for among chains that do not settle; 1 looks for none.
        retire_cycles: a chain found in a cycle is run no further; its later draws walk the cycle.
        precision: "fp32", "fp64" (reference only), "tf32", "fp16" or "bf16" (rounded operands, fp32 sums).
        polish: with a precision below fp32, steps before the first draw from which on all is run in fp32.
        engine: "auto", "triton", "cpu" or "reference".
        kernel: of the Triton engine: "narrow", "stream", "wide" or "graph"; "auto" lets the plan choose.
        trace: states to record, or None.
        tile_chains: rows that a module which is no plain MLP gets at once: bits may depend on it. None lets the plan
            choose (`module_tile`); `kaleido_fast.sampling.prepare_run` writes its choice here.

    Raises:
        InputError: a value outside of what is said here.
    """

    n_chains: int
    first_chain: int = 0
    burn_in: int = DEFAULT_BURN_IN
    n_draws: int = 1
    thin: int = DEFAULT_THIN
    seed: int = 0
    init: str = "uniform"
    noise: str = "normal"
    jitter: float = DEFAULT_JITTER
    settle: int = DEFAULT_SETTLE
    tol: float | None = DEFAULT_TOL
    patience: int = DEFAULT_PATIENCE
    check_every: int = DEFAULT_CHECK_EVERY
    max_period: int = DEFAULT_MAX_PERIOD
    retire_cycles: bool = False
    precision: str = "fp32"
    polish: int = 0
    engine: str = "auto"
    kernel: str = "auto"
    trace: Trace | None = None
    tile_chains: int | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        _check_count("n_chains", self.n_chains, 1, MAX_COUNT)
        _check_count("first_chain", self.first_chain, 0, MAX_COUNT)
        _check_count("burn_in", self.burn_in, 0, MAX_STEPS)
        _check_count("n_draws", self.n_draws, 1, MAX_STEPS)
        _check_count("thin", self.thin, 1, MAX_STEPS)
        _check_count("settle", self.settle, 0, MAX_STEPS)
        _check_count("patience", self.patience, 1, MAX_STEPS)
        _check_count("check_every", self.check_every, 1, MAX_STEPS)
        _check_count("max_period", self.max_period, 1, MAX_PERIOD)
        _check_count("polish", self.polish, 0, MAX_STEPS)
        _check_count("seed", self.seed, 0, 2**64 - 1)
        _check_name("init", self.init, INITS)
        _check_name("noise", self.noise, NOISES)
        _check_name("precision", self.precision, PRECISIONS)
        _check_name("engine", self.engine, ENGINES)
        _check_name("kernel", self.kernel, KERNELS)
        if self.kernel != "auto" and self.engine not in ("auto", "triton"):
            raise InputError(
                f"kernel {self.kernel!r} with engine {self.engine!r}: kernels are of engine 'triton'; leave one out"
            )
        _check_scale("jitter", self.jitter, positive=False)
        if self.tol is not None:
            _check_scale("tol", self.tol, positive=True)
        try:
            _ = self.schedule
        except ValueError as problem:
            raise InputError(str(problem)) from problem
        if self.polish > self.burn_in + self.thin:
            raise InputError(
                f"polish is {self.polish}, the first draw comes after {self.burn_in + self.thin} steps: "
                "pass at most that"
            )
        if self.polish and self.precision not in LOW_PRECISIONS:
            raise InputError(f"polish with precision {self.precision!r}: it goes with {', '.join(LOW_PRECISIONS)}")
        if self.trace is not None:
            _check_trace(self.trace, self)
        if self.tile_chains is not None:
            _check_count("tile_chains", self.tile_chains, 1, MAX_TILE)

    @property
    def freezes(self) -> bool:
        """Whether chains that have arrived are frozen."""
        return self.tol is not None and self.jitter == 0

    @property
    def polish_from(self) -> int:
        """First step run in fp32 when polishing."""
        return self.burn_in + self.thin - self.polish

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Which steps are jittered and which end in a draw."""
        return Schedule(self.burn_in, self.n_draws, self.thin, self.settle, self.jitter, self.noise)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for records beside the draws."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trace"}
        if self.trace is not None:
            values["trace"] = {"chains": list(self.trace.chains), "steps": list(self.trace.steps)}
        return values


def merge_options(explicit: Mapping[str, Any], recommended: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a request: the recommended ones of a checkpoint, over which every explicit one wins."""
    options = {name: recommended[name] for name in RECOMMENDABLE if name in recommended}
    options.update(explicit)
    return options


def _check_count(name: str, value: object, least: int, most: int) -> None:
    whole_number(name, value, least, most)


def _check_name(kind: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise unknown_name(kind, value, known)


def _check_scale(name: str, value: object, *, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{name} is {value!r}: it must be a finite number")
    if value < 0 or (positive and value == 0):
        raise InputError(f"{name} is {value!r}: it must be {'above 0' if positive else '0 or more'}")


def _check_trace(trace: Trace, request: SampleRequest) -> None:
    if not trace.chains or not trace.steps:
        raise InputError("trace without chains or steps: name at least one of each")
    first, last = request.first_chain, request.first_chain + request.n_chains - 1
    for chain in trace.chains:
        _check_count("trace chain", chain, first, last)
    for step in trace.steps:
        _check_count("trace step", step, 0, request.schedule.n_steps)
