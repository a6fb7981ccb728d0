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
from kaleido_fast.benchmarking.gpu.jobs import Emit, Job, precisions_on, report_network
from kaleido_fast.benchmarking.machine import gpu_state
from kaleido_fast.benchmarking.peers import PEERS, Peer, Setting, build_peer, forget_compiled
from kaleido_fast.benchmarking.timing import SETTLE_SECONDS, Timed, spread, stopwatch, time_alternating
from kaleido_fast.benchmarking.tuning import (
    MAX_STEPS,
    FusedRun,
    Measure,
    engine_measure,
    steps_within,
    tune_model,
    write_table,
)
from kaleido_fast.devices import device_facts, table_name, user_data
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.plan import DeviceFacts
from kaleido_fast.versions import library_versions
from kaleido_kernels.tiles import AnyTile, tile_from_json, tile_name

TUNING_SHARE = 0.4  # of a network's time
BUILDING_SHARE = 0.75  # ... until when contestants are built
ANY_ROWS = 4096  # chains of the checks and the first timing of a contestant that takes any number
LATEST_BUILD = 25.0  # seconds in which a peer may look for its best variant
WHOLE_RUNS = 3
TIMING_SHARE = 0.25  # ... that timing has in any case, if it must at the cost of the next networks


@dataclass
class Work:
    """One network on one device, and what is known of it so far."""

    job: Job
    model: KaleidoMLP
    device: torch.device
    facts: DeviceFacts
    began: float
    record: dict[str, Any]

    @property
    def n_chains(self) -> int:
        return int(self.job["n_chains"])

    def left(self, share: float = 1.0) -> float:
        """Seconds until a share of the job's time is over."""
        return self.began + share * self.job["seconds"] - time.monotonic()


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
    """Tune and time one network.

    ``job``: network, tiny, device, quick, n_chains, rounds, seconds (for all of it), timing_seconds (of one timing),
    tiles (by precision, proved), peers (names), tune and time (whether to), keep (whether to write the user's table).
    """
    device = torch.device(job["device"])
    model = report_network(job["network"], job["tiny"]).to(device)
    spec = model.spec
    record: dict[str, Any] = {
        "network": job["network"],
        "widths": spec.widths,
        "n_chains": job["n_chains"],
        "flops_per_step": spec.flops_per_step,
        "tuning": {},
        "contestants": {},
        "failed": {},
        "states": [gpu_state(device)],
    }
    work = Work(job, model, device, device_facts(device), time.monotonic(), record)
    if job["tune"]:
        _tune(work, emit)
    if job["time"]:
        entries = _entries(work, emit)
        _keep_within(work, entries)
        _time(work, entries)
        emit(record)
        _time_whole_runs(work, entries)
    record["states"].append(gpu_state(device))
    emit(record)


def _tune(work: Work, emit: Emit) -> None:
    """The best tile of each precision into the record, the facts, and the table that later processes read."""
    job, record, found = work.job, work.record, []
    for precision in precisions_on(work.device):
        tiles = [tile_from_json(values) for values in job["tiles"].get(precision, ())]
        if precision == "bf16" and "fp16" in record["tuning"]:  # the same instructions at the same speed
            tiles = [tile_from_json(record["tuning"]["fp16"]["best"])]
        measure = _until(
            work,
            engine_measure(work.model, precision, work.device, work.facts, work.n_chains, max(3, job["rounds"] // 2)),
        )
        try:
            entry = tune_model(
                job["network"],
                work.model,
                precision,
                work.device,
                work.facts,
                work.n_chains,
                measure=measure,
                tiles=tiles,
            )
        except Exception as problem:
            record["failed"][f"tuning {precision}"] = one_line(problem)
            continue
        found.append(entry)
        record["tuning"][precision] = {**entry.record(), "explained": entry.explain()}
        work.facts = replace(work.facts, tuned={**work.facts.tuned, entry.key: record["tuning"][precision]["best"]})
        emit(record)
    if job["keep"] and found:
        path = user_data() / "tuned" / table_name(work.facts.name)
        write_table(path, work.facts.name, library_versions("triton")["triton"], found)


def _until(work: Work, measure: Measure) -> Measure:
    def limited(tile: AnyTile) -> list[float]:
        if work.left(TUNING_SHARE) < 0:
            raise InputError("no time was left for it")
        return measure(tile)

    return limited


def _builders(work: Work) -> dict[str, tuple[str, Callable[[], tuple[Contestant, str]]]]:
    """(kind, builder of the contestant and a few words about it) by name: ours first, slow builds last."""
    builders: dict[str, tuple[str, Callable[[], tuple[Contestant, str]]]] = {}
    for precision in precisions_on(work.device):
        builders[f"triton-{precision}"] = ("kernel", partial(_fused, work, precision))
    builders["fast_sample-fp16"] = ("public", partial(_public, work, "fp16"))
    for name in work.job["peers"]:
        builders[name] = ("peer", partial(_peer, work, PEERS[name]))
    return builders


def _fused(work: Work, precision: str) -> tuple[Contestant, str]:
    run = FusedRun(work.model, precision, work.device, work.facts, work.n_chains)
    return Contestant(run, precision=precision), tile_name(run.engine.choice.tile)


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
    left = max(1.0, min(LATEST_BUILD, work.left(BUILDING_SHARE)))
    threads = torch.get_num_threads()
    setting = Setting(work.model, work.n_chains, work.device, threads, work.job["quick"], seconds=left)
    return build_peer(peer, setting), peer.about


def _entries(work: Work, emit: Emit) -> dict[str, Entry]:
    """Contestants that reproduce the reference's states, with the work of one timing; the others' reasons are kept."""
    forget_compiled([PEERS[name] for name in work.job["peers"]])
    all_z0 = start_states(work.model, work.n_chains, work.device)
    expected: dict[str, list[Tensor]] = {}
    entries: dict[str, Entry] = {}
    for name, (kind, build) in _builders(work).items():
        if work.left(BUILDING_SHARE) < 0:
            work.record["failed"][name] = "no time was left for it"
            continue
        try:
            entries[name] = _entry(work, name, kind, build, all_z0, expected)
        except Exception as problem:  # somebody else's library, or a kernel that is wrong: a result too
            work.record["failed"][name] = one_line(problem)
        gc.collect()
        if work.device.type == "cuda":
            torch.cuda.empty_cache()  # plans ask the device, not torch, what is free
        emit(work.record)
    return entries


def _entry(
    work: Work,
    name: str,
    kind: str,
    build: Callable[[], tuple[Contestant, str]],
    all_z0: Tensor,
    expected: dict[str, list[Tensor]],
) -> Entry:
    began = time.perf_counter()
    contestant, about = build()
    built = time.perf_counter() - began
    any_rows = kind == "peer" and PEERS[name].any_rows
    z0 = all_z0[:ANY_ROWS] if any_rows else all_z0
    key = f"{contestant.precision} {sorted(contestant.proof_request.items())} {len(z0)}"
    if key not in expected:
        expected[key] = reference_states(work.model, z0, contestant.precision, **contestant.proof_request)
    deviation = check_contestant(contestant, z0, expected[key], work.model.spec.n_layers)
    entry = Entry(contestant, kind, about, z0, deviation, built)
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


def _keep_within(work: Work, entries: dict[str, Entry]) -> None:
    """Leave out the slowest peers until all rounds fit the time that is left: a median of few timings says little."""
    rounds, left = work.job["rounds"], max(work.left(), TIMING_SHARE * work.job["seconds"])
    while len(entries) > 1 and rounds * sum(entry.seconds + SETTLE_SECONDS for entry in entries.values()) > left:
        peers = [name for name, entry in entries.items() if entry.kind == "peer"]
        slowest = max(peers or entries, key=lambda name: entries[name].seconds)
        work.record["failed"][slowest] = f"no time was left for {rounds} timings of {entries[slowest].seconds:.2g} s"
        del entries[slowest]


def _time(work: Work, entries: Mapping[str, Entry]) -> None:
    runs = {name: _timed(entry) for name, entry in entries.items()}
    try:
        seconds = time_alternating(runs, work.job["rounds"], measure=stopwatch(work.device))
    except Exception as problem:
        work.record["failed"]["timing"] = one_line(problem)
        return
    work.record["contestants"] = {name: _summary(work, entry, seconds[name]) for name, entry in entries.items()}


def _summary(work: Work, entry: Entry, seconds: list[float]) -> dict[str, Any]:
    times = spread(seconds)
    chain_steps = len(entry.z0) * entry.n_steps
    whole = work.n_chains * MAX_STEPS / chain_steps
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
    }


def _time_whole_runs(work: Work, entries: Mapping[str, Entry]) -> None:
    """Our fastest precision over all steps at once, where a timing took fewer: clocks may fall in a longer run."""
    entry, summary = entries.get("triton-fp16"), work.record["contestants"].get("triton-fp16")
    if entry is None or summary is None or entry.n_steps == MAX_STEPS or work.job["tiny"]:
        return
    if (WHOLE_RUNS + 1) * summary["milliseconds"] / 1e3 > work.left():
        return
    entry.n_steps = MAX_STEPS
    watch = stopwatch(work.device)
    summary["whole_run_seconds"] = [watch(_timed(entry)) for _ in range(WHOLE_RUNS)]
