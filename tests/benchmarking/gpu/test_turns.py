"""Contestants of the report of a GPU, timed in turns."""

from __future__ import annotations

import time

import pytest
import torch

pytest.importorskip("triton")

from small_bench import CPU

from kaleido_fast.benchmarking import contest
from kaleido_fast.benchmarking.acceptance import measure_deviation
from kaleido_fast.benchmarking.gpu import contestants, subjects, turns, work


def entry(seconds: float, kind: str = "peer") -> contestants.Entry:
    return contestants.Entry(None, kind, "", torch.zeros(1, 1), None, 0.0, 1, seconds)  # type: ignore[arg-type]


def work_on(record: dict, **job) -> work.Work:
    job = {"rounds": 20, "seconds": 10.0, **job}
    return work.Work(job, None, CPU, None, time.monotonic(), record, lambda value: None)  # type: ignore[arg-type]


def test_the_slowest_peers_are_left_out_until_all_rounds_fit():
    record: dict = {"failed": {}}
    entries = {"ours": entry(0.3, "kernel"), "slow": entry(5.0), "slower": entry(7.0), "fast": entry(0.01)}
    turns.keep_within(work_on(record), entries, 10.0)
    assert set(entries) == {"ours", "fast"} and set(record["failed"]) == {"slow", "slower"}
    assert "no time was left for 20 timings" in record["failed"]["slow"]
    turns.keep_within(work_on(record), entries, 0.1)
    assert set(entries) == {"ours"}, "ours is timed whatever it takes, its peers only if there is time"


def test_the_kernel_and_the_call_that_uses_it_are_timed_over_all_steps_too():
    steps: dict[str, list[int]] = {"triton-fp16": [], "fast_sample-fp16": [], "triton-bf16": []}
    entries = {
        name: contestants.Entry(
            contest.Contestant(lambda z0, n, name=name: steps[name].append(n)), "", "", torch.zeros(2, 1), None, 0.0, 7
        )
        for name in steps
    }
    record = {"contestants": {name: {"milliseconds": 1.0, "median": 1e-3} for name in steps}, "failed": {}}
    del record["contestants"]["fast_sample-fp16"]["milliseconds"]
    turns._time_whole_runs(work_on(record, tiny=False), entries)
    assert steps == {"triton-fp16": [300] * 4, "fast_sample-fp16": [300] * 4, "triton-bf16": []}, "one that warms up"
    timed = {name for name, found in record["contestants"].items() if len(found.get("whole_run_seconds", [])) == 3}
    assert timed == {"triton-fp16", "fast_sample-fp16"}


def test_a_contestant_that_fails_in_its_turn_costs_itself_alone():
    record: dict = {"failed": {}, "contestants": {}}
    model = subjects.report_network("points2d", tiny=True)
    z0 = contest.start_states(model, 5, CPU)
    count = iter(range(100))

    def fails_later(z0, n_steps):
        if next(count) == 1:
            raise RuntimeError("out of memory\nby far")
        return z0

    found = measure_deviation(z0, z0, 1)
    entries = {
        name: contestants.Entry(contest.Contestant(run), "peer", "", z0, found, 0.0)
        for name, run in (("a", lambda z0, n: z0), ("late", fails_later), ("b", lambda z0, n: z0))
    }
    at_work = work_on(record, rounds=3)
    at_work.job["n_chains"], at_work.model = 5, model
    turns.time_in_turns(at_work, entries)
    assert record["failed"] == {"late": "out of memory"} and set(record["contestants"]) == {"a", "b"}
    assert all(len(timed["seconds"]) == 3 for timed in record["contestants"].values())
