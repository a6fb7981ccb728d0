"""A whole benchmark: contestants checked and timed in turns, first calls apart."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kaleido_fast.benchmarking import busy, cold
from kaleido_fast.benchmarking.cases import SHORTEST_SECONDS, BenchNetwork, make_size, steps_for
from kaleido_fast.benchmarking.child import return_memory
from kaleido_fast.benchmarking.contest import References, one_line, resolve_engine, start_states
from kaleido_fast.benchmarking.crew import PATIENCE, Crew
from kaleido_fast.benchmarking.faults import DeviceLostError
from kaleido_fast.benchmarking.host import CEILING, Built, Entry, Work
from kaleido_fast.benchmarking.machine import describe_run
from kaleido_fast.benchmarking.peers import Peer, same_bits
from kaleido_fast.benchmarking.results import BenchReport, NetworkResult, Timings
from kaleido_fast.benchmarking.timing import Timed, time_alternating
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.names import ENGINES

ROUNDS = {True: 3, False: 5}  # by quick

ANY_ROWS = 8192  # checked of a contestant that does not know how many chains there will be

Progress = Callable[[float, str], None]
"""Called with the share of the whole that is done and what is being done."""


@dataclass(frozen=True)
class BenchRequest:
    """What to run.

    Args:
        networks: what to time.
        engine: name of an engine, "auto", or "all" for every one that can run here.
        peers: compared with; `skipped` says why others are not.
        precisions: of the engines, each with the peers that have operands of as many bits.
        device: where.
        quick: short timings.
        rounds: timings of each contestant.
        n_chains, n_steps: override the table of sizes.
        first_calls: measure first-call cost and peak memory in processes of their own; a quick run does so for its
            first network.
        busy: measure on a busy machine too.
        apart: whether each contestant has a process of its own; None for yes on a CPU.
    """

    networks: list[BenchNetwork]
    engine: str
    peers: list[Peer]
    skipped: dict[str, str]
    precisions: list[str]
    device: torch.device
    quick: bool = False
    rounds: int | None = None
    n_chains: int | None = None
    n_steps: int | None = None
    first_calls: bool = True
    busy: bool = False
    apart: bool | None = None

    @property
    def n_rounds(self) -> int:
        return self.rounds or ROUNDS[self.quick]

    @property
    def in_processes(self) -> bool:
        return self.device.type == "cpu" if self.apart is None else self.apart


@dataclass(frozen=True)
class _Contest:
    """One network in one precision."""

    network: BenchNetwork
    precision: str
    engines: list[str]
    skipped: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.network.name} in {self.precision}"


def run_bench(request: BenchRequest, progress: Progress = lambda share, text: None) -> BenchReport:
    """Time every engine of a request and its peers on every network.

    Raises:
        InputError: an engine asked for by name cannot run here, none could be timed, or the machine is busy.
        DeviceLostError: the device failed before any network was measured. Later, what was measured is returned.
    """
    about, contests = describe_run(request.device), _contests(request)
    if request.device.type == "cpu":
        about["machine"]["others_share"] = busy.share_now()
        if not request.busy:
            busy.refuse_busy(about["machine"]["others_share"])
    report = BenchReport([], about, request.quick)
    engines = [name for contest in contests for name in contest.engines]
    names = dict.fromkeys([CEILING, *engines, *(peer.name for peer in request.peers)])
    with Crew(request.device, apart=request.in_processes, patience=PATIENCE[request.quick]) as crew:
        progress(0.0, "starting processes")
        crew.start(names)
        for i, contest in enumerate(contests):
            part = _Part(progress, i / len(contests), 1 / len(contests), contest.name)
            try:
                result = _Run(request, contest, crew, part).measure(cold_too=i == 0 or not request.quick)
            except DeviceLostError as problem:
                if not report.results:
                    raise
                return replace(report, lost=str(problem), unmeasured=[left.name for left in contests[i:]])
            if result.timings:
                report.results.append(result)
            lost = [name for name in contest.engines if name not in result.timings]
            report.failures.extend(f"{name} on {contest.name}: {result.skipped[name]}" for name in lost)
            crew.forget()
            gc.collect()
    if not report.results:
        raise InputError(f"nothing could be timed: {'; '.join(report.failures)}")
    progress(1.0, "done")
    return report


def _contests(request: BenchRequest) -> list[_Contest]:
    """Networks in the order asked for, each in all precisions."""
    model = request.networks[0].model()
    found = {precision: find_engines(request, model, precision) for precision in request.precisions}
    return [_Contest(network, precision, *found[precision]) for network in request.networks for precision in found]


def find_engines(request: BenchRequest, model: KaleidoMLP, precision: str) -> tuple[list[str], dict[str, str]]:
    """Engines to time in a precision and, by name, why others cannot run here."""
    if request.engine != "all":
        return [resolve_engine(model, request.engine, precision, request.device)], {}
    able, skipped = [], {}
    for name in [name for name in ENGINES if name != "auto"]:
        try:
            able.append(resolve_engine(model, name, precision, request.device))
        except InputError as problem:
            skipped[name] = str(problem)
    return able, skipped


@dataclass(frozen=True)
class _Part:
    """The share of the progress bar that belongs to one contest."""

    progress: Progress
    begin: float
    length: float
    name: str

    def at(self, share: float, text: str) -> None:
        self.progress(self.begin + self.length * share, f"{self.name}: {text}")


@dataclass(frozen=True)
class _Ready:
    entry: Entry
    built: Built
    deviation: dict[str, Any]


class _Run:
    """One contest: who is ready for it, and who has failed."""

    def __init__(self, request: BenchRequest, contest: _Contest, crew: Crew, part: _Part) -> None:
        self.request, self.contest, self.crew, self.part = request, contest, crew, part
        self.model: KaleidoMLP | None = contest.network.model().requires_grad_(False).to(request.device)
        self.failed: dict[str, str] = {}

    def measure(self, *, cold_too: bool) -> NetworkResult:
        """First calls, checks, then timings in turns."""
        assert self.model is not None, "a run measures once"
        request, spec, network = self.request, self.model.spec, self.contest.network
        n_chains, n_steps = make_size(
            network,
            spec,
            quick=request.quick,
            kind=request.device.type,
            n_chains=request.n_chains,
            n_steps=request.n_steps,
        )
        told = request.first_calls and (cold_too or not request.quick)
        first_calls = self._first_calls(n_chains, cold_too=cold_too) if told else {}
        ready = self._prepare(self.model, n_chains)
        if request.in_processes:  # each has its own by now
            self.model = None
            return_memory()
        n_steps = n_steps or self._find_steps(ready)
        before = busy.read(self.crew.pids())
        seconds = self._time(ready, n_steps)
        after = busy.read(self.crew.pids())
        timed = {name: one for name, one in ready.items() if name not in self.failed}
        ceiling = timed.pop(CEILING)
        on_cpu = request.device.type == "cpu"
        return NetworkResult(
            network=network,
            n_chains=n_chains,
            n_steps=n_steps,
            flops_per_step=spec.flops_per_step,
            precision=self.contest.precision,
            timings={
                name: Timings(one.entry.kind, seconds[name], one.built.seconds, **one.deviation)
                for name, one in timed.items()
            },
            ceiling_seconds=seconds[CEILING],
            ceiling_flops=ceiling.built.flops,
            skipped={**self.contest.skipped, **request.skipped, **self.failed},
            others_share=busy.others_share(before, after, len(busy.allowed_cores())) if on_cpu else None,
            first_calls=first_calls,
        )

    def _first_calls(self, n_chains: int, *, cold_too: bool) -> dict[str, dict[str, cold.FirstCall]]:
        """First-call figures by engine; a quick run makes the cold start once, for its first contest."""
        network, found = self.contest.network, {}
        for engine in self.contest.engines:
            self.part.at(0.0, f"first call of {engine}")
            task = {
                "name": network.name,
                "network": network.network,
                "path": network.path,
                "n_chains": n_chains,
                "engine": engine,
                "precision": self.contest.precision,
                "device": str(self.request.device),
                "threads": torch.get_num_threads(),
            }
            if cold_too:
                cold_start, cached = cold.cold_and_cached(task)
                found[engine] = {"cold": cold_start, "cached": cached}
            else:
                found[engine] = {"cached": cold.measure_first_call(task)}
        return found

    def _prepare(self, model: KaleidoMLP, n_chains: int) -> dict[str, _Ready]:
        """Build every contestant and check it against the reference; those that fail are named with the reason."""
        request, precision = self.request, self.contest.precision
        z0 = start_states(model, n_chains, request.device)
        references = References(model, z0)
        work = Work(self.contest.network, n_chains, str(request.device), torch.get_num_threads(), request.quick)
        entries = [Entry(CEILING, precision)]
        entries += [Entry(name, precision) for name in self.contest.engines]
        peers = [peer for peer in request.peers if same_bits(peer.precision, precision)]
        entries += [Entry(peer.name, peer.precision, peer) for peer in peers]
        ready = {}
        for i, entry in enumerate(entries):
            self.part.at(0.05 + 0.35 * i / len(entries), f"checking {entry.name} against the reference")
            try:
                ready[entry.name] = self._make_ready(entry, work, z0, references)
            except Exception as problem:  # of another project's library: any error is a reason to leave it out
                self._leave_out(entry.name, problem)
        return ready

    def _make_ready(self, entry: Entry, work: Work, z0: Tensor, references: References) -> _Ready:
        holder = self.crew.holder(entry.name, self.model)
        built = holder.build(entry, work)
        if entry.kind == CEILING:
            return _Ready(entry, built, {})
        rows = min(len(z0), ANY_ROWS) if entry.peer and entry.peer.any_rows else len(z0)
        expected = references.states(built.precision, built.proof_request, rows)
        return _Ready(entry, built, holder.check(z0, expected))

    def _leave_out(self, name: str, problem: Exception) -> None:
        """Note why one is not timed; the others go on."""
        self.crew.blame(name, problem)
        if name == CEILING:
            raise InputError(f"the large matrix product failed: {one_line(problem)}") from problem
        self.failed[name] = one_line(problem)

    def _find_steps(self, ready: dict[str, _Ready]) -> int:
        """Steps of a timing, from some of an engine, or of a peer where no engine is left."""
        kinds = {name: one.entry.kind for name, one in ready.items() if name != CEILING}
        for name in sorted(kinds, key=lambda name: kinds[name] != "engine"):
            seconds = self._seconds(name, 2)
            a_step = seconds / 2
            if seconds < SHORTEST_SECONDS:  # what a call takes besides is no part of a step
                a_step = max(0.0, self._seconds(name, 22) - seconds) / 20
            if not math.isnan(a_step):
                return steps_for(a_step, quick=self.request.quick)
        return 1

    def _seconds(self, name: str, n_steps: int) -> float:
        """Seconds of a contestant's timing; NaN where it failed, now or before."""
        if name in self.failed:
            return math.nan
        try:
            return self.crew.holder(name, self.model).time(n_steps)
        except Exception as problem:
            self._leave_out(name, problem)
            return math.nan

    def _time(self, ready: dict[str, _Ready], n_steps: int) -> dict[str, list[float]]:
        """Raw seconds by name, of contestants and of the ceiling."""
        total, done = self.request.n_rounds * len(ready), 0

        def turn(name: str) -> Timed:
            def run() -> float:
                nonlocal done
                self.part.at(0.4 + 0.6 * done / total, f"timing {name}")
                done += 1
                return self._seconds(name, n_steps)

            return run

        runs = {name: turn(name) for name in ready}
        return time_alternating(runs, self.request.n_rounds, measure=lambda run: run())
