"""Layers in bf16 by products of tiles, see `kaleido_fast.engines.loops.amx`.

One core of a Xeon makes 1,200 to 1,800 GFLOP/s by it from 128 values a layer on, 6 to 9 times what it makes in fp32. A
chain's bits depend on neither tile nor neighbour: each sum starts from the bias and takes pairs of inputs in order, in
the way that the instruction sets.
"""

from __future__ import annotations

import numpy as np

from kaleido_fast.engines.loops.amx import BLOCK, STEP_BYTES, TILE, multiply_block, multiply_narrow, round_pairs
from kaleido_fast.engines.loops.arrays import LEAKY_RELU, NONE
from kaleido_fast.engines.loops.compiling import inner, pasted
from kaleido_fast.engines.loops.processor import LANES, ROW_BYTES
from kaleido_fast.engines.loops.scalars import ZERO, activate

# Wide layers go through the sub-tiles in parts of so many steps, whose weights then stay in the first cache; partial
# sums wait in memory (mnist, GFLOP/s: 1,314 in one part, 1,399 in parts of 8).
PART_STEPS = 8
PAIRS = BLOCK // 2
BLOCK_VALUES = BLOCK * LANES
_BLOCK_BYTES = BLOCK * ROW_BYTES


@inner
def _copy(source, first, target, at, n):
    for i in range(n):
        target[at + i] = source[first + i]


@pasted
def _round_state(state, subs, dim, steps, sums, pairs):
    """[sub][value][lane] fp32 -> [sub][step][16 pairs][lane]; what fills the last step up is 0."""
    rows = steps * PAIRS
    for sub in range(subs):
        x = np.int64(state.ctypes.data) + sub * dim * ROW_BYTES
        y = np.int64(pairs.ctypes.data) + sub * rows * ROW_BYTES
        round_pairs(x, y, dim // 2, NONE, ZERO)
        if dim % 2:
            _copy(state, (sub * dim + dim - 1) * LANES, sums, 0, LANES)
            sums[LANES : 2 * LANES] = ZERO
            round_pairs(np.int64(sums.ctypes.data), y + dim // 2 * ROW_BYTES, 1, NONE, ZERO)
        pairs[(sub * rows + (dim + 1) // 2) * LANES : (sub + 1) * rows * LANES] = 0


@pasted
def _fill_pairs(sums, place, pairs, first_pair, n):
    """Zeros where a block has no output: 0 x inf of a chain would be NaN."""
    if n % 2:
        at = place + n * LANES
        sums[at : at + LANES] = ZERO
    pairs[(first_pair + (n + 1) // 2) * LANES : (first_pair + PAIRS) * LANES] = 0


@pasted
def _narrow_block(layers, block, n, steps, subs, w, b, x, pairs, target, sums, is_last):
    """The last block of a layer, of up to 16 outputs: products, activation and rounding, sub-tile after sub-tile."""
    scratch, n_out = np.int64(sums.ctypes.data), block * BLOCK + n
    for sub in range(subs):
        multiply_narrow(w, x + sub * steps * STEP_BYTES, steps, scratch, b)
        if is_last:
            _copy(sums, 0, target, (sub * n_out + block * BLOCK) * LANES, n * LANES)
            continue
        first_pair = (sub * (block + 1) + block) * PAIRS
        _fill_pairs(sums, 0, pairs, first_pair, n)
        code = layers.activation
        if code > LEAKY_RELU:
            activate(sums, n * LANES, code)
            code = NONE
        round_pairs(scratch, np.int64(pairs.ctypes.data) + first_pair * ROW_BYTES, (n + 1) // 2, code, layers.slope)


@inner
def _tile_layer(layers, index, subs, source, pairs, target, sums):
    """One layer of a tile of chains: ``source`` -> ``pairs``, the last layer's -> ``target`` before its bound.

    Rounding waits for the products of the next block, see `multiply_block`; activations that need a polynomial do not.
    """
    n_in, n_out, n_blocks, first_weight, first_bias = layers.table[index]
    code, slope = layers.activation, layers.slope
    is_last = index == layers.table.shape[0] - 1
    waits = not is_last and code <= LEAKY_RELU
    steps = (n_in + BLOCK - 1) // BLOCK
    parts = (steps + PART_STEPS - 1) // PART_STEPS
    x, y = np.int64(source.ctypes.data), np.int64(pairs.ctypes.data)
    w = np.int64(layers.weights.ctypes.data) + 4 * first_weight
    b = np.int64(layers.biases.ctypes.data) + 4 * first_bias
    scratch = np.int64(sums.ctypes.data)
    waiting, waiting_pairs, n_waiting = scratch, y, 0
    for block in range(n_blocks):
        n = min(BLOCK, n_out - block * BLOCK)
        if n <= TILE:
            round_pairs(waiting, waiting_pairs, n_waiting, code, slope)
            n_waiting = 0
            _narrow_block(layers, block, n, steps, subs, w, b, x, pairs, target, sums, is_last)
            break
        done = 0
        for part in range(parts):
            part_steps = steps * (part + 1) // parts - done
            ahead, asked = w + part_steps * STEP_BYTES, part_steps * STEP_BYTES // subs
            for sub in range(subs):
                place = scratch + (sub % 2 if waits and parts == 1 else sub) * _BLOCK_BYTES
                if is_last and n == BLOCK:
                    place = np.int64(target.ctypes.data) + (sub * n_out + block * BLOCK) * ROW_BYTES
                each = n_waiting // part_steps
                now = n_waiting - each * part_steps
                round_pairs(waiting, waiting_pairs, now, code, slope)
                multiply_block(
                    w,
                    x + (sub * steps + done) * STEP_BYTES,
                    part_steps,
                    ahead + sub * asked,
                    place,
                    b,
                    part,
                    waiting + 2 * now * ROW_BYTES,
                    waiting_pairs + now * ROW_BYTES,
                    each,
                    code,
                    slope,
                )
                n_waiting = 0
                if part < parts - 1:
                    continue
                first_pair = (sub * n_blocks + block) * PAIRS
                if n < BLOCK and is_last:
                    at = (sub * n_out + block * BLOCK) * LANES
                    _copy(sums, (place - scratch) // 4, target, at, n * LANES)
                elif n < BLOCK:
                    _fill_pairs(sums, (place - scratch) // 4, pairs, first_pair, n)
                if waits:
                    waiting, waiting_pairs, n_waiting = place, y + first_pair * ROW_BYTES, (n + 1) // 2
            w = ahead
            done += part_steps
        b += BLOCK * 64
        if not is_last and not waits:
            for sub in range(subs):
                activate(sums[sub * BLOCK_VALUES :], n * LANES, code)
                first_pair = (sub * n_blocks + block) * PAIRS
                round_pairs(scratch + sub * _BLOCK_BYTES, y + first_pair * ROW_BYTES, (n + 1) // 2, NONE, ZERO)
    round_pairs(waiting, waiting_pairs, n_waiting, code, slope)


@pasted
def tile_network(layers, n_chains, source, target, tile):
    """target = bound(MLP(source)) of a tile's first ``n_chains`` chains, the operands of products rounded to bf16."""
    subs = (n_chains + LANES - 1) // LANES
    dim = layers.table[0, 0]
    x, y = tile.hidden, tile.other
    _round_state(source, subs, dim, (dim + BLOCK - 1) // BLOCK, tile.sums, x)
    for index in range(layers.table.shape[0]):
        _tile_layer(layers, index, subs, x, y, target, tile.sums)
        x, y = y, x
    activate(target, subs * dim * LANES, layers.bound)
