"""What is asked for: the options of a run, checked."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields
from typing import Any

from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.names import (
    DEFAULT_BURN_IN,
    DEFAULT_CHECK_EVERY,
    DEFAULT_JITTER,
    DEFAULT_MAX_PERIOD,
    DEFAULT_NOISE_FROM,
    DEFAULT_NOISE_TO,
    DEFAULT_PATIENCE,
    DEFAULT_SETTLE,
    DEFAULT_STEPS,
    DEFAULT_THIN,
    DEFAULT_TOL,
    LOW_PRECISIONS,
)
from kaleido_fast.planning.options import OPTIONS, OPTIONS_OF, OneOf, Range, Real, Switch, Whole
from kaleido_fast.scalars import plain_fields, whole_number
from kaleido_kernels.schedule import Schedule


@dataclass(frozen=True)
class Trace:
    """States to record for pictures: ``chains`` (absolute ids) at ``steps`` (0 is the start noise)."""

    chains: tuple[int, ...]
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        plain_fields(self)


_FLOW_HAS: dict[str, Any] = {
    **{name: OPTIONS[name].default for name in OPTIONS_OF["kaleidoscope"]},
    **{"burn_in": 0, "jitter": 0.0, "settle": 0, "tol": None},
}
"""What a flow has of the kaleidoscope's options; its ``thin`` is ``steps``."""


@dataclass(frozen=True)
class SampleRequest:
    """What a run computes; two equal requests give the same bits on one engine, precision and kind of device (on a CPU
    engine "reference" also takes the same number of threads).

    Options are those of `kaleido_fast.fast_sample`; `kaleido_fast.planning.options.OPTIONS` has text, range and unit of
    each. Here all are filled in:

    Of a flow the kaleidoscope's options are set to what holds for it: no burn-in, ``thin`` = ``steps``, no jitter, no
    ``tol``; of a kaleidoscope the flow's have their defaults.

    Args:
        settle: not used by "upstream" noise, which comes after every step.
        tol: None runs every step. Jittered runs never freeze (see `kaleido_fast.running.freezing`).
        check_every: steps between checks; they fall on multiples of it.
        trace: states to record, or None.
        tile_chains: rows that a module which is no plain MLP gets at once: bits may depend on it. None lets the plan
            choose (`module_tile`); `kaleido_fast.sampling.prepare_run` writes its choice here.

    Raises:
        InputError: a value outside of these ranges.
    """

    n_chains: int
    first_chain: int = 0
    sampler: str = "kaleidoscope"
    burn_in: int = DEFAULT_BURN_IN
    n_draws: int = 1
    thin: int = DEFAULT_THIN
    seed: int = 0
    init: str = "uniform"
    noise: str = "normal"
    jitter: float = DEFAULT_JITTER
    settle: int = DEFAULT_SETTLE
    steps: int = DEFAULT_STEPS
    noise_from: float = DEFAULT_NOISE_FROM
    noise_to: float = DEFAULT_NOISE_TO
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
        values = vars(self)
        for name, option in OPTIONS.items():
            value = values[name]
            if value is not None or not option.or_none:
                _check(name, value, option.range)
        if self.sampler == "flow":
            self._settle_for_flow()
        else:
            self._refuse_of_flow()
        if self.kernel != "auto" and self.engine not in ("auto", "triton"):
            raise InputError(
                f"kernel {self.kernel!r} with engine {self.engine!r}: kernels are of engine 'triton'; leave one out"
            )
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
        """Which steps get noise, how far they go, and which end in a draw."""
        if self.sampler == "flow":
            return Schedule.flow(self.n_draws, self.steps, self.noise_from, self.noise_to)
        return Schedule(self.burn_in, self.n_draws, self.thin, self.settle, self.jitter, self.noise)

    def _settle_for_flow(self) -> None:
        """Put what a flow has into the kaleidoscope's options; one that says something else is refused."""
        for name in OPTIONS_OF["kaleidoscope"]:
            value, own = getattr(self, name), self.steps if name == "thin" else _FLOW_HAS[name]
            if value != own:
                if value != OPTIONS[name].default:
                    raise foreign_option(name, value, "flow")
                object.__setattr__(self, name, own)

    def _refuse_of_flow(self) -> None:
        for name in OPTIONS_OF["flow"]:
            if getattr(self, name) != OPTIONS[name].default:
                raise foreign_option(name, getattr(self, name), self.sampler)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for records beside the draws."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trace"}
        if self.trace is not None:
            values["trace"] = {"chains": list(self.trace.chains), "steps": list(self.trace.steps)}
        return values


def foreign_option(name: str, value: object, sampler: str, *, because: str = "") -> InputError:
    """The error for an option that ``sampler`` does not have.

    Args:
        name, value: the option.
        sampler: what the run has.
        because: why it has this sampler, if not by the caller's word.
    """
    own = OPTIONS[name].sampler
    why = f" ({because})" if because else ""
    return InputError(
        f"{name} {value} with sampler {sampler!r}{why}: {name} belongs to sampler {own!r}; leave it out, or pass "
        f"sampler={own!r} (--sampler)"
    )


def _check(name: str, value: object, allowed: Range) -> None:
    if isinstance(allowed, Whole):
        whole_number(name, value, allowed.least, allowed.most)
    elif isinstance(allowed, Real):
        _check_scale(name, value, allowed)
    elif isinstance(allowed, OneOf) and value not in allowed.names:
        raise unknown_name(name, value, allowed.names)
    elif isinstance(allowed, Switch) and not (isinstance(value, int) and value in (False, True)):
        raise InputError(f"{name} is {value!r}: it must be True or False")


def _check_scale(name: str, value: object, allowed: Real) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{name} is {value!r}: it must be a finite number")
    if value < 0 or (allowed.positive and value == 0) or value > allowed.most:
        least = "above 0" if allowed.positive else "0 or more"
        most = "" if math.isinf(allowed.most) else f", at most {allowed.most:g}"
        raise InputError(f"{name} is {value!r}: it must be {least}{most}")


def _check_trace(trace: Trace, request: SampleRequest) -> None:
    if not trace.chains or not trace.steps:
        raise InputError("trace without chains or steps: name at least one of each")
    first, last = request.first_chain, request.first_chain + request.n_chains - 1
    for chain in trace.chains:
        whole_number("trace chain", chain, first, last)
    for step in trace.steps:
        whole_number("trace step", step, 0, request.schedule.n_steps)
