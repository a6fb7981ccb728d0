"""The options of a run, defined once: text, range, unit and default of each.

Checks of a request, the command line's ``--help`` and the table of docs/sampling.md come from here. Plain Python, so
that ``--help`` need not wait for torch.

Texts name an option as `tol` and a missing value as `None`; the command line writes ``--tol`` and its own word there.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
    ENGINES,
    INITS,
    KERNELS,
    NOISES,
    PRECISIONS,
    SAMPLERS,
)
from kaleido_kernels.shapes import MAX_FLOW_STEPS, MAX_STEPS

MAX_COUNT = 2**62
MAX_PERIOD = 2**16
MAX_TILE = 2**20


class Whole:
    """Whole numbers from ``least`` to ``most``."""

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most


class Real:
    """Finite numbers from 0 to ``most``; without 0 where ``positive``."""

    def __init__(self, *, positive: bool = False, most: float = math.inf) -> None:
        self.positive, self.most = positive, most


class OneOf:
    """A closed list of names."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names


class Switch:
    """On or off."""


Range = Whole | Real | OneOf | Switch


class Option(NamedTuple):
    """One option of a run.

    Args:
        text: what it is, without the full stop at the end.
        range: values it may have.
        default: what a request has where nothing else is said; None where it must be passed.
        otherwise: what holds where it is left out, in words, if that is more than the default.
        unit: of its numbers.
        or_none: whether None is a value of its own.
        recommendable: whether a checkpoint may recommend it; passed by name it wins over the recommendation.
        sampler: the only sampler that knows it; empty if all do.
    """

    text: str
    range: Range
    default: Any = None
    otherwise: str = ""
    unit: str = ""
    or_none: bool = False
    recommendable: bool = False
    sampler: str = ""


OPTIONS = {
    "n_chains": Option("Number of independent chains", Whole(1, MAX_COUNT), unit="chains"),
    "first_chain": Option("Absolute id of the first chain", Whole(0, MAX_COUNT), 0),
    "sampler": Option(
        "kaleidoscope: x <- f(x). flow: each draw goes from fresh noise to f(x) in `steps` parts of the way",
        OneOf(SAMPLERS),
        "kaleidoscope",
        "the model's recommendation, else kaleidoscope",
        recommendable=True,
    ),
    "burn_in": Option(
        "Steps before the draws",
        Whole(0, MAX_STEPS),
        DEFAULT_BURN_IN,
        f"the model's recommendation, else {DEFAULT_BURN_IN}",
        unit="steps",
        recommendable=True,
        sampler="kaleidoscope",
    ),
    "n_draws": Option("Draws kept per chain", Whole(1, MAX_STEPS), 1, unit="draws"),
    "thin": Option(
        "Steps per draw",
        Whole(1, MAX_STEPS),
        DEFAULT_THIN,
        f"{DEFAULT_THIN}; several draws with jitter: as recommended, else `settle` and 64 more",
        unit="steps",
        recommendable=True,
        sampler="kaleidoscope",
    ),
    "seed": Option(
        "0 to 2^64-1; the same seed gives the same bits. `None` draws one and reports it", Whole(0, 2**64 - 1), 0
    ),
    "init": Option("Start noise over the data range", OneOf(INITS), "uniform", sampler="kaleidoscope"),
    "noise": Option(
        "Kind of jitter. upstream: as published, after each step, also the last one; `jitter` is its eps [0.01], and "
        "no step is clean",
        OneOf(NOISES),
        "normal",
        sampler="kaleidoscope",
    ),
    "jitter": Option(
        "Noise added to the state before each step, in units of half the data range",
        Real(),
        DEFAULT_JITTER,
        f"recommended, else {DEFAULT_JITTER:g}",
        unit="half the data range",
        recommendable=True,
        sampler="kaleidoscope",
    ),
    "settle": Option(
        "Last steps before each draw without jitter",
        Whole(0, MAX_STEPS),
        DEFAULT_SETTLE,
        f"recommended, else {DEFAULT_SETTLE}",
        unit="steps",
        recommendable=True,
        sampler="kaleidoscope",
    ),
    "steps": Option(
        "Steps of a draw of sampler flow: more are better and slower",
        Whole(1, MAX_FLOW_STEPS),
        DEFAULT_STEPS,
        f"recommended, else {DEFAULT_STEPS}",
        unit="steps",
        recommendable=True,
        sampler="flow",
    ),
    "noise_from": Option(
        "Share of noise at the first step of sampler flow",
        Real(positive=True, most=1),
        DEFAULT_NOISE_FROM,
        f"recommended, else {DEFAULT_NOISE_FROM:g}",
        unit="half the data range",
        recommendable=True,
        sampler="flow",
    ),
    "noise_to": Option(
        "Share of noise at the last step of sampler flow, below `noise_from`",
        Real(positive=True, most=1),
        DEFAULT_NOISE_TO,
        f"recommended, else {DEFAULT_NOISE_TO:g}",
        unit="half the data range",
        recommendable=True,
        sampler="flow",
    ),
    "tol": Option(
        "Last change of a chain, in data units, below which it is frozen; `None` runs every step",
        Real(positive=True),
        DEFAULT_TOL,
        "1e-4; not with jitter",
        unit="data units",
        or_none=True,
        recommendable=True,
        sampler="kaleidoscope",
    ),
    "patience": Option(
        "Checks in a row below `tol` before a chain is frozen",
        Whole(1, MAX_STEPS),
        DEFAULT_PATIENCE,
        unit="checks",
        sampler="kaleidoscope",
    ),
    "check_every": Option(
        "Steps between checks", Whole(1, MAX_STEPS), DEFAULT_CHECK_EVERY, unit="steps", sampler="kaleidoscope"
    ),
    "max_period": Option(
        "Longest cycle looked for among chains that do not come to rest; 1 looks for none",
        Whole(1, MAX_PERIOD),
        DEFAULT_MAX_PERIOD,
        unit="steps",
        sampler="kaleidoscope",
    ),
    "retire_cycles": Option(
        "Run chains found in a cycle no further: later draws are its states in turn",
        Switch(),
        False,
        sampler="kaleidoscope",
    ),
    "precision": Option("Operands of the products; sums are fp32 (fp64 in fp64)", OneOf(PRECISIONS), "fp32"),
    "polish": Option(
        "With a precision below fp32: steps before the first draw from which on all runs in fp32",
        Whole(0, MAX_STEPS),
        0,
        unit="steps",
        sampler="kaleidoscope",
    ),
    "engine": Option("auto: the fastest that can run", OneOf(ENGINES), "auto"),
    "kernel": Option(
        "Of the Triton engine; auto: the one measured best on this GPU, else the first that fits",
        OneOf(KERNELS),
        "auto",
    ),
    "tile_chains": Option(
        "Rows that a module which is no plain MLP gets at once; last bits may depend on it",
        Whole(1, MAX_TILE),
        otherwise="chosen by `n_chains`",
        unit="chains",
        or_none=True,
    ),
}
"""All fields of `kaleido_fast.SampleRequest` but ``trace``, in their order."""

RECOMMENDABLE = tuple(name for name, option in OPTIONS.items() if option.recommendable)
OPTIONS_OF = {sampler: tuple(n for n, option in OPTIONS.items() if option.sampler == sampler) for sampler in SAMPLERS}
"""The options that one sampler alone knows."""
ADDED_LATER = {name: OPTIONS[name].default for name in ("sampler", *OPTIONS_OF["flow"])}
"""What held for runs of versions that did not know these options and do not state them."""
