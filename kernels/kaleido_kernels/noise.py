"""What noise does to states: where chains start, jitter, and the way by parts that a flow goes from noise to a draw.

``MAP`` is what `kaleido_kernels.steps` says of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kaleido_kernels.philox import noise_tile
from kaleido_kernels.steps import clamp, columns_at


@triton.jit
def flow_start_from(value, noise, MAP: tl.constexpr):
    """What a draw of a flow starts from, of standard normals ``value``."""
    return (MAP.low + MAP.high) / 2 + (MAP.high - MAP.low) / 2 * (noise.jitter * value)


@triton.jit
def start_from(value, noise, MAP: tl.constexpr):
    """The start noise of a chain, of uniforms on [0, 1) or standard normals ``value``, as ``MAP`` wants."""
    if MAP.jitter == "restart":
        return flow_start_from(value, noise, MAP)
    elif MAP.init == "uniform":
        return MAP.low + (MAP.high - MAP.low) * value
    else:
        return clamp((MAP.low + MAP.high) / 2 + (MAP.high - MAP.low) / 2 * value, MAP.low, MAP.high)


@triton.jit
def moved_by(x, value, noise, MAP: tl.constexpr):
    """x with jitter of uniforms on [0, 1) or standard normals ``value``, clamped to the data range."""
    if MAP.jitter == "normal":
        moved = (MAP.high - MAP.low) / 2 * value
    elif MAP.jitter == "uniform":
        moved = (MAP.high - MAP.low) / 2 * (2.0 * value - 1.0)
    else:
        tl.static_assert(MAP.jitter == "upstream", "unknown jitter")
        moved = (MAP.high - MAP.low) * value + MAP.high  # the published sampler's formula, its drift upward included
    return clamp(x + noise.jitter * moved, MAP.low, MAP.high)


@triton.jit
def flow_start(noise, ids, first_col, step, MAP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """What a draw of a flow starts from, (ROWS, COLS) fp32, from the counters of ``step``; 1 in columns from D on."""
    value = noise_tile(noise.seed, ids, first_col, step, MAP.dim, ROWS, COLS, "normal")
    start = flow_start_from(value, noise, MAP)
    # Padding too starts anew: narrow carries it from step to step, and a chain's NaN with it.
    return tl.where((first_col + tl.arange(0, COLS))[None, :] < MAP.dim, start, 1.0)


@triton.jit
def start_tile(noise, ids, first_col, MAP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Start noise (ROWS, COLS) fp32 from the counters of step 0."""
    step = tl.full([], 0, tl.int32)
    if MAP.jitter == "restart":
        return flow_start(noise, ids, first_col, step, MAP, ROWS, COLS)
    else:
        KIND: tl.constexpr = MAP.init
        value = noise_tile(noise.seed, ids, first_col, step, MAP.dim, ROWS, COLS, KIND)
        return start_from(value, noise, MAP)


@triton.jit
def first_state(start_ptr, noise, chains, first_col, MAP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The states that a launch begins with, (ROWS, COLS) fp32: those in memory, or start noise where there are none."""
    if start_ptr is not None:
        start, mask = columns_at(start_ptr, chains, first_col, MAP.dim, COLS)
        return tl.load(start, mask=mask, other=0.0)
    else:
        return start_tile(noise, chains.ids, first_col, MAP, ROWS, COLS)


@triton.jit
def add_jitter(x, noise, ids, first_col, step, MAP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """x with the noise of counter ``step``, clamped to the data range, in columns below D; the others as they are."""
    KIND: tl.constexpr = "normal" if MAP.jitter == "normal" else "uniform"
    value = noise_tile(noise.seed, ids, first_col, step, MAP.dim, ROWS, COLS, KIND)
    moved = moved_by(x, value, noise, MAP)
    col = first_col + tl.arange(0, COLS)
    return tl.where(col[None, :] < MAP.dim, moved, x)


@triton.jit
def jitter_input(x, step, jittered, noise, ids, first_col, MAP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The input of ``step`` from the state before it: where the step is ``jittered`` with noise on it, or of a flow
    noise in its place."""
    if MAP.jitter == "normal" or MAP.jitter == "uniform":
        if jittered:
            x = add_jitter(x, noise, ids, first_col, step, MAP, ROWS, COLS)
    elif MAP.jitter == "restart":
        if jittered:
            x = flow_start(noise, ids, first_col, step, MAP, ROWS, COLS)
    return x


@triton.jit
def kept_share(noise, step, end, timing):
    """g of ``step``, of the draw that ends after ``end`` steps; 0 where all steps go the whole way."""
    if noise.shares_ptr is not None:
        return tl.load(noise.shares_ptr + (step - end + timing.thin))
    else:
        return 0.0


@triton.jit
def go_by_part(y, change, share, MAP: tl.constexpr):
    """The state after a step with output y that is ``change`` away from its input: y, or of a flow short of it."""
    if MAP.jitter == "restart":
        return tl.fma(change, -share, y)  # not left to the compiler: the bits of a launch that ends here depend on it
    else:
        return y


@triton.jit
def jitter_output(y, done, noise, ids, first_col, MAP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The state after ``done`` steps from the last one's output: with the published sampler's noise, if on."""
    if MAP.jitter == "upstream":
        y = add_jitter(y, noise, ids, first_col, done, MAP, ROWS, COLS)
    return y
