"""Blocks of chains and tiles of rows."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_fast.planning.blocks import (
    LAUNCHED_CHAINS,
    LAUNCHED_VALUES,
    full_module_tile,
    launch_block,
    launch_wave,
    module_tile,
    smaller_block,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**7), st.integers(1, 200_000), st.sampled_from(["cpu", "cuda"]))
def test_tiles_waste_little_and_are_one_size_for_many_chains(n, dim, kind):
    rows, full = module_tile(n, dim, kind), full_module_tile(dim, kind)
    assert 1 <= rows <= full
    assert -(-n // rows) * rows < 1.25 * n + full / 7, "too many idle rows"
    assert n > 8 or rows == n
    assert n <= 7 * full or rows == full


@given(st.sampled_from([16, 32, 64, 128, 256, 16_384]), st.integers(1, 200), st.integers(1, 100_000))
def test_a_launch_is_of_whole_waves_where_one_fits_and_shrinks_to_a_tile(tile, n_sm, dim):
    wave, rows = launch_wave(tile, n_sm), 16_384
    most = max(rows, min(LAUNCHED_CHAINS, LAUNCHED_VALUES // dim))
    block = launch_block(wave, dim, rows)
    assert 0 < block <= most
    assert block % (wave if wave <= most else rows) == 0
    assert block > most / 2, "waves that are left out would have gone into it"
    while block > rows:
        smaller = smaller_block(block, wave, rows)
        assert rows <= smaller < block or smaller % wave == 0, (block, smaller)
        assert smaller < block
        block = smaller
