"""Noise of a tile's chains, by their ids: see `kaleido_fast.noise`."""

from __future__ import annotations

import numpy as np

from kaleido_fast.engines.loops.arrays import NORMAL, RESTART, START_NORMAL, UNIFORM, UPSTREAM
from kaleido_fast.engines.loops.compiling import inner, wide_vectors
from kaleido_fast.engines.loops.processor import LANES
from kaleido_fast.engines.loops.scalars import ONE, TWO, cos_sin, floats, log
from kaleido_fast.engines.loops.team import share_of

_MULTIPLY_0, _MULTIPLY_1, _32_BITS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57), np.uint64(32)
_WEYL_0, _WEYL_1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_TO_UNIT, _TURN = floats(2.0**-24, 2 * np.pi)


@inner
def _philox(chain_ids, group, step, key_low, key_high, words):
    """Philox4x32-10 of `LANES` chains: words[4][lane]; see `kaleido_fast.noise`."""
    for i in range(LANES):
        c0, c1 = np.uint32(chain_ids[i]), np.uint32(np.uint64(chain_ids[i]) >> _32_BITS)
        c2, c3 = np.uint32(group), np.uint32(step)
        k0, k1 = np.uint32(key_low), np.uint32(key_high)
        for _ in range(10):
            p0, p1 = np.uint64(c0) * _MULTIPLY_0, np.uint64(c2) * _MULTIPLY_1
            c0, c1 = np.uint32(np.uint32(p1 >> _32_BITS) ^ c1 ^ k0), np.uint32(p1)
            c2, c3 = np.uint32(np.uint32(p0 >> _32_BITS) ^ c3 ^ k1), np.uint32(p0)
            k0, k1 = np.uint32(k0 + _WEYL_0), np.uint32(k1 + _WEYL_1)
        words[i] = c0
        words[LANES + i] = c1
        words[2 * LANES + i] = c2
        words[3 * LANES + i] = c3


@inner
def _unit(word):
    return np.float32(np.int32(word >> 8)) * _TO_UNIT


@inner
def _box_muller(words, normals):
    """Two rows of words -> two rows of standard normals."""
    for i in range(LANES):
        radius = np.sqrt(-TWO * log(_unit(words[i]) + _TO_UNIT))
        cos, sin = cos_sin(_TURN * _unit(words[LANES + i]))
        normals[i] = radius * cos
        normals[LANES + i] = radius * sin


@inner
def _noise_rows(chain_ids, group, step, steps, normal, n_rows, tile):
    """Standard normals, or uniforms on [0, 1), of dims 4 group .. 4 group + n_rows - 1 into tile.noise[4][lane]."""
    words, noise = tile.words, tile.noise
    _philox(chain_ids, group, step, steps.key_low, steps.key_high, words)
    if normal:
        for pair in range((n_rows + 1) // 2):
            rows = slice(2 * pair * LANES, 2 * (pair + 1) * LANES)
            _box_muller(words[rows], noise[rows])
    else:
        for i in range(4 * LANES):
            noise[i] = _unit(words[i])


@inner
def _clamp(x, low, high):
    """NaN stays NaN."""
    x = low if x < low else x
    return high if x > high else x


@inner
def _move_row(kind, e, source, target, scale, layers):
    """One value of `LANES` chains: target = source moved by the noise e, or start noise."""
    low, high, mid, half, span = layers.low, layers.high, layers.mid, layers.half, layers.span
    if kind == NORMAL:
        for i in range(LANES):
            target[i] = _clamp(source[i] + scale * (half * e[i]), low, high)
    elif kind == UNIFORM:
        for i in range(LANES):
            target[i] = _clamp(source[i] + scale * (half * (TWO * e[i] - ONE)), low, high)
    elif kind == UPSTREAM:
        for i in range(LANES):
            target[i] = _clamp(source[i] + scale * (span * e[i] + high), low, high)
    elif kind == START_NORMAL:
        for i in range(LANES):
            target[i] = _clamp(mid + half * e[i], low, high)
    elif kind == RESTART:
        for i in range(LANES):
            target[i] = mid + half * (scale * e[i])
    else:
        for i in range(LANES):
            target[i] = low + span * e[i]


@inner
def add_noise(kind, layers, steps, tile, dim, subs, step, values):
    """This thread's share of the noise of ``step`` on the values of a tile, in place; before it the team meets.

    The kinds of start noise, and RESTART, overwrite the values.
    """
    wide_vectors()
    normal = kind in (NORMAL, START_NORMAL, RESTART)
    first, end = share_of((dim + 3) // 4, tile.place)
    for sub in range(subs):
        chain_ids = tile.chain_ids[sub * LANES : (sub + 1) * LANES]
        for group in range(first, end):
            n_rows = min(4, dim - 4 * group)
            _noise_rows(chain_ids, group, step, steps, normal, n_rows, tile)
            for row in range(n_rows):
                at = (sub * dim + 4 * group + row) * LANES
                x, e = values[at : at + LANES], tile.noise[row * LANES : (row + 1) * LANES]
                _move_row(kind, e, x, x, steps.jitter, layers)
