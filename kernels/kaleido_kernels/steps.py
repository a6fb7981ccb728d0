"""The device steps that every kernel shares. Variants are chosen by constexpr names; there is one copy of each step.

Names used throughout:
    ACTIVATION  "relu" | "leaky_relu" | "gelu" | "gelu_tanh" | "silu" | "tanh"
    BOUND       "tanh" | "sigmoid"
    PRECISION   "fp16x3" (fp32 by three fp16 products) | "ieee" | "tf32" | "fp16" | "bf16"
    JITTER      "none" | "normal" | "uniform" | "upstream"
    USE_ASM     True on NVIDIA devices; False under the interpreter and on AMD, which run the twin of each instruction
An operand of a product is a pair (high, low); low is used by "fp16x3" only and is high itself otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kaleido_kernels.philox import noise_tile

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
def hidden_activation(
    x, ACTIVATION: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr, PRECISION: tl.constexpr, USE_ASM: tl.constexpr
):
    """The activation between layers, fp32 to fp32. NaN stays NaN, as in torch (a plain maximum would make it 0)."""
    SHORT: tl.constexpr = USE_ASM and (PRECISION == "fp16" or PRECISION == "bf16")
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0, x, NEGATIVE_SLOPE * x)
    elif ACTIVATION == "tanh":
        if SHORT:
            return fast_tanh(x)
        else:
            return tanh(x, USE_ASM)
    elif ACTIVATION == "silu":
        if SHORT:
            half = 0.5 * x
            return half + half * fast_tanh(half)
        else:
            return x * sigmoid(x, USE_ASM)
    elif ACTIVATION == "gelu_tanh":
        inner = GELU_SCALE * x * (1.0 + 0.044715 * x * x)
        if SHORT:
            half = 0.5 * x
            return half + half * fast_tanh(0.5 * inner)
        else:
            return x * sigmoid(inner, USE_ASM)
    else:
        tl.static_assert(ACTIVATION == "gelu", "unknown activation")
        if PRECISION == "fp16" or PRECISION == "bf16":
            return 0.5 * x * (1.0 + erf_polynomial(x * SQRT_HALF))
        else:
            return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def bound_output(x, BOUND: tl.constexpr, USE_ASM: tl.constexpr):
    """The bound after the last layer, fp32, within 1e-7. Large inputs give the bound exactly; NaN stays NaN."""
    if BOUND == "tanh":
        return tanh(x, USE_ASM)
    else:
        tl.static_assert(BOUND == "sigmoid", "unknown bound")
        return sigmoid(x, USE_ASM)


@triton.jit
def to_operand(x, PRECISION: tl.constexpr):
    """fp32 values as a pair of product operands (high, low)."""
    if PRECISION == "fp16x3":
        high = x.to(tl.float16)
        # Beyond 65504 high is inf and low -inf: the state turns to NaN instead of to something wrong.
        return high, (x - high.to(tl.float32)).to(tl.float16)
    elif PRECISION == "fp16":
        high = x.to(tl.float16)
        return high, high
    elif PRECISION == "bf16":
        high = x.to(tl.bfloat16)
        return high, high
    else:
        return x, x


@triton.jit
def relu_to_operand(x, PRECISION: tl.constexpr):
    """ReLU, rounding and packing of two values in one instruction; ptxas does not fuse them itself."""
    if PRECISION == "fp16":
        return tl.inline_asm_elementwise(
            "cvt.rn.relu.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr, PRECISION: tl.constexpr, USE_ASM: tl.constexpr):
    """Accumulator of a hidden layer -> operand pair of the next one."""
    if USE_ASM and ACTIVATION == "relu" and (PRECISION == "fp16" or PRECISION == "bf16"):
        high = relu_to_operand(x, PRECISION)
        return high, high
    else:
        return to_operand(hidden_activation(x, ACTIVATION, NEGATIVE_SLOPE, PRECISION, USE_ASM), PRECISION)


@triton.jit
def dense_layer(h_high, h_low, w_high, w_low, acc, PRECISION: tl.constexpr):
    """acc + h @ w with fp32 sums. h: (rows, K), w: (K, N), acc: (rows, N) fp32."""
    if PRECISION == "fp16x3":
        # Small terms first; low @ low is below fp32's last bit.
        acc = tl.dot(h_low, w_high, acc, input_precision="ieee")
        acc = tl.dot(h_high, w_low, acc, input_precision="ieee")
        return tl.dot(h_high, w_high, acc, input_precision="ieee")
    elif PRECISION == "tf32":
        return tl.dot(h_high, w_high, acc, input_precision="tf32")
    else:
        return tl.dot(h_high, w_high, acc, input_precision="ieee")


@triton.jit
def clamp(x, low, high):
    """x clamped to [low, high]; NaN stays NaN."""
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def start_tile(
    seed, chains, first_col, LOW: tl.constexpr, HIGH: tl.constexpr, INIT: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Start noise (ROWS, COLS) fp32 from the counters of step 0. INIT: "uniform" | "normal"."""
    step = tl.full([], 0, tl.int32)
    value = noise_tile(seed, chains, first_col, step, DIM, ROWS, COLS, INIT)
    if INIT == "uniform":
        return LOW + (HIGH - LOW) * value
    else:
        return clamp((LOW + HIGH) / 2 + (HIGH - LOW) / 2 * value, LOW, HIGH)


@triton.jit
def add_jitter(
    x, jitter, seed, chains, first_col, step, LOW: tl.constexpr, HIGH: tl.constexpr, JITTER: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """x with the noise of counter ``step``, clamped to the data range, in columns below DIM; the others as they are."""
    KIND: tl.constexpr = "normal" if JITTER == "normal" else "uniform"
    value = noise_tile(seed, chains, first_col, step, DIM, ROWS, COLS, KIND)
    if JITTER == "normal":
        noise = (HIGH - LOW) / 2 * value
    elif JITTER == "uniform":
        noise = (HIGH - LOW) / 2 * (2.0 * value - 1.0)
    else:
        tl.static_assert(JITTER == "upstream", "unknown jitter")
        noise = (HIGH - LOW) * value + HIGH  # the published sampler's formula, its drift upward included
    moved = clamp(x + jitter * noise, LOW, HIGH)
    col = first_col + tl.arange(0, COLS)
    return tl.where(col[None, :] < DIM, moved, x)


@triton.jit
def row_residual(change, first_col, DIM: tl.constexpr, COLS: tl.constexpr):
    """Largest |change| of each row over columns below DIM, (ROWS,) fp32; NaN if one of them is NaN."""
    col = first_col + tl.arange(0, COLS)
    size = tl.where(col[None, :] < DIM, tl.abs(change), 0.0)
    # tl.max drops NaN, so it is carried beside it.
    bad = tl.max((size != size).to(tl.int32), axis=1)
    return tl.where(bad != 0, float("nan"), tl.max(size, axis=1))


@triton.jit
def row_chains(chain_ids_ptr, rows, row_mask, first_chain, HAS_IDS: tl.constexpr):
    """Absolute chain ids of a tile's rows, int64."""
    if HAS_IDS:
        return tl.load(chain_ids_ptr + rows, mask=row_mask, other=0)
    else:
        return first_chain + rows


@triton.jit
def is_jittered(step, burn_in, thin, settle):
    """Whether the schedule puts noise on the input of ``step``: not on step 0 nor in the last ``settle`` of a draw."""
    draw = tl.maximum(step - burn_in, 0) // thin
    return (step > 0) & (step < burn_in + (draw + 1) * thin - settle)


@triton.jit
def next_check(step, every):
    """The first step after ``step`` that is checked."""
    return (step // every + 1) * every


@triton.jit
def check_rows(
    residual, distance, calm, step, n_steps, every, tol, patience, rows, residual_ptr, calm_ptr, halt_ptr
):  # fmt: skip
    """Stores what is known of a tile's chains after ``step`` steps; a check where one falls there.

    See `kaleido_kernels.launch.Checks`.

    Args:
        residual, distance: (ROWS,) fp32, largest change in the step, and largest distance to the saved state.
        calm: (ROWS,) int32, checks passed in a row so far; -1 for rows that have halted, or are none.
        residual_ptr, calm_ptr, halt_ptr: the launch's outputs, stored for the others.

    Returns ``calm`` after it.
    """
    is_check = (step % every == 0) & (step < n_steps)
    live = calm >= 0
    calm = tl.where(is_check, tl.where(residual < tol, calm + 1, 0), calm)
    settled = (calm >= patience) | (residual != residual)
    halting = is_check & (settled | (distance < tol))
    tl.store(residual_ptr + rows, residual, mask=live)
    tl.store(calm_ptr + rows, calm, mask=live)
    tl.store(halt_ptr + rows, tl.where(halting, tl.where(settled, step, -step), 0), mask=live)
    return tl.where(live & ~halting, calm, -1)
