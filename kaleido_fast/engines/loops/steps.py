"""All steps of all layers for tiles of chains."""

from __future__ import annotations

import numpy as np

from kaleido_fast.engines.loops.amx import configure_tiles, release_tiles
from kaleido_fast.engines.loops.arrays import NORMAL, RESTART, START_NORMAL, START_UNIFORM, UNIFORM, UPSTREAM
from kaleido_fast.engines.loops.compiling import entry, inner, pasted, wide_vectors
from kaleido_fast.engines.loops.dense import dense_network
from kaleido_fast.engines.loops.noise import add_noise
from kaleido_fast.engines.loops.processor import LANES
from kaleido_fast.engines.loops.scalars import ZERO, fma
from kaleido_fast.engines.loops.team import join_team, leads, meet, share_of
from kaleido_fast.engines.loops.tiles import tile_network


@inner
def _residual(before, after, dim, subs, residual):
    """max over dims of |after - before| of every lane; NaN stays NaN."""
    for sub in range(subs):
        most = residual[sub * LANES : (sub + 1) * LANES]
        most[:] = ZERO
        for d in range(dim):
            at = (sub * dim + d) * LANES
            x, y = before[at : at + LANES], after[at : at + LANES]
            for i in range(LANES):
                moved = abs(y[i] - x[i])
                most[i] = most[i] if most[i] >= moved or most[i] != most[i] else moved


@inner
def _step_back(before, after, n, kept):
    """after <- after - kept (after - before), in place on ``n`` values."""
    for i in range(n):
        after[i] = fma(-kept, after[i] - before[i], after[i])


@inner
def _read_rows(rows, state, dim):
    n = rows.shape[0]
    for first in range(0, n, LANES):
        for row in range(first, min(first + LANES, n)):
            at = first * dim + row - first
            for d in range(dim):
                state[at] = rows[row, d]
                at += LANES


@inner
def _write_rows(state, rows, dim):
    n = rows.shape[0]
    for first in range(0, n, LANES):
        for row in range(first, min(first + LANES, n)):
            at = first * dim + row - first
            for d in range(dim):
                rows[row, d] = state[at]
                at += LANES


@pasted
def _advance_tile(network, layers, steps, tile, n_chains, first_step, last_step, draws):
    """Steps of ``tile.state``, in place; the residual of the last one goes to ``tile.residual``."""
    dim, subs = layers.table[0, 0], (n_chains + LANES - 1) // LANES
    state, moved = tile.state, tile.moved
    for step in range(first_step, last_step):
        draw = max(0, (step - steps.burn_in) // steps.thin)
        draw_end = steps.burn_in + (draw + 1) * steps.thin
        if steps.noise in (NORMAL, UNIFORM, RESTART) and 0 < step < draw_end - steps.settle:
            add_noise(steps.noise, layers, steps, tile, dim, subs, step, state)
            meet(tile.place)
        network(layers, n_chains, state, moved, tile)
        if step == last_step - 1:
            if leads(tile.place):
                _residual(state, moved, dim, subs, tile.residual)
            meet(tile.place)
        if steps.noise == UPSTREAM:
            add_noise(steps.noise, layers, steps, tile, dim, subs, step + 1, moved)
            meet(tile.place)
        if steps.noise == RESTART and step + 1 < draw_end:  # the last step of a draw goes all the way
            first, end = share_of(subs * dim * LANES, tile.place)
            _step_back(state[first:], moved[first:], end - first, steps.kept[step + steps.thin - draw_end])
            meet(tile.place)
        if step + 1 == draw_end and draws.shape[0] > 0:
            if leads(tile.place):
                _write_rows(moved, draws[:, draw], dim)
            meet(tile.place)
        state, moved = moved, state
    return state


@pasted
def _advance_rows(network, layers, steps, tile, chain_ids, state, start, first_step, last_step, draws, final, residual):
    dim, size = layers.table[0, 0], len(tile.chain_ids)
    if not join_team(tile.place):
        return
    keep = draws.shape[0] > 0
    for begin in range(0, len(chain_ids), size):
        end = min(begin + size, len(chain_ids))
        n = end - begin
        if leads(tile.place):
            for i in range(n):
                tile.chain_ids[i] = chain_ids[begin + i]
        meet(tile.place)
        if start in (START_UNIFORM, START_NORMAL, RESTART):
            add_noise(start, layers, steps, tile, dim, (n + LANES - 1) // LANES, first_step, tile.state)
        elif leads(tile.place):
            _read_rows(state[begin:end], tile.state, dim)
        meet(tile.place)
        tile_draws = draws[begin:end] if keep else draws
        after = _advance_tile(network, layers, steps, tile, n, first_step, last_step, tile_draws)
        if leads(tile.place):
            _write_rows(after, final[begin:end], dim)
            for i in range(n):
                residual[begin + i] = tile.residual[i]


@entry
def advance_rows(layers, steps, tile, chain_ids, state, start, first_step, last_step, draws, final, residual):
    """Run steps ``first_step`` .. ``last_step - 1`` of some chains, tile after tile.

    Args:
        layers, steps, tile: see `Layers`, `Steps` and `Tile`.
        chain_ids: (n,) int64 absolute ids.
        state: (n, dim) fp32 states before ``first_step``; not read where ``start`` names a start noise.
        start: START_UNIFORM, START_NORMAL or RESTART; else ``state`` is taken.
        first_step, last_step: the range; an empty one only writes the start.
        draws: (n, n_draws, dim) fp32, takes the draws that fall into the range; (0, n_draws, dim) keeps none.
        final, residual: (n, dim) and (n,) fp32 results; ``final`` may be ``state``.
    """
    wide_vectors()
    _advance_rows(
        dense_network, layers, steps, tile, chain_ids, state, start, first_step, last_step, draws, final, residual
    )


@entry
def advance_by_tiles(layers, steps, tile, chain_ids, state, start, first_step, last_step, draws, final, residual):
    """`advance_rows` by products of tiles; the process has permission for them (`tiles_are_permitted`)."""
    wide_vectors()
    configure_tiles()
    _advance_rows(
        tile_network, layers, steps, tile, chain_ids, state, start, first_step, last_step, draws, final, residual
    )
    release_tiles()


@entry
def _multiply_add(a, b, c):
    return fma(a, b, c)


def fuses() -> bool:
    """Whether a multiply-add of this machine's loops rounds once; where it rounds twice, all bits are others."""
    a, b = np.float32(1 + 2**-12), np.float32(1 + 2**-11)
    return bool(_multiply_add(a, a, -b) != 0)
