"""Tiles and units of the CPU engine: whole register blocks, work for every thread, memory as planned."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from kaleido_fast.planning.cpu_tiles import (
    steps_per_call,
    team_members,
    tile_chains,
    unit_chains,
    working_threads,
)
from kaleido_fast.presets import NETWORKS


def test_tiles_are_whole_register_blocks_and_small_runs_occupy_all_threads():
    for shape in NETWORKS.values():
        assert tile_chains(shape.widths, 32) == (256 if shape.hidden > 1024 else 128)
    assert tile_chains((2, 2**20, 2), 32) == 32
    assert [tile_chains((8, 8), 32, n, 4) for n in (1, 128, 129, 10_000)] == [32, 32, 64, 128]


def test_threads_share_a_small_run_evenly():
    """Measured on 592 chains of 15 layers up to 1,955 wide: 113 to 138 GFLOP/s on one core, 181 to 296 on two."""
    wide = (1536, 1955, 1536)
    assert tile_chains(wide, 32, 592) == 160, "4 x 160 places for 592 chains, not 3 x 256"
    assert tile_chains(wide, 32, 592, 2) == 160, "two tiles for each, not two for one and one for the other"
    assert tile_chains(wide, 32, 512, 2) == 256
    assert tile_chains(wide, 32, 100_000, 2) >= 224
    assert tile_chains((2, 50, 2), 32, 100_000, 2) == 128


@given(
    n=st.integers(1, 10**6),
    width=st.sampled_from([8, 1025]),
    lanes=st.sampled_from([8, 32]),
    threads=st.integers(1, 64),
)
def test_no_thread_waits_longer_than_with_full_tiles(n, width, lanes, threads):
    widths = (width, width)
    tile, full = tile_chains(widths, lanes, n, threads), tile_chains(widths, lanes)

    def longest(tile: int) -> int:
        return math.ceil(n / (tile * threads)) * tile

    assert tile % lanes == 0 and lanes <= tile <= full
    assert longest(tile) <= longest(full)
    assert longest(tile) >= n / threads


@given(
    n=st.integers(1, 10**6), tile=st.sampled_from([16, 128]), threads=st.integers(1, 64), flops=st.integers(1, 10**15)
)
def test_units_are_whole_tiles_and_calls_make_progress(n, tile, threads, flops):
    unit = unit_chains(n, tile, threads, flops)
    assert unit % tile == 0 and unit >= tile
    assert unit == tile or unit * threads <= n + tile * threads, "no thread is left without work"
    assert steps_per_call(flops, unit) >= 1


@given(n=st.integers(1, 10**6), threads=st.integers(1, 64), steps=st.integers(1, 300))
def test_units_shrink_towards_the_end_and_are_not_many(n, threads, steps):
    units, left = [], n
    while left > 0:
        units.append(unit_chains(left, 128, threads, 25_300 * steps))
        left -= units[-1]
    assert units == sorted(units, reverse=True)
    assert len(units) <= 1 + n * 25_300 * steps / 2e9 + 2 * threads * (2 + math.log2(1 + n))


def test_little_work_is_not_divided():
    tiny, wide = (7, 31, 7), (784, 500, 784)
    assert working_threads(tiny, 408 * 20, 64) == 1
    assert working_threads(tiny, 408 * 200, 2) == 2
    assert working_threads(tiny, 408 * 2000, 64) > working_threads(tiny, 408 * 200, 64)
    assert working_threads(wide, 1, 64) == 1
    assert working_threads(wide, 10_000, 64) == 64
    assert working_threads((1, 1), 10**9, 3) == 3
    assert working_threads((1, 1), 0, 3) == 1, "a call that makes start noise alone"


def test_a_team_shares_wide_layers_of_few_chains():
    wide, narrow = (2016,) * 5, (100,) * 9
    assert [team_members(wide, 32, 8, n, 2) for n in (1, 2, 8, 9, 16, 17, 32, 33, 200)] == [2, 2, 2, 1, 1, 2, 2, 1, 1]
    assert [team_members(wide, 32, 8, n, 16) for n in (1, 100, 256, 257)] == [16, 16, 16, 1]
    assert team_members(wide, 32, 8, 4, 1) == 1
    assert team_members(narrow, 32, 8, 4, 2) == 1, "layers of a microsecond are not worth meeting for"
    assert team_members((504,) * 5, 32, 8, 1, 16) == 7, "each member has some microseconds of a layer"
