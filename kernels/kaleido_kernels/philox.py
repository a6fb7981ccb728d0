"""Noise on the device: Philox words, uniforms and normals as a function of (seed, chain, dim, step) alone.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011); key = seed, counter = (chain low,
chain high, dim // 4, step), word dim % 4. Words and uniforms have the same bits as the torch implementation in
``kaleido_fast.noise``; normals agree to a few ulp.
"""

from __future__ import annotations

import triton
import triton.language as tl

TO_UNIT = tl.constexpr(2.0**-24)

# sin(pi/2 r) / r and cos(pi/2 r) on |r| <= 1/2 as polynomials in r*r: Taylor's series, whose first omitted terms are
# 4e-9 and 3e-10 there. tl.sin and tl.cos would bring a slow path with a stack frame, sin.approx an error of 5e-7.
SIN_1 = tl.constexpr(1.5707963267948966)
SIN_3 = tl.constexpr(-0.6459640975062462)
SIN_5 = tl.constexpr(0.07969262624616703)
SIN_7 = tl.constexpr(-0.004681754135318687)
SIN_9 = tl.constexpr(0.00016044118478735984)
COS_2 = tl.constexpr(-1.2337005501361697)
COS_4 = tl.constexpr(0.2536695079010480)
COS_6 = tl.constexpr(-0.020863480763352960)
COS_8 = tl.constexpr(0.0009192602748394264)
COS_10 = tl.constexpr(-2.5202042373060605e-05)


@triton.jit
def philox_words(seed, chains, blocks, step):
    """Four uint32 words per element. seed: int64 scalar; chains: int64; blocks (dim // 4), step: int32."""
    chains = chains.to(tl.int64)  # the interpreter types scalars by their value
    low = chains.to(tl.uint32) + (blocks * 0).to(tl.uint32)
    high = (chains >> 32).to(tl.uint32) + (blocks * 0).to(tl.uint32)
    block = blocks.to(tl.uint32) + low * 0
    return tl.philox(seed, low, high, block, low * 0 + step)


@triton.jit
def unit(word):
    """Uniform on [0, 1) from the top 24 bits of a word: exact in fp32, so the same on every device."""
    return (word >> 8).to(tl.int32).to(tl.float32) * TO_UNIT


@triton.jit
def normal_pair(radius_word, angle_word):
    """Two standard normals from two words (Box & Muller 1958)."""
    radius = tl.sqrt(-2.0 * tl.log(((radius_word >> 8) + 1).to(tl.int32).to(tl.float32) * TO_UNIT))
    # The angle is turns * 2 pi with turns = k / 2**24. Whole quarter turns are taken off in integers, so r is exact.
    k = (angle_word >> 8).to(tl.int32)
    quarter = (k + (1 << 21)) >> 22
    r = (k - (quarter << 22)).to(tl.float32) * (2.0**-22)
    rr = r * r
    sine = r * (SIN_1 + rr * (SIN_3 + rr * (SIN_5 + rr * (SIN_7 + rr * SIN_9))))
    cosine = 1.0 + rr * (COS_2 + rr * (COS_4 + rr * (COS_6 + rr * (COS_8 + rr * COS_10))))
    odd = (quarter & 1) != 0
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    x = tl.where(((quarter + 1) & 2) != 0, -x, x)
    y = tl.where((quarter & 2) != 0, -y, y)
    return radius * x, radius * y


@triton.jit
def four_values(seed, chains, blocks, step, KIND: tl.constexpr):
    """The noise of dims 4 b .. 4 b + 3 of each block b. KIND: "uniform" on [0, 1), or "normal"."""
    w0, w1, w2, w3 = philox_words(seed, chains, blocks, step)
    if KIND == "normal":
        v0, v1 = normal_pair(w0, w1)
        v2, v3 = normal_pair(w2, w3)
    else:
        v0, v1, v2, v3 = unit(w0), unit(w1), unit(w2), unit(w3)
    return v0, v1, v2, v3


@triton.jit
def noise_tile(
    seed, chains, first_col, step, DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, KIND: tl.constexpr
):
    """Noise (ROWS, COLS) fp32 of columns first_col .. first_col + COLS - 1 (first_col a multiple of 4).

    chains: (ROWS,) int64. KIND: "uniform" on [0, 1), or "normal". Columns from DIM on hold values that may not be used.
    """
    if DIM <= 4:
        # One Philox call a row and a select, instead of one a block: 243 against 310 instructions a step for D = 1.
        v0, v1, v2, v3 = four_values(seed, chains, tl.zeros([ROWS], tl.int32), step, KIND)
        col = (first_col + tl.arange(0, COLS))[None, :]
        value = tl.broadcast_to(v0[:, None], (ROWS, COLS))
        if DIM > 1:
            value = tl.where(col == 1, v1[:, None], value)
        if DIM > 2:
            value = tl.where(col == 2, v2[:, None], value)
        if DIM > 3:
            value = tl.where(col == 3, v3[:, None], value)
        return value
    else:
        blocks = first_col // 4 + tl.arange(0, COLS // 4)
        v0, v1, v2, v3 = four_values(seed, chains[:, None], blocks[None, :], step, KIND)
        return tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), (ROWS, COLS))
