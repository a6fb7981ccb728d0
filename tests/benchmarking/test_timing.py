"""Timing with a clock of our own: order, what counts, spreads and ties. No speed is asserted."""

from __future__ import annotations

import pytest

from kaleido_fast.benchmarking import timing


class Clock:
    """Time that passes only when somebody works or waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def work(self, name: str, seconds: float, uncounted: float = 0.0):
        def run() -> float:
            self.order.append(name)
            self.now += seconds + uncounted
            return uncounted

        return run

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds


def test_contestants_take_turns_forwards_and_backwards_and_nobody_is_always_first():
    clock = Clock()
    runs = {name: clock.work(name, 1.0) for name in "abc"}
    timing.time_alternating(runs, 4, clock=clock, pause=clock.pause)
    assert "".join(clock.order) == "abccba" + "bcaacb"


def test_seconds_hold_the_work_and_neither_pauses_nor_packing():
    clock, told = Clock(), []
    runs = {"engine": clock.work("engine", 2.0, uncounted=5.0), "peer": clock.work("peer", 3.0)}
    seconds = timing.time_alternating(
        runs, 3, clock=clock, pause=clock.pause, after=lambda name, value: told.append((name, value))
    )
    assert seconds == {"engine": [pytest.approx(2.0)] * 3, "peer": [pytest.approx(3.0)] * 3}
    assert len(told) == 6


def test_the_device_is_waited_for_before_and_after_the_work():
    clock, queued = Clock(), []

    def launch() -> float:
        queued.append(4.0)  # asynchronous: the work is done when somebody waits
        return 0.0

    def synchronise() -> None:
        clock.now += sum(queued)
        queued.clear()

    seconds = timing.time_alternating(
        {"gpu": launch}, 2, clock=clock, pause=lambda _: queued.append(9.0), synchronise=synchronise
    )
    assert seconds["gpu"] == [4.0, 4.0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], (3, 3, 3)), ([4.0, 1.0, 3.0, 2.0, 5.0], (3, 1.8, 4.2)), ([1.0, 2.0], (1.5, 1.2, 1.8))],
)
def test_spread_is_median_and_quantiles(values, expected):
    got = timing.spread(values)
    assert (got.median, got.p20, got.p80) == pytest.approx(expected)


def test_ratio_within_the_spread_is_a_tie():
    clear = timing.compare([1.0, 1.1, 0.9], [2.0, 2.2, 1.8])
    assert clear.value == pytest.approx(2.0)
    assert not clear.tie
    assert timing.compare([1.0, 1.3, 0.8], [1.1, 1.2, 0.9]).tie
    slower = timing.compare([2.0, 2.1], [1.0, 1.1])
    assert slower.value < 1 and not slower.tie
    assert timing.compare([1.0], [9.0]).tie, "one timing has no spread"
    with pytest.raises(ValueError, match="at least one round"):
        timing.spread([])
