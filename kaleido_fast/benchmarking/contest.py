"""What is timed: engines and peers behind one call, each checked against the reference before it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kaleido_fast.benchmarking.acceptance import Deviation, measure_deviation, refuse_wrong
from kaleido_fast.benchmarking.timing import Timed
from kaleido_fast.engines.available import plan_here
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.noise import start_noise
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.running.execution import run_plan
from kaleido_fast.running.result import SampleResult
from kaleido_fast.running.subject import Subject, resolve_subject
from kaleido_fast.system.devices import device_facts

Procedure = Callable[[Tensor, int], Tensor]
"""(z0 of shape (n, D), n_steps) -> states after ``n_steps`` steps, (n, D); leaves ``z0`` as it is."""

CHECKED_STEPS = (1, 3)  # the first shows a wrong step, the last a wrong repetition


@dataclass(frozen=True)
class Contestant:
    """Something to time.

    Args:
        run: the procedure that is timed.
        proof: the procedure that must reproduce the reference's states: ``run`` itself where this is None.
        proof_request: options of the reference's request that ``proof`` must reproduce (jitter off by default).
        uncounted: seconds of the last ``run`` that are not steady state (packing weights).
        precision: of the operands of products; says how much rounding is allowed for, see `acceptance`.
        about: which variant it is, where its builder had a choice.
    """

    run: Procedure
    proof: Procedure | None = None
    proof_request: Mapping[str, Any] = field(default_factory=dict)
    uncounted: Callable[[], float] = lambda: 0.0
    precision: str = "fp32"
    about: str = ""

    def timed(self, z0: Tensor, n_steps: int) -> Timed:
        """``run`` on start states ``z0`` (n, D) as work for `kaleido_fast.benchmarking.timing`."""

        def run() -> float:
            self.run(z0, n_steps)
            return self.uncounted()

        return run


class EngineRun:
    """An engine on its public path: a plan run on given start states, no early stop."""

    def __init__(self, model: KaleidoMLP, engine: str, precision: str, device: torch.device, **options: Any) -> None:
        self.subject: Subject = resolve_subject(model)
        self.engine, self.precision, self.device, self.options = engine, precision, device, options
        self.setup_seconds = 0.0

    def __call__(self, z0: Tensor, n_steps: int) -> Tensor:
        return self.sample(z0, n_steps - 1, 1).final

    def sample(self, z0: Tensor, burn_in: int, n_draws: int) -> SampleResult:
        """A run without early stop; draws are the states after ``burn_in + 1, burn_in + 2, ...`` steps."""
        request = SampleRequest(
            n_chains=len(z0),
            burn_in=burn_in,
            n_draws=n_draws,
            tol=None,
            engine=self.engine,
            precision=self.precision,
            **{"jitter": 0.0, **self.options},
        )
        subject, facts = self.subject, device_facts(self.device)
        plan = plan_here(request, subject.spec, facts, subject.dim, weights=subject.weights_range)
        result = run_plan(self.subject, request, plan, self.device, z0=z0)
        self.setup_seconds = result.stats.setup_seconds
        return result


def engine_contestant(model: KaleidoMLP, engine: str, precision: str, device: torch.device) -> Contestant:
    """The engine called ``engine`` as a contestant."""
    run = EngineRun(model, engine, precision, device)
    return Contestant(run, uncounted=lambda: run.setup_seconds, precision=precision)


def resolve_engine(model: KaleidoMLP, engine: str, precision: str, device: torch.device) -> str:
    """Name of the engine that runs here when ``engine`` is asked for, found out by running one step of two chains.

    Raises:
        InputError: it cannot run here.
    """
    request = SampleRequest(n_chains=2, burn_in=0, tol=None, engine=engine, precision=precision)
    try:
        run = EngineRun(model, engine, precision, device)
        plan = plan_here(request, model.spec, device_facts(device), model.spec.dim, weights=run.subject.weights_range)
        run(start_states(model, 2, device), 1)
    except InputError as problem:
        raise InputError(f"cannot run here: {problem}") from problem
    except (ImportError, RuntimeError) as problem:
        raise InputError(f"engine {engine!r} cannot run here: {one_line(problem)}") from problem
    return plan.engine


def start_states(model: KaleidoMLP, n_chains: int, device: torch.device) -> Tensor:
    """Start states of every contestant: uniform noise of seed 0, (n_chains, D) fp32."""
    spec = model.spec
    block = max(1, 2**22 // spec.dim)  # the noise works in int64: without blocks it would need 50 times its result
    parts = torch.arange(n_chains, device=device).split(block)
    return torch.cat([start_noise(0, part, spec.dim, "uniform", spec.low, spec.high) for part in parts])


def reference_states(model: KaleidoMLP, z0: Tensor, precision: str = "fp32", **options: Any) -> list[Tensor]:
    """The reference's states after each of `CHECKED_STEPS`."""
    run = EngineRun(model, "reference", precision, z0.device, **options)
    states = run.sample(z0, 0, max(CHECKED_STEPS)).draws
    return [states[:, step - 1] for step in CHECKED_STEPS]


def check_contestant(contestant: Contestant, z0: Tensor, expected: list[Tensor], n_layers: int) -> Deviation:
    """Compare states after each of `CHECKED_STEPS` with the reference's, ``expected``, of a network of ``n_layers``.

    Returns:
        How far they are from them, where they are farthest.

    Raises:
        WrongStatesError: the states differ by more than the precision's rounding; says where and by how much.
        InputError: they have another shape.
    """
    proof = contestant.proof or contestant.run
    found = []
    for step, want in zip(CHECKED_STEPS, expected, strict=True):
        found.append(measure_deviation(proof(z0, step), want, step))
        refuse_wrong(found[-1], contestant.precision, n_layers)
    return max(found, key=lambda deviation: deviation.error)


class References:
    """The reference's states on one network, computed once for all contestants with the same options.

    Args:
        model: the network.
        z0: start states (n, D).
    """

    def __init__(self, model: KaleidoMLP, z0: Tensor) -> None:
        self._model, self._z0 = model, z0
        self._known: dict[tuple[str, int], list[Tensor]] = {}

    def states(self, precision: str, options: Mapping[str, Any], rows: int) -> list[Tensor]:
        """`reference_states` of the first ``rows`` chains, with the options of a contestant's ``proof_request``."""
        kind = f"{precision} {sorted(options.items())}"
        if (kind, rows) not in self._known:
            whole = self._known.get((kind, len(self._z0)))
            states = reference_states(self._model, self._z0[:rows], precision, **options) if whole is None else whole
            self._known[kind, rows] = [one[:rows] for one in states]
        return self._known[kind, rows]


def one_line(problem: BaseException) -> str:
    """An error's first line of text, or its type."""
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__
