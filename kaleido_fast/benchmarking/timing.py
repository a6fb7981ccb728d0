"""Timing in alternating order, and what may be said about two sets of timings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

# Thread pools of BLAS and inference libraries keep their threads spinning for some milliseconds after a call, which
# would be charged to the contestant that runs next.
PAUSE_SECONDS = 0.03

Timed = Callable[[], float]
"""Does the work; returns the seconds of it that do not count (packing, reported apart)."""


@dataclass(frozen=True)
class Spread:
    """Median and 20 % and 80 % quantiles of some timings, in seconds."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Ratio:
    """How many times faster one contestant is than another; a tie if the spread of their timings covers 1."""

    value: float
    low: float
    high: float

    @property
    def tie(self) -> bool:
        return self.low <= 1.0 <= self.high


def quantile(values: Sequence[float], share: float) -> float:
    """Quantile with linear interpolation between neighbours."""
    if not values:
        raise ValueError("quantile of no timings: time at least one round")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(seconds: Sequence[float]) -> Spread:
    """Summary of raw timings."""
    return Spread(quantile(seconds, 0.5), quantile(seconds, 0.2), quantile(seconds, 0.8))


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Speed of ``ours`` over ``theirs`` from seconds for the same work; bounds from the far ends of both spreads."""
    a, b = spread(ours), spread(theirs)
    value = b.median / a.median
    if min(len(ours), len(theirs)) < 2:  # a single timing has no spread: nothing can be told apart
        return Ratio(value, min(value, 1.0), max(value, 1.0))
    return Ratio(value, b.p20 / a.p80, b.p80 / a.p20)


def turn_order(names: Sequence[str], round_number: int) -> list[str]:
    """Order of one round: every second one runs backwards, so that a drift of the machine's clock falls on all alike.

    The starting place moves on by one every two rounds, so that none is always first.
    """
    shift = (round_number // 2) % max(1, len(names))
    order = [*names[shift:], *names[:shift]]
    return order[::-1] if round_number % 2 else order


def time_alternating(
    runs: Mapping[str, Timed],
    rounds: int,
    *,
    synchronise: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    pause: Callable[[float], None] = time.sleep,
    after: Callable[[str, float], None] = lambda name, seconds: None,
    measure: Callable[[Timed], float] | None = None,
) -> dict[str, list[float]]:
    """Time every run once a round.

    Args:
        runs: work by name, already warmed up.
        rounds: timings of each.
        synchronise: waits until the device is idle; called before the clock is read.
        clock, pause: replaced in tests.
        after: called with name and seconds of each timing.
        measure: takes the time of one run, such as a `stopwatch`, in place of ``synchronise`` and ``clock``.

    Returns:
        Raw seconds by name, in order of rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds):
        for name in turn_order(list(runs), round_number):
            pause(PAUSE_SECONDS)
            if measure is not None:
                seconds[name].append(measure(runs[name]))
            else:
                synchronise()
                began = clock()
                uncounted = runs[name]()
                synchronise()
                seconds[name].append(clock() - began - uncounted)
            after(name, seconds[name][-1])
    return seconds


def stopwatch(device: torch.device) -> Callable[[Timed], float]:
    """Takes the seconds of one run: by CUDA events on a GPU, by the clock elsewhere.

    Events are recorded on the current stream, so that gaps in which the GPU waits for the host count.
    """

    def by_events(run: Timed) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        uncounted = run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 - uncounted

    def by_clock(run: Timed) -> float:
        began = time.perf_counter()
        uncounted = run()
        return time.perf_counter() - began - uncounted

    return by_events if device.type == "cuda" else by_clock
