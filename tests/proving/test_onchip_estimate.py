"""The cost model of activations that stay on the chip: laws, limits that are known by hand, and what was measured."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kaleido_kernels.onchip.plan import OnchipTile
from kaleido_kernels.proving.roofline.gpu import FAST
from kaleido_kernels.proving.roofline.onchip import (
    ISSUE,
    RELEASE,
    TILE_BYTES,
    Part,
    onchip_estimate,
    onchip_parts,
    step_cycles,
)
from kaleido_kernels.shapes import NETWORKS, NetShape

MEASURED = {
    ("digits", "fp16", OnchipTile(4, 64, True)): 25.1,
    ("mnist", "fp16", OnchipTile(3)): 302.2,
    ("digits", "fp16x3", OnchipTile(3)): 79.0,
    ("deep128", "fp16", OnchipTile(4, 128, True)): 12.24,
    ("deep128", "fp16x3", OnchipTile(3, 128)): 33.4,
}
"""Milliseconds of 100,000 chains x 300 steps on an H200 that had been busy, by network, precision and tile."""
FASTER = (("deep128", "fp16x3", OnchipTile(3, 128)),)
"""Faster than the fast end of the model's range, by 2 %."""
TILE = 64 * 64 * 256.0
SLACK = 1.005
"""Groups that take turns may meet a little better by chance where something is slower."""


def cycles(parts, slots=3, l2=24.0, fma=2048.0, latency=900.0) -> float:
    return step_cycles(parts, slots, l2_per_cycle=l2, fma_per_cycle=fma, latency=latency)


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_what_was_measured_is_near_the_middle_of_the_range(case):
    """Within 20 %: nothing of the model was fitted to these times. The range itself holds all but one."""
    name, precision, tile = case
    guess = onchip_estimate(NETWORKS[name], tile, precision, 100_000, 300)
    assert guess.milliseconds == pytest.approx(MEASURED[case], rel=0.2)
    inside = guess.low.milliseconds <= MEASURED[case] <= guess.high.milliseconds
    assert inside == (case not in FASTER), (guess.low.milliseconds, guess.high.milliseconds)


@pytest.mark.parametrize("name", ["digits", "mnist"])
@pytest.mark.parametrize("l2", [12.0, 24.0, 37.0])
def test_more_slots_are_never_slower(name, l2):
    times = [cycles(onchip_parts(NETWORKS[name], OnchipTile(3), "fp16"), slots, l2) for slots in range(1, 7)]
    assert all(more <= fewer * SLACK for fewer, more in pairwise(times)), times
    assert times[1] < times[0], "one slot is copied to or multiplied, never both"


@pytest.mark.parametrize("slots", [2, 3, 5])
@pytest.mark.parametrize(
    "rates",
    [
        [{"l2": value} for value in (8.0, 16.0, 24.0, 37.0, 64.0)],
        [{"fma": value} for value in (1024.0, 1469.0, 1705.0, 2048.0, 4096.0)],
        [{"latency": value} for value in (2000.0, 900.0, 500.0, 0.0)],
    ],
    ids=["l2", "tensor", "latency"],
)
def test_higher_rates_and_shorter_waits_are_never_slower(rates, slots):
    times = [cycles(onchip_parts(NETWORKS["mnist"], OnchipTile(3), "fp16"), slots, **rate) for rate in rates]
    assert all(better <= worse * SLACK for worse, better in pairwise(times)), times
    assert times[-1] < times[0]


def test_more_layers_wider_states_and_longer_epilogues_are_slower():
    def time(dim, hidden, layers, precision="fp16"):
        return cycles(onchip_parts(NetShape((dim, *[hidden] * (layers - 1), dim)), OnchipTile(3), precision))

    assert time(64, 256, 4) < time(64, 256, 6) < time(64, 256, 12) < time(64, 512, 12)
    assert time(64, 256, 6) < time(128, 256, 6) < time(129, 256, 6) < time(300, 256, 6)
    assert time(64, 256, 6) < time(64, 256, 6, "fp16x3")
    short, long = (cycles([Part(4, TILE, epilogue)] * 5) for epilogue in (100.0, 30_000.0))
    assert short < long


def test_without_waits_the_tensor_cores_are_the_limit():
    parts = [Part(40, TILE, 0.0)] * 3
    busy = 2 * 3 * 40 * TILE / 2048
    found = cycles(parts, slots=8, l2=1e9, latency=0.0)
    assert busy <= found <= busy * 1.02
    assert cycles(parts, slots=8, l2=1e9, latency=0.0, fma=1024.0) == pytest.approx(2 * busy, rel=0.02)


def test_without_products_the_bytes_are_the_limit():
    assert cycles([Part(30, 1.0, 0.0)], slots=8, l2=10.0) == pytest.approx(30 * TILE_BYTES / 10.0, rel=0.02)
    beside = cycles([Part(30, 1.0, 0.0, beside=16_384.0)], slots=16, l2=10.0)
    assert beside == pytest.approx(30 * (TILE_BYTES + 16_384) / 10.0 + 900.0, rel=0.05), "and a wait for the inputs"


def test_with_one_slot_everything_runs_one_after_the_other():
    """Copy, both groups' products, and the way back to the copy: for each tile."""
    one = 900.0 + TILE_BYTES / 24.0 + ISSUE + 2 * TILE / 2048 + RELEASE
    assert cycles([Part(10, TILE, 0.0)], slots=1) == pytest.approx(10 * one, rel=0.02)


def test_an_epilogue_costs_its_length_at_most():
    parts = [Part(4, TILE, 1500.0)] * 6
    busy = 2 * 6 * 4 * TILE / 2048
    found = cycles(parts, slots=6, l2=1e9, latency=0.0)
    assert busy < found <= busy + 6 * (1500 + ISSUE)


def test_parts_of_a_step_are_the_networks_layers():
    digits, split, mnist = (
        onchip_parts(NETWORKS[name], OnchipTile(3), precision)
        for name, precision in (("digits", "fp16"), ("digits", "fp16x3"), ("mnist", "fp16"))
    )
    assert [part.tiles for part in digits] == [1, 4, 4, 4, 4, 1]
    assert sum(part.tiles * part.fma for part in split) == 3 * sum(part.tiles * part.fma for part in digits)
    assert [part.tiles for part in mnist] == [13, 13, *[8] * 18, *[4] * 7]
    assert [part.beside for part in mnist[:3]] == [16_384, 16_384, 0]
    assert 2 * sum(part.tiles * part.fma for part in mnist) / 2048 == 202_752, "tensor cycles of a step"


def test_an_estimate_says_what_limits_it_and_counts_whole_rounds():
    guess = onchip_estimate(NETWORKS["digits"], OnchipTile(5), "fp16", 100_000, 300)
    assert guess.tile_rounds == 6 and set(guess.low.cycles) == {"tensor", "l2", "chain"}
    assert onchip_estimate(NETWORKS["digits"], OnchipTile(5), "fp16", 101_376, 300).milliseconds == guess.milliseconds
    more = onchip_estimate(NETWORKS["digits"], OnchipTile(5), "fp16", 101_377, 300)
    assert more.milliseconds == pytest.approx(guess.milliseconds * 7 / 6, rel=0.01)
    assert guess.low.gpu is FAST and guess.overlap is not None and guess.overlap.ahead == 4
    assert guess.to_json()["note"] == "model, not a measurement"
    assert 0.5 < guess.high.peak_share < guess.low.peak_share < 1


def test_a_ring_without_slots_is_refused():
    with pytest.raises(ValueError, match="slots is 0"):
        cycles([Part(4, TILE, 0.0)], slots=0)
