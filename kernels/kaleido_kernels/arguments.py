"""What every kernel gets, in one table: name, type, and where a launch finds the value. Plain Python.

Numbers are arguments one by one: Triton does not let members of a tuple go unspecialised, so that in a tuple 1 and
every multiple of 16 would compile a kernel of its own. Inside, `kaleido_kernels.steps` bundles them.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

from kaleido_kernels.shapes import RESTART, NetShape


class Map(NamedTuple):
    """The step that is iterated, as it is compiled in.

    Args:
        dim: D.
        activation, negative_slope, bound, low, high: of the network, see `NetShape`.
        precision: a device precision.
        jitter: "none", the kind of noise that the schedule adds, or "restart" for a flow.
        init: start noise, "uniform" or "normal"; a flow has its own.
    """

    dim: int
    activation: str
    negative_slope: float
    bound: str
    low: float
    high: float
    precision: str
    jitter: str
    init: str


class LaunchKind(NamedTuple):
    """What of a request is compiled into a kernel: `Map`'s fields of the same names, and which tensors there are."""

    jitter: str = "none"
    init: str = "uniform"
    has_start: bool = False
    has_ids: bool = True
    keep_draws: bool = True
    checks: bool = False

    @property
    def by_parts(self) -> bool:
        """Whether steps go a part of the way: those of a flow."""
        return self.jitter == RESTART


QUIET = LaunchKind()
"""The commonest launch: from start noise through all steps."""

CHECKED = LaunchKind(has_start=True, keep_draws=False, checks=True)
"""The launch that takes chains out of the work."""


class Argument(NamedTuple):
    """One argument: its type, the attribute of (request, outputs) that holds it, and the flag of `LaunchKind` without
    which it is None."""

    name: str
    type: str
    source: str
    flag: str = ""


COMMON = (
    Argument("draws_ptr", "*fp32", "outputs.draws", "keep_draws"),  # (n_chains, n_draws, D), row-major
    Argument("final_ptr", "*fp32", "outputs.final"),  # (n_chains, D), row-major
    Argument("residual_ptr", "*fp32", "outputs.residual"),  # (n_chains,)
    Argument("start_ptr", "*fp32", "request.start", "has_start"),  # (n_chains, D), row-major
    Argument("chain_ids_ptr", "*i64", "request.chain_ids", "has_ids"),  # (n_chains,)
    Argument("saved_ptr", "*fp32", "checks.saved", "checks"),  # (n_chains, D), row-major
    Argument("calm_in_ptr", "*i32", "checks.checks_passed", "checks"),  # (n_chains,)
    Argument("calm_ptr", "*i32", "outputs.calm", "checks"),  # (n_chains,)
    Argument("halt_ptr", "*i32", "outputs.halt", "checks"),  # (n_chains,)
    Argument("shares_ptr", "*fp32", "shares", "by_parts"),  # (thin,): g_t of the steps of a draw
    Argument("n_chains", "i64", "request.n_chains"),
    Argument("first_chain", "i64", "request.first_chain"),
    Argument("seed", "i64", "request.signed_seed"),
    Argument("jitter", "fp32", "request.jitter"),
    Argument("burn_in", "i32", "request.schedule.burn_in"),
    Argument("n_draws", "i32", "request.schedule.n_draws"),
    Argument("thin", "i32", "request.schedule.thin"),
    Argument("settle", "i32", "request.schedule.settle"),
    Argument("first_step", "i32", "request.first_step"),
    Argument("run_steps", "i32", "request.n_run"),
    Argument("tol", "fp32", "checks.tol"),
    Argument("patience", "i32", "checks.patience"),
    Argument("every", "i32", "checks.every"),
)
"""The arguments of every kernel but the graph path's behind its own, in order."""

UNSPECIALISED = tuple(each.name for each in COMMON if each.type[0] == "i")


class _NoChecks(NamedTuple):
    saved: None = None
    checks_passed: None = None
    tol: float = 0.0
    patience: int = 1
    every: int = 1


class _Launch(NamedTuple):
    request: Any
    outputs: Any
    checks: Any
    shares: Any


_NO_CHECKS = _NoChecks()
_read = attrgetter(*(each.source for each in COMMON))


def common_arguments(request: Any, outputs: Any) -> tuple[Any, ...]:
    """The values of `COMMON`, in order; a tensor that is not there is None."""
    shares = request.shares_on(outputs.final.device)
    values: tuple[Any, ...] = _read(_Launch(request, outputs, request.checks or _NO_CHECKS, shares))
    return values


def common_types(kind: LaunchKind) -> dict[str, str]:
    """Name -> type of `COMMON`; "none" for a tensor that is not there."""
    return {each.name: each.type if not each.flag or getattr(kind, each.flag) else "none" for each in COMMON}


def compiled_map(shape: NetShape, precision: str, kind: LaunchKind) -> Map:
    """The map for a network in a device precision."""
    net = (shape.dim, shape.activation, shape.negative_slope, shape.bound, shape.low, shape.high)
    return Map(*net, precision, kind.jitter, kind.init)
