"""The device steps that every kernel shares. Variants are chosen by constexpr names; there is one copy of each step.

What is compiled in has names in capitals:
    MAP         a `kaleido_kernels.arguments.Map`: the step that is iterated. It is handed on whole: Triton 3.6 takes no
                member of a tuple that is a string for a constant.
    USE_ASM     True on NVIDIA devices; False under the interpreter and on AMD, which run the twin of each instruction
An operand of a product is a pair (high, low); low is used by "fp16x3" only and is high itself otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Timing(NamedTuple):
    """The schedule, 32-bit: see `kaleido_kernels.schedule.Schedule`."""

    burn_in: Any
    n_draws: Any
    thin: Any
    settle: Any


class Noise(NamedTuple):
    """Key of the noise (int64), and scale of the jitter.

    Of a flow it is the scale of the noise that draws start from; ``shares_ptr``, else None, says how it is left behind.
    """

    seed: Any
    jitter: Any
    shares_ptr: Any


class Chains(NamedTuple):
    """The chains of a tile: rows of the launch's tensors (int64), which of them exist, and absolute ids (int64)."""

    rows: Any
    exist: Any
    ids: Any


class Stored(NamedTuple):
    """What a launch fills: see the arguments of these names. Without draws ``draws_ptr`` is None."""

    draws_ptr: Any
    final_ptr: Any
    residual_ptr: Any


class Checking(NamedTuple):
    """What chains are checked with, and where it is noted: see `kaleido_kernels.schedule.Checks`.

    Without checks all pointers but ``residual_ptr`` are None.
    """

    saved_ptr: Any
    calm_in_ptr: Any
    residual_ptr: Any
    calm_ptr: Any
    halt_ptr: Any
    n_steps: Any
    every: Any
    tol: Any
    patience: Any


LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)
GELU_SCALE = tl.constexpr(
    1.5957691216057308
)  # 2 sqrt(2 / pi): gelu_tanh(x) = x sigmoid(GELU_SCALE (x + 0.044715 x**3))


@triton.jit
def reciprocal(x, USE_ASM: tl.constexpr):
    """1 / x within 1 ulp."""
    if USE_ASM:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def exp2(x, USE_ASM: tl.constexpr):
    """2**x within 2 ulp; results below 1e-38 may be 0. The plain instruction needs no scaling for subnormal numbers."""
    if USE_ASM:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def sigmoid(x, USE_ASM: tl.constexpr):
    """1 / (1 + exp(-x)) within 1e-7; NaN stays NaN."""
    return reciprocal(1.0 + exp2(x * -LOG2_E, USE_ASM), USE_ASM)


@triton.jit
def tanh(x, USE_ASM: tl.constexpr):
    """tanh(x) within 1e-7 (absolute), by one exponential and one reciprocal; NaN stays NaN."""
    return 1.0 - 2.0 * reciprocal(1.0 + exp2(x * (2.0 * LOG2_E), USE_ASM), USE_ASM)


@triton.jit
def fast_tanh(x):
    """tanh by its own instruction: error 5e-4, for hidden layers whose result is rounded to 16 bits anyway."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def erf_polynomial(x):
    """erf(x) within 1.5e-7: Abramowitz & Stegun 7.1.26. Half the time of tl.erf."""
    a = tl.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * a)
    p = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    y = 1.0 - t * p * tl.exp(-a * a)
    return tl.where(x < 0, -y, y)


@triton.jit
def hidden_activation(x, MAP: tl.constexpr, USE_ASM: tl.constexpr):
    """The activation between layers, fp32 to fp32. NaN stays NaN, as in torch (a plain maximum would make it 0)."""
    ROUNDED: tl.constexpr = MAP.precision == "fp16" or MAP.precision == "bf16"
    SHORT: tl.constexpr = USE_ASM and ROUNDED
    if MAP.activation == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif MAP.activation == "leaky_relu":
        return tl.where(x > 0, x, MAP.negative_slope * x)
    elif MAP.activation == "tanh":
        if SHORT:
            return fast_tanh(x)
        else:
            return tanh(x, USE_ASM)
    elif MAP.activation == "silu":
        if SHORT:
            half = 0.5 * x
            return half + half * fast_tanh(half)
        else:
            return x * sigmoid(x, USE_ASM)
    elif MAP.activation == "gelu_tanh":
        inner = GELU_SCALE * x * (1.0 + 0.044715 * x * x)
        if SHORT:
            half = 0.5 * x
            return half + half * fast_tanh(0.5 * inner)
        else:
            return x * sigmoid(inner, USE_ASM)
    else:
        tl.static_assert(MAP.activation == "gelu", "unknown activation")
        if ROUNDED:
            return 0.5 * x * (1.0 + erf_polynomial(x * SQRT_HALF))
        else:
            return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def bound_output(x, MAP: tl.constexpr, USE_ASM: tl.constexpr):
    """The bound after the last layer, fp32, within 1e-7. Large inputs give the bound exactly; NaN stays NaN."""
    if MAP.bound == "tanh":
        return tanh(x, USE_ASM)
    else:
        tl.static_assert(MAP.bound == "sigmoid", "unknown bound")
        return sigmoid(x, USE_ASM)


@triton.jit
def to_operand(x, MAP: tl.constexpr):
    """fp32 values as a pair of product operands (high, low)."""
    if MAP.precision == "fp16x3":
        high = x.to(tl.float16)
        # Beyond 65504 high is inf and low -inf: the state turns to NaN instead of to something wrong.
        return high, (x - high.to(tl.float32)).to(tl.float16)
    elif MAP.precision == "fp16":
        high = x.to(tl.float16)
        return high, high
    elif MAP.precision == "bf16":
        high = x.to(tl.bfloat16)
        return high, high
    else:
        return x, x


@triton.jit
def relu_to_operand(x, MAP: tl.constexpr):
    """ReLU, rounding and packing of two values in one instruction; ptxas does not fuse them itself."""
    if MAP.precision == "fp16":
        return tl.inline_asm_elementwise(
            "cvt.rn.relu.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def activate(x, MAP: tl.constexpr, USE_ASM: tl.constexpr):
    """Accumulator of a hidden layer -> operand pair of the next one."""
    if USE_ASM and MAP.activation == "relu" and (MAP.precision == "fp16" or MAP.precision == "bf16"):
        high = relu_to_operand(x, MAP)
        return high, high
    else:
        return to_operand(hidden_activation(x, MAP, USE_ASM), MAP)


@triton.jit
def dense_layer(h_high, h_low, w_high, w_low, acc, MAP: tl.constexpr):
    """acc + h @ w with fp32 sums. h: (rows, K), w: (K, N), acc: (rows, N) fp32."""
    if MAP.precision == "fp16x3":
        # Small terms first; low @ low is below fp32's last bit.
        acc = tl.dot(h_low, w_high, acc, input_precision="ieee")
        acc = tl.dot(h_high, w_low, acc, input_precision="ieee")
        return tl.dot(h_high, w_high, acc, input_precision="ieee")
    elif MAP.precision == "tf32":
        return tl.dot(h_high, w_high, acc, input_precision="tf32")
    else:
        return tl.dot(h_high, w_high, acc, input_precision="ieee")


@triton.jit
def clamp(x, low, high):
    """x clamped to [low, high]; NaN stays NaN."""
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tile_rows(first_row, n_chains, ROWS: tl.constexpr):
    """Rows ``first_row`` .. (int64) of a tile, and which of them exist."""
    rows = first_row + tl.arange(0, ROWS)
    return rows, rows < n_chains


@triton.jit
def tile_chains(first_row, n_chains, first_chain, chain_ids_ptr, ROWS: tl.constexpr):
    """The chains of rows ``first_row`` .. (int64): ids from memory, or the rows' numbers from ``first_chain``."""
    rows, exist = tile_rows(first_row, n_chains, ROWS)
    if chain_ids_ptr is not None:
        return Chains(rows, exist, tl.load(chain_ids_ptr + rows, mask=exist, other=0))
    else:
        return Chains(rows, exist, first_chain + rows)


@triton.jit
def place_columns(chains, first_col, DIM: tl.constexpr, COLS: tl.constexpr):
    """(offsets, mask) of columns ``first_col`` .. of a tile's chains in (n_chains, DIM) row-major; (ROWS, COLS)."""
    cols = first_col + tl.arange(0, COLS)
    return chains.rows[:, None] * DIM + cols[None, :], chains.exist[:, None] & (cols < DIM)[None, :]


@triton.jit
def columns_at(ptr, chains, first_col, DIM: tl.constexpr, COLS: tl.constexpr):
    """(pointers, mask) of columns ``first_col`` .. of a tile's chains in ``ptr``, (n_chains, DIM) row-major."""
    cols = first_col + tl.arange(0, COLS)
    return ptr + chains.rows[:, None] * DIM + cols[None, :], chains.exist[:, None] & (cols < DIM)[None, :]


@triton.jit
def row_residual(change, first_col, DIM: tl.constexpr, COLS: tl.constexpr):
    """Largest |change| of each row over columns below DIM, (ROWS,) fp32; NaN if one of them is NaN."""
    col = first_col + tl.arange(0, COLS)
    size = tl.where(col[None, :] < DIM, tl.abs(change), 0.0)
    # tl.max drops NaN, so it is carried beside it.
    bad = tl.max((size != size).to(tl.int32), axis=1)
    return tl.where(bad != 0, float("nan"), tl.max(size, axis=1))


@triton.jit
def draw_at(step, timing):
    """The draw that ``step`` works towards."""
    return tl.maximum(step - timing.burn_in, 0) // timing.thin


@triton.jit
def draw_end(draw, timing):
    """Number of steps after which the state is draw ``draw``."""
    return timing.burn_in + (draw + 1) * timing.thin


@triton.jit
def is_draw(done, timing):
    """Whether the state after ``done`` steps, at least 1, is a draw."""
    return done == draw_end(draw_at(done - 1, timing), timing)


@triton.jit
def is_jittered_before(step, end, timing):
    """`is_jittered` where the step's draw is known to end after ``end`` steps."""
    return (step > 0) & (step < end - timing.settle)


@triton.jit
def is_jittered(step, timing):
    """Whether the schedule puts noise on the input of ``step``: not on step 0 nor in the last ``settle`` of a draw."""
    return is_jittered_before(step, draw_end(draw_at(step, timing), timing), timing)


@triton.jit
def next_check(step, every):
    """The first step after ``step`` that is checked."""
    return (step // every + 1) * every


@triton.jit
def worst(a, b):
    """The larger of two; NaN if one is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def check_rows(residual, distance, calm, step, rows, checking):
    """Stores what is known of a tile's chains after ``step`` steps; a check where one falls there.

    See `kaleido_kernels.schedule.Checks`.

    Args:
        residual, distance: (ROWS,) fp32, largest change in the step, and largest distance to the saved state.
        calm: (ROWS,) int32, checks passed in a row so far; -1 for rows that have halted, or are none.
        rows: (ROWS,) int64, where the others' outputs are stored.

    Returns ``calm`` after it.
    """
    is_check = (step % checking.every == 0) & (step < checking.n_steps)
    live = calm >= 0
    calm = tl.where(is_check, tl.where(residual < checking.tol, calm + 1, 0), calm)
    settled = (calm >= checking.patience) | (residual != residual)
    halting = is_check & (settled | (distance < checking.tol))
    tl.store(checking.residual_ptr + rows, residual, mask=live)
    tl.store(checking.calm_ptr + rows, calm, mask=live)
    tl.store(checking.halt_ptr + rows, tl.where(halting, tl.where(settled, step, -step), 0), mask=live)
    return tl.where(live & ~halting, calm, -1)
