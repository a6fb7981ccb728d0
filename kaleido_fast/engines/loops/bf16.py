"""Values rounded to bf16."""

from __future__ import annotations

import numpy as np

from kaleido_fast.engines.loops.compiling import inner, wide_vectors
from kaleido_fast.engines.loops.processor import LANES
from kaleido_fast.engines.loops.scalars import bits, from_bits

_BF16_LAST, _BF16_BELOW_HALF, _BF16_NAN, _16_BITS = np.uint32(1), np.uint32(0x7FFF), np.uint32(0x7FC0), np.uint32(16)


@inner
def _bf16(x):
    """Bits of x rounded to the nearest bf16, ties to even."""
    whole = np.uint32(bits(x))
    rounded = np.uint32(whole + _BF16_BELOW_HALF + ((whole >> _16_BITS) & _BF16_LAST)) >> _16_BITS
    return _BF16_NAN if x != x else np.uint32(rounded)


@inner
def round_to_pairs(values, subs, n_in, pairs):
    """[sub][input][lane] fp32 -> [sub][pair of inputs][lane]; an odd last input is paired with 0."""
    n_pairs = (n_in + 1) // 2
    for sub in range(subs):
        for pair in range(n_pairs):
            at, even = (sub * n_pairs + pair) * LANES, (sub * n_in + 2 * pair) * LANES
            out, low = pairs[at : at + LANES], values[even : even + LANES]
            if 2 * pair + 1 < n_in:
                high = values[even + LANES : even + 2 * LANES]
                for i in range(LANES):
                    out[i] = np.int32(_bf16(low[i]) | (_bf16(high[i]) << _16_BITS))
            else:
                for i in range(LANES):
                    out[i] = np.int32(_bf16(low[i]))


@inner
def round_to_bf16(values, n, rounded):
    """``n`` values in fp32, rounded to the nearest bf16; in place too."""
    wide_vectors()
    for i in range(n):
        rounded[i] = from_bits(np.int32(_bf16(values[i]) << _16_BITS))
