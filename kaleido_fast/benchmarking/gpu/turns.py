"""Contestants timed in turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kaleido_fast.benchmarking.gpu.contestants import Builder, Entry, checked_entries, timed
from kaleido_fast.benchmarking.gpu.work import Work
from kaleido_fast.benchmarking.timing import PAUSE_SECONDS, Timed, spread, stopwatch, time_alternating
from kaleido_fast.benchmarking.tuning import MAX_STEPS, FusedRun, launch_microseconds

WHOLE_RUNS = 3
TIMING = "timing"


def time_group(work: Work, builders: Mapping[str, Builder], build_share: float, timing_share: float) -> None:
    """Build, check and time contestants in turns.

    Args:
        builders: by name.
        build_share: of the job's time, until when a contestant may be begun.
        timing_share: of the job's time that timing has at least.
    """
    entries = checked_entries(work, builders, build_share)
    keep_within(work, entries, max(work.left(), timing_share * work.job["seconds"]))
    work.begin(next(iter(entries)) if len(entries) == 1 else TIMING)
    time_in_turns(work, entries)
    work.begin("")
    _time_whole_runs(work, entries)


def keep_within(work: Work, entries: dict[str, Entry], left: float) -> None:
    """Leave out the slowest peers until all rounds fit ``left`` seconds: a median of few timings says little."""
    rounds = work.job["rounds"]
    while rounds * sum(entry.seconds + PAUSE_SECONDS for entry in entries.values()) > left:
        peers = [name for name, entry in entries.items() if entry.kind == "peer"]
        if not peers:
            return
        slowest = max(peers, key=lambda name: entries[name].seconds)
        work.record["failed"][slowest] = f"no time was left for {rounds} timings of {entries[slowest].seconds:.2g} s"
        del entries[slowest]


def time_in_turns(work: Work, entries: dict[str, Entry]) -> None:
    """Time contestants in turns; one that fails is left out, and the others take their turns again."""
    running = ""

    def turn(name: str) -> Timed:
        def run() -> float:
            nonlocal running
            running = name
            return timed(entries[name])()

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
    scaled = {
        "milliseconds": 1e3 * times.median * whole,
        "flops_per_second": chain_steps * work.model.spec.flops_per_step / times.median,
    }
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
        **({} if entry.kind == "public" else scaled),  # a call has a cost of its own, which more steps do not multiply
        **entry.deviation.record(),
        "build_seconds": entry.build_seconds,
    } | ({"launch_microseconds": launch_microseconds(run)} if isinstance(run, FusedRun) else {})


def _time_whole_runs(work: Work, entries: Mapping[str, Entry]) -> None:
    """Our fastest precision over all steps at once, where a timing took fewer, by itself and as a program calls it.

    Clocks may fall in a longer run.
    """
    kernel = work.record["contestants"].get("triton-fp16")
    for name in ("triton-fp16", "fast_sample-fp16"):
        entry, summary = entries.get(name), work.record["contestants"].get(name)
        if entry is None or summary is None or kernel is None or entry.n_steps == MAX_STEPS or work.job["tiny"]:
            continue
        if (WHOLE_RUNS + 1) * (kernel["milliseconds"] / 1e3 + summary["median"]) > work.left():
            continue
        work.begin(what := f"whole runs of {name}")
        entry.n_steps, watch = MAX_STEPS, stopwatch(work.device)
        try:
            timed(entry)()
            summary["whole_run_seconds"] = [watch(timed(entry)) for _ in range(WHOLE_RUNS)]
        except Exception as problem:
            work.fail(what, problem)
        work.begin("")
