"""Blocks of chains and tiles of rows."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_fast.planning.blocks import full_module_tile, module_tile


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**7), st.integers(1, 200_000), st.sampled_from(["cpu", "cuda"]))
def test_tiles_waste_little_and_are_one_size_for_many_chains(n, dim, kind):
    rows, full = module_tile(n, dim, kind), full_module_tile(dim, kind)
    assert 1 <= rows <= full
    assert -(-n // rows) * rows < 1.25 * n + full / 7, "too many idle rows"
    assert n > 8 or rows == n
    assert n <= 7 * full or rows == full
