"""Compiled loops of the CPU engine: all steps of all layers for one tile of chains, with its noise.

A tile is ``subs`` sub-tiles of `LANES` chains; its arrays are laid out [sub-tile][value][lane], so that the innermost
loop always runs over chains: one chain is one lane of a vector register, from the noise to the draw. Every lane does
the same operations in the same order (one multiply-add per weight, in the order of the inputs, from the bias on), so
that a chain's bits depend on neither its place nor its neighbours nor the register block that computed it, and not on
the width of the processor's vectors either; only one without fused multiply-add rounds otherwise.

Everything that is compiled is in this file, because the cache on disk notices only changes of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _typed_intrinsic

from kaleido_fast.engines.code_cache import CodeCache, code_folders, config

intrinsic: Any = _typed_intrinsic  # its annotations count the typing context as an argument of the call

NONE, RELU, LEAKY_RELU, GELU, GELU_TANH, SILU, TANH, SIGMOID = range(8)
NORMAL, UNIFORM, UPSTREAM, START_NORMAL, START_UNIFORM, RESTART = range(1, 7)


def _register_block() -> tuple[int, int, int]:
    """(values in one vector, vectors of chains, most outputs) of a register block on this processor.

    outputs x vectors are accumulators and stay in registers, beside one vector of inputs each and a broadcast weight:
    2 x 12 + 2 + 1 of the 32 registers of AVX-512 or NEON, 2 x 6 + 2 + 1 of the 16 of AVX2.
    """
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 2, 12
    if features.get("avx2"):
        return 8, 2, 6
    if features.get("neon") or features.get("asimd"):
        return 4, 4, 5
    return 4, 2, 6


VECTOR, VECTORS, MAX_OUTPUTS = _register_block()
LANES = VECTOR * VECTORS
# If numba compiles for a processor without bf16 (NUMBA_CPU_NAME), LLVM ends the process at the first such instruction.
IS_COMPILED = not config.DISABLE_JIT
_FOR_THIS_PROCESSOR = config.CPU_NAME is None and config.CPU_FEATURES is None and bool(config.ENABLE_AVX)
HAS_BF16 = VECTOR == 16 and _FOR_THIS_PROCESSOR and bool(binding.get_host_cpu_features().get("avx512bf16"))
_ROW_BYTES = 4 * LANES


class Layers(NamedTuple):
    """A packed network.

    Args:
        weights: all layers one after the other; each is a sequence of blocks [input][output of the block], fp32; or
            [pair of inputs][output], int32 that hold two bf16, the even input in the low half.
        biases: all layers one after the other.
        table: (n_layers, 5) int64: inputs, outputs, blocks, first weight, first bias.
        activation, slope: code of the hidden activation, and the slope of leaky_relu.
        bound: code of the output bound.
        low, high, mid, half, span: data range, its middle, half its width, its width.
    """

    weights: np.ndarray
    biases: np.ndarray
    table: np.ndarray
    activation: int
    slope: np.float32
    bound: int
    low: np.float32
    high: np.float32
    mid: np.float32
    half: np.float32
    span: np.float32


class Steps(NamedTuple):
    """The schedule and the noise; see `kaleido_kernels.schedule.Schedule`.

    Args:
        kept: (thin,) fp32 of a flow, RESTART: share of the way to f(x) that each step of a draw leaves; () of others.
    """

    burn_in: int
    n_draws: int
    thin: int
    settle: int
    noise: int
    jitter: np.float32
    key_low: int
    key_high: int
    kept: np.ndarray


class Tile(NamedTuple):
    """Buffers of one tile, one set a thread; nothing in them outlives a call.

    Args:
        chain_ids: (subs * LANES,) int64 absolute chain ids.
        state, moved: (subs * dim * LANES,) fp32.
        hidden, other: (subs * widest layer * LANES,) fp32.
        pairs: the inputs of a layer as pairs of bf16, (subs * half of the widest layer * LANES,) int32; () with fp32.
        words, noise: (4 * LANES,) uint32 and fp32.
        residual: (subs * LANES,) fp32, of the last step run.
    """

    chain_ids: np.ndarray
    state: np.ndarray
    moved: np.ndarray
    hidden: np.ndarray
    other: np.ndarray
    pairs: np.ndarray
    words: np.ndarray
    noise: np.ndarray
    residual: np.ndarray


# Nothing is allocated here, so that arrays need no counts of references: each is an atomic operation that waits for all
# stores before it (a layer of 10 values: 2.1 ns a chain with them, 1.0 without).
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}


def _inner(function: Callable[..., Any]) -> Any:
    """Compile as a part of an `_entry`."""
    return numba.njit(**_OPTIONS)(function)


def _pasted(function: Callable[..., Any]) -> Any:
    """Compile inside its one caller: each level of calls would optimise all code below it once more (11 s, not 5)."""
    return numba.njit(**_OPTIONS, inline="always")(function)


def _entry(function: Callable[..., Any]) -> Any:
    """Compile at the first call, to run without the interpreter's lock; keep the code on disk if there is a place."""
    dispatcher = numba.njit(**_OPTIONS)(function)
    if IS_COMPILED and Path(__file__).is_file():  # the cache asks whether it has changed
        dispatcher._cache = CodeCache(function, code_folders)
    return dispatcher


# ---- scalar functions, which LLVM turns into vector code. All polynomials are fitted for least maximal error.


@intrinsic
def _fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c in one rounding where the processor can: said explicitly, not left to an optimiser's choice."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.f32"), args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def _bits(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def _from_bits(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


_f = np.float32
_ZERO, _HALF, _ONE, _TWO = _f(0), _f(0.5), _f(1), _f(2)


def _floats(*values: float) -> tuple[np.float32, ...]:
    return tuple(_f(value) for value in values)


@_inner
def _polynomial(x, coefficients):
    """Horner's rule, highest power first."""
    p = coefficients[0]
    for c in coefficients[1:]:
        p = _fma(p, x, c)
    return p


_ROUND = _f(1.5 * 2**23)  # adding it leaves the nearest whole number in the low bits
_LOG2E, _LN2_HIGH, _LN2_LOW = _floats(1.44269504, 0.693359375, -2.12194440e-4)
_EXP_LEAST, _EXP_MOST = _floats(-87, 88)
_EXP = _floats(0.00139504791, 0.00836888375, 0.041666206, 0.166665189, 0.50000001)


@_inner
def _exp(x):
    """e^x, arguments clamped to -87 .. 88, relative error below 2e-7; NaN stays NaN."""
    x = _EXP_LEAST if x < _EXP_LEAST else x
    x = _EXP_MOST if x > _EXP_MOST else x
    shifted = _fma(x, _LOG2E, _ROUND)
    whole = shifted - _ROUND
    r = _fma(whole, -_LN2_LOW, _fma(whole, -_LN2_HIGH, x))
    p = _fma(_polynomial(r, _EXP), r * r, r) + _ONE
    return _from_bits(np.int32(_bits(p) + (_bits(shifted) << 23)))


_TANH_NEAR = _f(0.625)
_TANH = _floats(-0.00571703656, 0.020650579, -0.0537434953, 0.133314912, -0.333332839)


@_inner
def _tanh(x):
    """tanh, error below 2e-7: an odd polynomial near 0, else 1 - 2 / (e^2|x| + 1)."""
    z = x * x
    near = _fma(_polynomial(z, _TANH), z * x, x)
    size = abs(x)
    far = _ONE - _TWO / (_exp(_TWO * size) + _ONE)
    far = -far if x < _ZERO else far
    return near if size < _TANH_NEAR else far


@_inner
def _sigmoid(x):
    return _ONE / (_ONE + _exp(-x))


_ERF_NEAR, _ERF_END = _floats(1, 4)
_ERF = _floats(7.88911953e-05, -0.000802084128, 0.00518953534, -0.0268544446, 0.112836002, -0.376126271, 1.12837917)
_ERFC = _floats(
    2.14961136e-05, -0.000439106373, 0.00419361109, -0.0251789678, 0.108372479, 0.633262612, 1.12955683, -0.000183444146
)


@_inner
def _erf(x):
    """erf, error below 2e-7: an odd polynomial up to 1, beyond it 1 - e^-p(|x|)."""
    near = x * _polynomial(x * x, _ERF)
    size = abs(x)
    far = _ONE - _exp(-_polynomial(_ERF_END if size > _ERF_END else size, _ERFC))
    far = -far if x < _ZERO else far
    return near if size < _ERF_NEAR else far


_SQRT_HALF, _SQRT_TWO_OVER_PI, _GELU_CUBE = _floats(0.5**0.5, (2 / np.pi) ** 0.5, 0.044715)


@_inner
def _gelu(x):
    return _HALF * x * (_ONE + _erf(x * _SQRT_HALF))


@_inner
def _gelu_tanh(x):
    return _HALF * x * (_ONE + _tanh(_SQRT_TWO_OVER_PI * (x + _GELU_CUBE * x * x * x)))


@_inner
def _silu(x):
    return x * _sigmoid(x)


_LOG = _floats(
    0.0691514694,
    -0.117896956,
    0.118730163,
    -0.123843703,
    0.142186554,
    -0.166692495,
    0.200022267,
    -0.249999866,
    0.333333104,
)
_MANTISSA, _SQRT_HALF_BITS = np.int32(0x007FFFFF), np.int32(0x3F3504F3)


@_inner
def _log(x):
    """ln x of a normal x > 0: ln(1 + f) = f - f^2 / 2 + f^3 p(f), the mantissa brought into [sqrt 1/2, sqrt 2)."""
    above = np.int32(_bits(x) - _SQRT_HALF_BITS)
    exponent = np.float32(above >> 23)
    f = _from_bits(np.int32((above & _MANTISSA) + _SQRT_HALF_BITS)) - _ONE
    z = f * f
    r = _fma(_polynomial(f, _LOG), z * f, exponent * _LN2_LOW)
    return _fma(exponent, _LN2_HIGH, _fma(-_HALF, z, r) + f)


# pi / 2 in three parts; the first two are so short that their products with 0 .. 4 are exact, fused or not
# too
_TWO_OVER_PI, _PI_HALF_HIGH, _PI_HALF_MID = _floats(2 / np.pi, 6433 / 2**12, 4021 / 2**24)
_PI_HALF_LOW = _f(np.pi / 2 - 6433 / 2**12 - 4021 / 2**24)
_SIN = _floats(-0.000195166547, 0.00833217353, -0.166666549)
_COS = _floats(2.44377282e-05, -0.00138873614, 0.0416666467)


@_inner
def _cos_sin(angle):
    """(cos, sin) of 0 <= angle <= 2 pi, reduced to a quarter turn around 0."""
    shifted = _fma(angle, _TWO_OVER_PI, _ROUND)
    quarter = shifted - _ROUND
    r = _fma(quarter, -_PI_HALF_MID, _fma(quarter, -_PI_HALF_HIGH, angle))
    r = _fma(quarter, -_PI_HALF_LOW, r)
    z = r * r
    sin = _fma(_polynomial(z, _SIN), z * r, r)
    cos = _fma(_polynomial(z, _COS), z * z, _fma(-_HALF, z, _ONE))
    q = _bits(shifted)
    c, s = (sin, cos) if q & 1 else (cos, sin)
    return (-c if (q + 1) & 2 else c), (-s if q & 2 else s)


# ---- one register block of a layer, in vector code written out: from loops, LLVM makes a third of the speed


class _Emitter:
    """Vector instructions on byte addresses (64-bit integers); operands are fp32, or pairs of bf16 in 32 bits."""

    def __init__(self, builder: Any, paired: bool) -> None:
        self.builder, self.paired = builder, paired
        self.vector = ir.VectorType(ir.FloatType(), VECTOR)
        self.operand = ir.VectorType(ir.IntType(32), VECTOR) if paired else self.vector
        if paired:
            binding.initialize_native_asmparser()

    def shift(self, address: Any, n_bytes: int) -> Any:
        return self.builder.add(address, ir.Constant(ir.IntType(64), n_bytes)) if n_bytes else address

    def load(self, address: Any, kind: Any) -> Any:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=4)

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, self.builder.inttoptr(address, self.vector.as_pointer()), align=4)

    def spread(self, scalar: Any) -> Any:
        empty = ir.Constant(ir.VectorType(scalar.type, VECTOR), ir.Undefined)
        first = self.builder.insert_element(empty, scalar, ir.Constant(ir.IntType(32), 0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), VECTOR), [0] * VECTOR)
        return self.builder.shuffle_vector(first, empty, lanes)

    def add_product(self, x: Any, w: Any, total: Any) -> Any:
        """total + x w in one rounding; of pairs, total + x0 w0 + x1 w1, by the instruction that LLVM 15 and 20 both
        know under one name only in assembler.
        """
        if not self.paired:
            kind = ir.FunctionType(self.vector, [self.vector] * 3)
            fma = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fmuladd.v{VECTOR}f32")
            return self.builder.call(fma, [x, w, total])
        kind = ir.FunctionType(self.vector, [self.operand, self.operand, self.vector])
        return self.builder.asm(kind, "vdpbf16ps $2, $1, $0", "=v,v,v,0", [x, w, total], False)

    def phi(self, kind: Any, first: Any, entry: Any) -> Any:
        phi = self.builder.phi(kind)
        phi.add_incoming(first, entry)
        return phi


def _emit_products(e: _Emitter, n_outputs: int, x: Any, w: Any, b: Any, n_in: Any) -> list[Any]:
    """Sums of one block, outputs x vectors: bias plus a loop over the inputs."""
    builder, int64 = e.builder, ir.IntType(64)
    starts = [e.spread(e.load(e.shift(b, 4 * m), e.vector.element)) for m in range(n_outputs)]
    entry, loop, after = builder.block, builder.append_basic_block("inputs"), builder.append_basic_block("summed")
    builder.branch(loop)
    builder.position_at_end(loop)
    k = e.phi(int64, ir.Constant(int64, 0), entry)
    x_at, w_at = e.phi(int64, x, entry), e.phi(int64, w, entry)
    sums = [e.phi(e.vector, starts[m], entry) for m in range(n_outputs) for _ in range(VECTORS)]
    inputs = [e.load(e.shift(x_at, 4 * VECTOR * v), e.operand) for v in range(VECTORS)]
    results = []
    for m in range(n_outputs):
        weight = e.spread(e.load(e.shift(w_at, 4 * m), e.operand.element))
        results += [e.add_product(inputs[v], weight, sums[m * VECTORS + v]) for v in range(VECTORS)]
    k_next = builder.add(k, ir.Constant(int64, 1))
    carried = [(k, k_next), (x_at, e.shift(x_at, _ROW_BYTES)), (w_at, e.shift(w_at, 4 * n_outputs))]
    for phi, value in [*carried, *zip(sums, results, strict=True)]:
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", k_next, n_in), loop, after)
    builder.position_at_end(after)
    return results


def _emit_store(e: _Emitter, sums: list[Any], y: Any, activation: int, slope: Any) -> None:
    zero = ir.Constant(e.vector, None)
    for i, value in enumerate(sums):
        if activation != NONE:
            below = zero if activation == RELU else e.builder.fmul(value, slope)
            value = e.builder.select(e.builder.fcmp_ordered("<", value, zero), below, value)
        m, v = divmod(i, VECTORS)
        e.store(value, e.shift(y, _ROW_BYTES * m + 4 * VECTOR * v))


def _emit_block(e: _Emitter, n_outputs: int, args: Any, end: Any) -> None:
    """Sub-tile after sub-tile: products, then the activation that can be done in registers, chosen at run time."""
    builder, int64 = e.builder, ir.IntType(64)
    _, subs, y, y_bytes, x, x_bytes, w, b, n_in, activation, slope, _ = args
    entry, loop, stored = builder.block, builder.append_basic_block("sub"), builder.append_basic_block("sub_stored")
    builder.branch(loop)
    builder.position_at_end(loop)
    left, y_at, x_at = e.phi(int64, subs, entry), e.phi(int64, y, entry), e.phi(int64, x, entry)
    sums = _emit_products(e, n_outputs, x_at, w, b, n_in)
    blocks = {code: builder.append_basic_block(f"activation{code}") for code in (NONE, RELU, LEAKY_RELU)}
    switch = builder.switch(activation, blocks[NONE])
    for code, block in blocks.items():
        if code != NONE:
            switch.add_case(ir.Constant(int64, code), block)
        builder.position_at_end(block)
        _emit_store(e, sums, y_at, code, e.spread(slope) if code == LEAKY_RELU else None)
        builder.branch(stored)
    builder.position_at_end(stored)
    left_next = builder.sub(left, ir.Constant(int64, 1))
    for phi, value in ((left, left_next), (y_at, builder.add(y_at, y_bytes)), (x_at, builder.add(x_at, x_bytes))):
        phi.add_incoming(value, stored)
    builder.cbranch(builder.icmp_signed(">", left_next, ir.Constant(int64, 0)), loop, end)


@intrinsic
def _dense_block(
    typingctx: Any,
    n_outputs: Any,
    subs: Any,
    y: Any,
    y_bytes: Any,
    x: Any,
    x_bytes: Any,
    w: Any,
    b: Any,
    n_in: Any,
    activation: Any,
    slope: Any,
    weights: Any,
) -> Any:
    """``n_outputs`` outputs (1 .. MAX_OUTPUTS) of ``subs`` sub-tiles (at least 1) of `LANES` chains.

    Args:
        n_outputs: picks one of MAX_OUTPUTS loops, each with its sums in registers.
        subs: sub-tiles, ``y_bytes`` and ``x_bytes`` apart.
        y, b: addresses of [output][lane] and [output] fp32.
        x, w: addresses of [input][lane] and [input][output], of the type of ``weights``.
        n_in: inputs, or pairs of them, at least 1.
        activation: code; those that cannot be done in registers are left to `_activate`.
        slope: of leaky_relu.
        weights: the array, for its type: fp32, or int32 for pairs of bf16.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = _Emitter(builder, paired=isinstance(weights.dtype, types.Integer))
        end = builder.append_basic_block("stored")
        cases = [builder.append_basic_block(f"outputs{m}") for m in range(1, MAX_OUTPUTS + 1)]
        switch = builder.switch(args[0], cases[0])
        for m, case in enumerate(cases, start=1):
            if m > 1:
                switch.add_case(ir.Constant(ir.IntType(64), m), case)
            builder.position_at_end(case)
            _emit_block(e, m, args, end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    word = types.int64
    return types.void(*[word] * 10, types.float32, weights), codegen


# ---- noise


_MULTIPLY_0, _MULTIPLY_1, _32_BITS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57), np.uint64(32)
_WEYL_0, _WEYL_1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_TO_UNIT, _TURN = _floats(2.0**-24, 2 * np.pi)


@_pasted
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


@_inner
def _unit(word):
    return np.float32(np.int32(word >> 8)) * _TO_UNIT


@_pasted
def _box_muller(words, normals):
    """Two rows of words -> two rows of standard normals."""
    for i in range(LANES):
        radius = np.sqrt(-_TWO * _log(_unit(words[i]) + _TO_UNIT))
        cos, sin = _cos_sin(_TURN * _unit(words[LANES + i]))
        normals[i] = radius * cos
        normals[LANES + i] = radius * sin


@_pasted
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


@_inner
def _clamp(x, low, high):
    """NaN stays NaN."""
    x = low if x < low else x
    return high if x > high else x


@_pasted
def _move_row(kind, e, source, target, scale, layers):
    """One value of `LANES` chains: target = source moved by the noise e, or start noise."""
    low, high, mid, half, span = layers.low, layers.high, layers.mid, layers.half, layers.span
    if kind == NORMAL:
        for i in range(LANES):
            target[i] = _clamp(source[i] + scale * (half * e[i]), low, high)
    elif kind == UNIFORM:
        for i in range(LANES):
            target[i] = _clamp(source[i] + scale * (half * (_TWO * e[i] - _ONE)), low, high)
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


@_inner
def _add_noise(kind, layers, steps, tile, dim, step, values):
    """Noise of ``step`` on the values of a tile, in place; the kinds of start noise, and RESTART, overwrite them."""
    normal = kind in (NORMAL, START_NORMAL, RESTART)
    for sub in range(len(tile.chain_ids) // LANES):
        chain_ids = tile.chain_ids[sub * LANES : (sub + 1) * LANES]
        for group in range((dim + 3) // 4):
            n_rows = min(4, dim - 4 * group)
            _noise_rows(chain_ids, group, step, steps, normal, n_rows, tile)
            for row in range(n_rows):
                at = (sub * dim + 4 * group + row) * LANES
                x, e = values[at : at + LANES], tile.noise[row * LANES : (row + 1) * LANES]
                _move_row(kind, e, x, x, steps.jitter, layers)


# ---- whole layers and steps


@_inner
def _activate(values, n, code):
    """Activations that need a polynomial, in place on ``n`` values.

    One loop whose length is known at run time only: loops of `LANES` values, 16 with AVX2, LLVM unrolls before it could
    make vector code of them (tanh: 24 clocks a value, 2.4 in vectors).
    """
    if code == GELU:
        for i in range(n):
            values[i] = _gelu(values[i])
    elif code == GELU_TANH:
        for i in range(n):
            values[i] = _gelu_tanh(values[i])
    elif code == SILU:
        for i in range(n):
            values[i] = _silu(values[i])
    elif code == TANH:
        for i in range(n):
            values[i] = _tanh(values[i])
    elif code == SIGMOID:
        for i in range(n):
            values[i] = _sigmoid(values[i])


_BF16_LAST, _BF16_BELOW_HALF, _BF16_NAN, _16_BITS = np.uint32(1), np.uint32(0x7FFF), np.uint32(0x7FC0), np.uint32(16)


@_inner
def _bf16(x):
    """Bits of x rounded to the nearest bf16, ties to even."""
    bits = np.uint32(_bits(x))
    rounded = np.uint32(bits + _BF16_BELOW_HALF + ((bits >> _16_BITS) & _BF16_LAST)) >> _16_BITS
    return _BF16_NAN if x != x else np.uint32(rounded)


@_pasted
def _round_to_pairs(values, subs, n_in, pairs):
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


@_pasted
def _layer(layers, index, subs, source, target, tile, activation):
    """One layer of a tile; a block of weights serves all sub-tiles before the next one is read."""
    n_in, n_out, n_blocks, first_weight, first_bias = layers.table[index]
    x, y = np.int64(source.ctypes.data), np.int64(target.ctypes.data)
    if len(tile.pairs) > 0:
        _round_to_pairs(source, subs, n_in, tile.pairs)
        x, n_in = np.int64(tile.pairs.ctypes.data), (n_in + 1) // 2
    w = np.int64(layers.weights.ctypes.data) + 4 * first_weight
    b = np.int64(layers.biases.ctypes.data) + 4 * first_bias
    least, n_larger = n_out // n_blocks, n_out % n_blocks
    for block in range(n_blocks):
        n = least + 1 if block < n_larger else least
        _dense_block(
            n, subs, y, n_out * _ROW_BYTES, x, n_in * _ROW_BYTES, w, b, n_in, activation, layers.slope, layers.weights
        )
        y += n * _ROW_BYTES
        w += 4 * n * n_in
        b += 4 * n
    if activation > LEAKY_RELU:
        _activate(target, subs * n_out * LANES, activation)


@_pasted
def _network(layers, subs, source, target, tile):
    """target = bound(MLP(source))."""
    n_layers = layers.table.shape[0]
    x, hidden, other = source, tile.hidden, tile.other
    for index in range(n_layers):
        hidden_layer = index < n_layers - 1
        y = hidden if hidden_layer else target
        _layer(layers, index, subs, x, y, tile, layers.activation if hidden_layer else layers.bound)
        x, hidden, other = hidden, other, hidden


@_pasted
def _residual(before, after, dim, residual):
    """max over dims of |after - before| of every lane; NaN stays NaN."""
    for sub in range(len(residual) // LANES):
        most = residual[sub * LANES : (sub + 1) * LANES]
        most[:] = _ZERO
        for d in range(dim):
            at = (sub * dim + d) * LANES
            x, y = before[at : at + LANES], after[at : at + LANES]
            for i in range(LANES):
                moved = abs(y[i] - x[i])
                most[i] = most[i] if most[i] >= moved or most[i] != most[i] else moved


@_pasted
def _step_back(before, after, n, kept):
    """after <- after - kept (after - before), in place on ``n`` values."""
    for i in range(n):
        after[i] = _fma(-kept, after[i] - before[i], after[i])


@_pasted
def _read_rows(rows, state, dim):
    n = rows.shape[0]
    for first in range(0, n, LANES):
        for row in range(first, min(first + LANES, n)):
            at = first * dim + row - first
            for d in range(dim):
                state[at] = rows[row, d]
                at += LANES


@_inner
def _write_rows(state, rows, dim):
    n = rows.shape[0]
    for first in range(0, n, LANES):
        for row in range(first, min(first + LANES, n)):
            at = first * dim + row - first
            for d in range(dim):
                rows[row, d] = state[at]
                at += LANES


@_pasted
def _advance_tile(layers, steps, tile, first_step, last_step, draws):
    """Steps of ``tile.state``, in place; the residual of the last one goes to ``tile.residual``."""
    dim, subs = layers.table[0, 0], len(tile.chain_ids) // LANES
    state, moved = tile.state, tile.moved
    for step in range(first_step, last_step):
        draw = max(0, (step - steps.burn_in) // steps.thin)
        draw_end = steps.burn_in + (draw + 1) * steps.thin
        if steps.noise in (NORMAL, UNIFORM, RESTART) and 0 < step < draw_end - steps.settle:
            _add_noise(steps.noise, layers, steps, tile, dim, step, state)
        _network(layers, subs, state, moved, tile)
        if step == last_step - 1:
            _residual(state, moved, dim, tile.residual)
        if steps.noise == UPSTREAM:
            _add_noise(steps.noise, layers, steps, tile, dim, step + 1, moved)
        if steps.noise == RESTART and step + 1 < draw_end:  # the last step of a draw goes all the way
            _step_back(state, moved, subs * dim * LANES, steps.kept[step + steps.thin - draw_end])
        if step + 1 == draw_end and draws.shape[0] > 0:
            _write_rows(moved, draws[:, draw], dim)
        state, moved = moved, state
    return state


@_entry
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
    dim, size = layers.table[0, 0], len(tile.chain_ids)
    keep = draws.shape[0] > 0
    for begin in range(0, len(chain_ids), size):
        end = min(begin + size, len(chain_ids))
        n = end - begin
        for i in range(n):
            tile.chain_ids[i] = chain_ids[begin + i]
        if start in (START_UNIFORM, START_NORMAL, RESTART):
            _add_noise(start, layers, steps, tile, dim, first_step, tile.state)
        else:
            _read_rows(state[begin:end], tile.state, dim)
        tile_draws = draws[begin:end] if keep else draws
        after = _advance_tile(layers, steps, tile, first_step, last_step, tile_draws)
        _write_rows(after, final[begin:end], dim)
        for i in range(n):
            residual[begin + i] = tile.residual[i]


@_entry
def _multiply_add(a, b, c):
    return _fma(a, b, c)


def fuses() -> bool:
    """Whether a multiply-add of this machine's loops rounds once; where it rounds twice, all bits are others."""
    a, b = np.float32(1 + 2**-12), np.float32(1 + 2**-11)
    return bool(_multiply_add(a, a, -b) != 0)
