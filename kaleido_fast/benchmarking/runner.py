"""A whole benchmark: cases, contestants checked and timed in turns, first calls apart."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kaleido_fast.benchmarking import ceiling, cold
from kaleido_fast.benchmarking.acceptance import Deviation
from kaleido_fast.benchmarking.cases import BenchNetwork, Case, Size, make_size
from kaleido_fast.benchmarking.contest import (
    Checker,
    Contestant,
    engine_contestant,
    one_line,
    resolve_engine,
    start_states,
)
from kaleido_fast.benchmarking.faults import DeviceLostError, device_answers
from kaleido_fast.benchmarking.machine import describe_run
from kaleido_fast.benchmarking.peers import Peer, Setting, build_peer, forget_compiled
from kaleido_fast.benchmarking.timing import Ratio, Spread, Timed, compare, spread, time_alternating
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.names import ENGINES

ROUNDS = {True: 3, False: 5}  # by quick
CEILING = "ceiling"

Progress = Callable[[float, str], None]
"""Called with the share of the whole that is done and what is being done."""


@dataclass(frozen=True)
class BenchRequest:
    """What to run.

    Args:
        networks: what to time.
        engine: name of an engine, "auto", or "all" for every one that can run here.
        peers: compared with; `skipped` says why others are not.
        precision: of the engines.
        device: where.
        quick: short timings.
        rounds: timings of each contestant.
        n_chains, n_steps: override the table of sizes.
        first_calls: measure first-call cost and peak memory in processes of their own.
    """

    networks: list[BenchNetwork]
    engine: str
    peers: list[Peer]
    skipped: dict[str, str]
    precision: str
    device: torch.device
    quick: bool = False
    rounds: int | None = None
    n_chains: int | None = None
    n_steps: int | None = None
    first_calls: bool = True

    @property
    def n_rounds(self) -> int:
        return self.rounds or ROUNDS[self.quick]


@dataclass(frozen=True)
class Timings:
    """One contestant's raw seconds, with the seconds that building and checking it took in this process."""

    kind: str  # "engine" or "peer"
    seconds: list[float]
    build_seconds: float
    error: float  # the largest, in data units
    error_at: dict[str, int]  # step, chain, dim
    relative_error: float  # norm of all errors over that of the states


@dataclass(frozen=True)
class NetworkResult:
    """All that was measured on one network.

    Args:
        network, size, flops_per_step: the work.
        timings: by contestant.
        ceiling_seconds: raw, of `ceiling.repeats` products.
        skipped: contestants that were not timed, and why.
        first_calls: by engine: {"cold": ..., "cached": ...}.
    """

    network: BenchNetwork
    size: Size
    flops_per_step: int
    precision: str
    timings: dict[str, Timings]
    ceiling_seconds: list[float]
    ceiling_flops: int
    skipped: dict[str, str]
    first_calls: dict[str, dict[str, cold.FirstCall]] = field(default_factory=dict)

    @property
    def chain_steps(self) -> int:
        return self.size.n_chains * self.size.n_steps

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

    ``lost``: what made the device fail, or empty; the networks ``unmeasured`` were left out for that reason.
    """

    results: list[NetworkResult]
    about: dict[str, Any]
    quick: bool
    lost: str = ""
    unmeasured: list[str] = field(default_factory=list)


def run_bench(request: BenchRequest, progress: Progress = lambda share, text: None) -> BenchReport:
    """Time every engine of a request and its peers on every network.

    Raises:
        InputError: an engine asked for by name cannot run here.
        DeviceLostError: the device failed before any network was measured. Later, what was measured is returned.
    """
    about = describe_run(request.device)
    engines, skipped = find_engines(request, request.networks[0].model())
    request = replace(request, skipped={**skipped, **request.skipped})
    results = []
    for i, network in enumerate(request.networks):
        model = network.model().requires_grad_(False).to(request.device)
        part = _Part(progress, i / len(request.networks), 1 / len(request.networks), network.name)
        try:
            results.append(_run_network(request, network, model, engines, part, first=i == 0))
        except DeviceLostError as problem:
            if not results:
                raise
            unmeasured = [left.name for left in request.networks[i:]]
            return BenchReport(results, about, request.quick, str(problem), unmeasured)
        del model
        gc.collect()
    progress(1.0, "done")
    return BenchReport(results, about, request.quick)


def find_engines(request: BenchRequest, model: KaleidoMLP) -> tuple[list[str], dict[str, str]]:
    """Engines to time and, by name, why others cannot run here."""
    if request.engine != "all":
        return [resolve_engine(model, request.engine, request.precision, request.device)], {}
    able, skipped = [], {}
    for name in [name for name in ENGINES if name != "auto"]:
        try:
            able.append(resolve_engine(model, name, request.precision, request.device))
        except InputError as problem:
            skipped[name] = str(problem)
    return able, skipped


@dataclass(frozen=True)
class _Part:
    """The share of the progress bar that belongs to one network."""

    progress: Progress
    begin: float
    length: float
    name: str

    def at(self, share: float, text: str) -> None:
        self.progress(self.begin + self.length * share, f"{self.name}: {text}")


@dataclass(frozen=True)
class _Ready:
    contestant: Contestant
    kind: str
    build_seconds: float
    deviation: Deviation


def _run_network(
    request: BenchRequest, network: BenchNetwork, model: KaleidoMLP, engines: list[str], part: _Part, *, first: bool
) -> NetworkResult:
    size = make_size(
        network,
        model.spec,
        quick=request.quick,
        kind=request.device.type,
        threads=torch.get_num_threads(),
        n_chains=request.n_chains,
        n_steps=request.n_steps,
    )
    cases = [Case(network, model.spec, size, engine, request.precision) for engine in engines]
    first_calls = {}
    for case in cases if request.first_calls else ():
        part.at(0.0, f"first call of {case.engine}")
        first_calls[case.engine] = _first_calls(request, case, cold_too=first or not request.quick)
    forget_compiled(request.peers)
    z0 = start_states(model, size.n_chains, request.device)
    ready, failed = _prepare(request, model, engines, z0, part)
    ready = {name: entry for name, entry in ready.items() if _warms_up(name, entry, z0, failed)}
    runs: dict[str, Timed] = {name: entry.contestant.timed(z0, size.n_steps) for name, entry in ready.items()}
    runs[CEILING] = ceiling.ceiling_run(request.precision, request.device)
    runs[CEILING]()
    total, done = request.n_rounds * len(runs), 0

    def after(name: str, seconds: float) -> None:
        nonlocal done
        done += 1
        part.at(0.4 + 0.6 * done / total, f"timing {name}")

    try:
        seconds = time_alternating(runs, request.n_rounds, synchronise=_synchroniser(request.device), after=after)
    except Exception as problem:
        _refuse_lost("timing", request.device, problem)
        raise
    return NetworkResult(
        network=network,
        size=size,
        flops_per_step=model.spec.flops_per_step,
        precision=request.precision,
        timings={
            name: Timings(r.kind, seconds[name], r.build_seconds, **r.deviation.record()) for name, r in ready.items()
        },
        ceiling_seconds=seconds[CEILING],
        ceiling_flops=ceiling.FLOPS * ceiling.repeats(request.device),
        skipped={**request.skipped, **failed},
        first_calls=first_calls,
    )


def _first_calls(request: BenchRequest, case: Case, *, cold_too: bool) -> dict[str, cold.FirstCall]:
    """First-call figures; a quick run makes the cold start once, for its first network."""
    network = case.network
    task = {
        "name": network.name,
        "network": network.network,
        "path": network.path,
        "n_chains": case.size.n_chains,
        "engine": case.engine,
        "precision": case.precision,
        "device": str(request.device),
        "threads": torch.get_num_threads(),
    }
    if not cold_too:
        return {"cached": cold.measure_first_call(task)}
    cold_start, cached = cold.cold_and_cached(task)
    return {"cold": cold_start, "cached": cached}


def _prepare(
    request: BenchRequest, model: KaleidoMLP, engines: list[str], z0: Tensor, part: _Part
) -> tuple[dict[str, _Ready], dict[str, str]]:
    """Build every contestant and check it against the reference; peers that fail are named with the reason."""
    checker = Checker(model)
    ready: dict[str, _Ready] = {}
    failed: dict[str, str] = {}
    setting = Setting(model, len(z0), request.device, torch.get_num_threads(), request.quick)
    builders: Mapping[str, Callable[[], Contestant]] = {
        **{name: _engine_builder(request, model, name) for name in engines},
        **{peer.name: _peer_builder(peer, setting) for peer in request.peers},
    }
    for i, (name, build) in enumerate(builders.items()):
        part.at(0.05 + 0.35 * i / len(builders), f"checking {name} against the reference")
        began = time.perf_counter()
        try:
            contestant = build()
            built = time.perf_counter() - began
            deviation = checker.check(contestant, z0)
        except Exception as problem:  # of another project's library: any error is a reason to leave it out
            _refuse_lost(name, request.device, problem)
            if name in engines:
                raise
            failed[name] = one_line(problem)
            continue
        ready[name] = _Ready(contestant, "engine" if name in engines else "peer", built, deviation)
    return ready, failed


def _refuse_lost(name: str, device: torch.device, problem: Exception) -> None:
    """Stop if what failed took the device with it: all that follows would fail too, and would be blamed for it."""
    if not device_answers(device):
        raise DeviceLostError(name, problem) from problem


def _engine_builder(request: BenchRequest, model: KaleidoMLP, name: str) -> Callable[[], Contestant]:
    return lambda: engine_contestant(model, name, request.precision, request.device)


def _peer_builder(peer: Peer, setting: Setting) -> Callable[[], Contestant]:
    return lambda: build_peer(peer, setting)


def _warms_up(name: str, entry: _Ready, z0: Tensor, failed: dict[str, str]) -> bool:
    """One step that is not timed, where the check ran something else (``proof``); no peer compiles for a step count."""
    if entry.contestant.proof is None:
        return True
    try:
        entry.contestant.run(z0, 1)
    except Exception as problem:
        _refuse_lost(name, z0.device, problem)
        failed[name] = one_line(problem)
        return False
    return True


def _synchroniser(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None
