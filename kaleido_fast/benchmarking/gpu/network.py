"""One network of the report: its tiles tuned, then all contestants built, checked and timed in turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kaleido_fast.benchmarking.acceptance import Deviation
from kaleido_fast.benchmarking.contest import (
    Contestant,
    check_contestant,
    one_line,
    reference_states,
    start_states,
)
from kaleido_fast.benchmarking.faults import DeviceLostError, device_answers
from kaleido_fast.benchmarking.gpu.jobs import Emit, Job, precisions_on, report_network
from kaleido_fast.benchmarking.machine import gpu_state
from kaleido_fast.benchmarking.peers import PEERS, Peer, Setting, build_peer, forget_compiled
from kaleido_fast.benchmarking.timing import SETTLE_SECONDS, Timed, spread, stopwatch, time_alternating
from kaleido_fast.benchmarking.tuning import (
    MAX_STEPS,
    FusedRun,
    Measure,
    engine_measure,
    launch_microseconds,
    steps_within,
    tune_model,
    write_table,
)
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.planning.facts import DeviceFacts
from kaleido_fast.running.packed import forget_packed
from kaleido_fast.system.devices import device_facts, table_name
from kaleido_fast.system.folders import user_data
from kaleido_fast.system.versions import library_versions
from kaleido_kernels.tiles import AnyTile, tile_from_json, tile_name

TUNING_SHARE = 0.4  # of a network's time, where timing follows
BUILDING_SHARE = 0.75  # ... until when contestants are built
ANY_ROWS = 4096  # chains of the checks and the first timing of a contestant that takes any number
LATEST_BUILD = 25.0  # seconds in which a peer may look for its best variant
WHOLE_RUNS = 3
TIMING_SHARE = 0.25  # ... that timing has in any case, if it must at the cost of the next networks
TIMING = "timing"
NO_TIME = "no time was left for it"

Builder = Callable[[], tuple[Contestant, str]]
"""Makes a contestant and a few words about it."""


@dataclass
class Work:
    """One network on one device, and what is known of it so far.

    Args:
        job: see `measure_network`.
        record: what is known, also from a process before this one; ``at_work`` in it names what a process that dies
            was doing, ``failed`` what is not begun again.
        emit: hands the record on.
    """

    job: Job
    model: KaleidoMLP
    device: torch.device
    facts: DeviceFacts
    began: float
    record: dict[str, Any]
    emit: Emit

    @property
    def n_chains(self) -> int:
        return int(self.job["n_chains"])

    def left(self, share: float = 1.0) -> float:
        """Seconds until a share of the job's time is over."""
        return self.began + share * self.job["seconds"] - time.monotonic()

    def begin(self, what: str) -> None:
        """Tell what is begun, for whoever finds this process dead; "" when it is done."""
        self.record["at_work"] = what
        self.emit(self.record)

    def fail(self, what: str, problem: BaseException) -> None:
        """Keep why something failed, so that it is not begun again.

        Raises:
            DeviceLostError: this process can do no more; another one shall go on.
        """
        self.record["at_work"] = what
        self.record["failed"][what] = one_line(problem)
        if not device_answers(self.device):
            self.emit(self.record)
            raise DeviceLostError(what, problem) from problem


@dataclass
class Entry:
    """A contestant that may be timed: on ``z0``, for ``n_steps``, about ``seconds`` each time."""

    contestant: Contestant
    kind: str
    about: str
    z0: Tensor
    deviation: Deviation
    build_seconds: float
    n_steps: int = 1
    seconds: float = 0.0


def measure_network(job: Job, emit: Emit) -> None:
    """Tune and time one network: ours and the quick peers first, in turns; then those that take long to build.

    ``job``: network, tiny, device, quick, n_chains, rounds, seconds (for all of it), timing_seconds (of one timing),
    tiles (by precision, proved), peers (names), tune and time (whether to), keep (whether to write the user's table),
    known (the record of a process that was lost to a tile or a contestant; {} at first).

    Raises:
        DeviceLostError: the same job with the record as ``known`` goes on in another process.
    """
    device = torch.device(job["device"])
    forget_packed()  # what an earlier network left
    _release(device)
    model = report_network(job["network"], job["tiny"]).to(device)
    record = {**_new_record(job, model), **job["known"]}
    record["states"].append(gpu_state(device))
    work = Work(job, model, device, device_facts(device), time.monotonic(), record, emit)
    if job["tune"]:
        _tune(work)
    if job["time"]:
        quick, slow = _builders(work)
        if not record["contestants"] and TIMING not in record["failed"]:
            _time_group(work, quick, BUILDING_SHARE, TIMING_SHARE)
        for name, builder in slow.items():  # one by one, and each written before the next: any may be lost
            if name not in record["contestants"]:
                _time_group(work, {name: builder}, 1.0, 0.0)
    record["states"].append(gpu_state(device))
    work.begin("")


def _new_record(job: Job, model: KaleidoMLP) -> dict[str, Any]:
    return {
        "network": job["network"],
        "widths": model.spec.widths,
        "n_chains": job["n_chains"],
        "flops_per_step": model.spec.flops_per_step,
        "at_work": "",
        "trials": {},
        "tuning": {},
        "contestants": {},
        "failed": {},
        "states": [],
    }


def _release(device: torch.device) -> None:
    """Give memory back: plans ask the device, not torch, what is free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _tune(work: Work) -> None:
    """The best tile of each precision into the record, the facts, and the table that later processes read."""
    record = work.record
    for precision in precisions_on(work.device):
        if precision not in record["tuning"] and f"tuning {precision}" not in record["failed"]:
            _tune_precision(work, precision)
        if precision in record["tuning"]:
            entry = record["tuning"][precision]
            work.facts = replace(work.facts, tuned={**work.facts.tuned, entry["key"]: entry["best"]})
    record["trials"] = {}  # they are in the entries
    work.begin("")


def _tune_precision(work: Work, precision: str) -> None:
    job, record = work.job, work.record
    tiles = [tile_from_json(values) for values in job["tiles"].get(precision, ())]
    if precision == "bf16" and "fp16" in record["tuning"]:  # the same instructions at the same speed
        tiles = [tile_from_json(record["tuning"]["fp16"]["best"])]
    rounds = max(3, job["rounds"] // 2)
    measure = engine_measure(work.model, precision, work.device, work.facts, work.n_chains, rounds)
    try:
        entry = tune_model(
            job["network"],
            work.model,
            precision,
            work.device,
            work.facts,
            work.n_chains,
            measure=_until(work, _once(work, precision, measure)),
            tiles=tiles,
        )
    except DeviceLostError:
        raise
    except Exception as problem:
        work.fail(f"tuning {precision}", problem)
        return
    record["tuning"][precision] = {**entry.record(), "explained": entry.explain()}
    if job["keep"]:
        path = user_data() / "tuned" / table_name(work.facts.name)
        write_table(path, work.facts.name, library_versions("triton")["triton"], [entry])


def _once(work: Work, precision: str, measure: Measure) -> Measure:
    """``measure`` that keeps its findings in the record, where a process that goes on after this one has them."""

    def measured(tile: AnyTile) -> list[float]:
        what, trials, failed = f"{precision} {tile}", work.record["trials"], work.record["failed"]
        if what in failed:
            raise InputError(failed[what])
        if what not in trials:
            work.begin(what)
            try:
                trials[what] = measure(tile)
            except Exception as problem:
                work.fail(what, problem)
                raise
        return list(trials[what])

    return measured


def _until(work: Work, measure: Measure) -> Measure:
    def limited(tile: AnyTile) -> list[float]:
        if work.left(TUNING_SHARE if work.job["time"] else 1.0) < 0:
            raise InputError(NO_TIME)
        return measure(tile)

    return limited


def _builders(work: Work) -> tuple[dict[str, Builder], dict[str, Builder]]:
    """Builders of (ours and the quick peers, peers that take long to build) by name."""
    quick: dict[str, Builder] = {f"triton-{name}": partial(_fused, work, name) for name in precisions_on(work.device)}
    quick["fast_sample-fp16"] = partial(_public, work, "fp16")
    slow: dict[str, Builder] = {}
    for name in work.job["peers"]:
        (quick if PEERS[name].in_quick else slow)[name] = partial(_peer, work, PEERS[name])
    return quick, slow


def _kind(name: str) -> str:
    return "peer" if name in PEERS else "public" if name.startswith("fast_sample") else "kernel"


def _fused(work: Work, precision: str) -> tuple[Contestant, str]:
    run = FusedRun(work.model, precision, work.device, work.facts, work.n_chains)
    return Contestant(run, precision=precision), tile_name(run.engine.plan.choice.tile)


def _public(work: Work, precision: str) -> tuple[Contestant, str]:
    from kaleido_fast.sampling import fast_sample

    def run(z0: Tensor, n_steps: int) -> Tensor:
        return fast_sample(
            work.model,
            n_chains=len(z0),
            burn_in=n_steps - 1,
            jitter=0.0,
            tol=None,
            precision=precision,
            engine="triton",
            device=work.device,
            init="uniform",
            seed=0,
        ).final

    return Contestant(run, precision=precision), "fast_sample() as a program calls it"


def _peer(work: Work, peer: Peer) -> tuple[Contestant, str]:
    seconds = max(1.0, min(LATEST_BUILD, work.left()))
    threads = torch.get_num_threads()
    setting = Setting(work.model, work.n_chains, work.device, threads, work.job["quick"], seconds=seconds)
    contestant = build_peer(peer, setting)
    return contestant, ": ".join(filter(None, (peer.about, contestant.about)))


def _time_group(work: Work, builders: Mapping[str, Builder], build_share: float, timing_share: float) -> None:
    """Build, check and time contestants in turns.

    Args:
        builders: by name.
        build_share: of the job's time, until when a contestant may be begun.
        timing_share: of the job's time that timing has at least.
    """
    entries = _entries(work, builders, build_share)
    _keep_within(work, entries, max(work.left(), timing_share * work.job["seconds"]))
    work.begin(next(iter(entries)) if len(entries) == 1 else TIMING)
    _time(work, entries)
    work.begin("")
    _time_whole_runs(work, entries)


def _entries(work: Work, builders: Mapping[str, Builder], share: float) -> dict[str, Entry]:
    """Contestants that reproduce the reference's states, with the work of one timing; the others' reasons are kept."""
    forget_compiled([PEERS[name] for name in builders if name in PEERS])
    all_z0 = start_states(work.model, work.n_chains, work.device)
    expected: dict[str, list[Tensor]] = {}
    entries: dict[str, Entry] = {}
    for name, build in builders.items():
        if name in work.record["failed"]:
            continue
        if work.left(share) < 0:
            work.record["failed"][name] = NO_TIME
            continue
        work.begin(name)
        try:
            entries[name] = _entry(work, name, build, all_z0, expected)
        except Exception as problem:  # somebody else's library, or a kernel that is wrong: a result too
            work.fail(name, problem)
        _release(work.device)
    return entries


def _entry(work: Work, name: str, build: Builder, all_z0: Tensor, expected: dict[str, list[Tensor]]) -> Entry:
    began = time.perf_counter()
    contestant, about = build()
    built = time.perf_counter() - began
    any_rows = name in PEERS and PEERS[name].any_rows
    z0 = all_z0[:ANY_ROWS] if any_rows else all_z0
    key = f"{contestant.precision} {sorted(contestant.proof_request.items())} {len(z0)}"
    if key not in expected:
        expected[key] = reference_states(work.model, z0, contestant.precision, **contestant.proof_request)
    deviation = check_contestant(contestant, z0, expected[key], work.model.spec.n_layers)
    entry = Entry(contestant, _kind(name), about, z0, deviation, built)
    target, watch = work.job["timing_seconds"], stopwatch(work.device)
    if any_rows:
        one_step = watch(_timed(entry)) * work.n_chains / len(z0)
        entry.z0 = all_z0[: max(min(ANY_ROWS, len(all_z0)), int(min(1.0, 5 * target / one_step) * work.n_chains))]

    def steps(n_steps: int) -> float:
        entry.n_steps = n_steps
        return _timed(entry)()

    entry.n_steps = steps_within(steps, target, work.device)
    _timed(entry)()  # whoever compiles for a number of steps has done so now
    entry.seconds = watch(_timed(entry))
    return entry


def _timed(entry: Entry) -> Timed:
    def run() -> float:
        entry.contestant.run(entry.z0, entry.n_steps)
        return entry.contestant.uncounted()

    return run


def _keep_within(work: Work, entries: dict[str, Entry], left: float) -> None:
    """Leave out the slowest peers until all rounds fit ``left`` seconds: a median of few timings says little."""
    rounds = work.job["rounds"]
    while rounds * sum(entry.seconds + SETTLE_SECONDS for entry in entries.values()) > left:
        peers = [name for name, entry in entries.items() if entry.kind == "peer"]
        if not peers:
            return
        slowest = max(peers, key=lambda name: entries[name].seconds)
        work.record["failed"][slowest] = f"no time was left for {rounds} timings of {entries[slowest].seconds:.2g} s"
        del entries[slowest]


def _time(work: Work, entries: dict[str, Entry]) -> None:
    """Time contestants in turns; one that fails is left out, and the others take their turns again."""
    running = ""

    def turn(name: str) -> Timed:
        def run() -> float:
            nonlocal running
            running = name
            return _timed(entries[name])()

        return run

    while entries:
        runs = {name: turn(name) for name in entries}
        try:
            seconds = time_alternating(runs, work.job["rounds"], measure=stopwatch(work.device))
        except Exception as problem:
            work.fail(running, problem)
            del entries[running]
            continue
        work.record["contestants"] |= {name: _summary(work, entry, seconds[name]) for name, entry in entries.items()}
        return


def _summary(work: Work, entry: Entry, seconds: list[float]) -> dict[str, Any]:
    times = spread(seconds)
    chain_steps = len(entry.z0) * entry.n_steps
    whole, run = work.n_chains * MAX_STEPS / chain_steps, entry.contestant.run
    return {
        "kind": entry.kind,
        "about": entry.about,
        "precision": entry.contestant.precision,
        "n_chains": len(entry.z0),
        "n_steps": entry.n_steps,
        "seconds": seconds,
        "median": times.median,
        "p20": times.p20,
        "p80": times.p80,
        "milliseconds": 1e3 * times.median * whole,
        "flops_per_second": chain_steps * work.model.spec.flops_per_step / times.median,
        **entry.deviation.record(),
        "build_seconds": entry.build_seconds,
    } | ({"launch_microseconds": launch_microseconds(run)} if isinstance(run, FusedRun) else {})


def _time_whole_runs(work: Work, entries: Mapping[str, Entry]) -> None:
    """Our fastest precision over all steps at once, where a timing took fewer: clocks may fall in a longer run."""
    entry, summary = entries.get("triton-fp16"), work.record["contestants"].get("triton-fp16")
    if entry is None or summary is None or entry.n_steps == MAX_STEPS or work.job["tiny"]:
        return
    if (WHOLE_RUNS + 1) * summary["milliseconds"] / 1e3 > work.left():
        return
    what, watch = "whole runs of triton-fp16", stopwatch(work.device)
    work.begin(what)
    entry.n_steps = MAX_STEPS
    try:
        summary["whole_run_seconds"] = [watch(_timed(entry)) for _ in range(WHOLE_RUNS)]
    except Exception as problem:
        work.fail(what, problem)
    work.begin("")
