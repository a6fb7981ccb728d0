"""Scalar functions, which LLVM turns into vector code. All polynomials are fitted for least maximal error."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kaleido_fast.engines.loops.arrays import GELU, GELU_TANH, SIGMOID, SILU, TANH
from kaleido_fast.engines.loops.compiling import inner, intrinsic, wide_vectors


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c in one rounding where the processor can: said explicitly, not left to an optimiser's choice."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.f32"), args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def bits(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def from_bits(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


_f = np.float32
ZERO, HALF, ONE, TWO = _f(0), _f(0.5), _f(1), _f(2)


def floats(*values: float) -> tuple[np.float32, ...]:
    return tuple(_f(value) for value in values)


@inner
def _polynomial(x, coefficients):
    """Horner's rule, highest power first."""
    p = coefficients[0]
    for c in coefficients[1:]:
        p = fma(p, x, c)
    return p


_ROUND = _f(1.5 * 2**23)  # adding it leaves the nearest whole number in the low bits
_LOG2E, _LN2_HIGH, _LN2_LOW = floats(1.44269504, 0.693359375, -2.12194440e-4)
_EXP_LEAST, _EXP_MOST = floats(-87, 88)
_EXP = floats(0.00139504791, 0.00836888375, 0.041666206, 0.166665189, 0.50000001)


@inner
def _exp(x):
    """e^x, arguments clamped to -87 .. 88, relative error below 2e-7; NaN stays NaN."""
    x = _EXP_LEAST if x < _EXP_LEAST else x
    x = _EXP_MOST if x > _EXP_MOST else x
    shifted = fma(x, _LOG2E, _ROUND)
    whole = shifted - _ROUND
    r = fma(whole, -_LN2_LOW, fma(whole, -_LN2_HIGH, x))
    p = fma(_polynomial(r, _EXP), r * r, r) + ONE
    return from_bits(np.int32(bits(p) + (bits(shifted) << 23)))


_TANH_NEAR = _f(0.625)
_TANH = floats(-0.00571703656, 0.020650579, -0.0537434953, 0.133314912, -0.333332839)


@inner
def _tanh(x):
    """tanh, error below 2e-7: an odd polynomial near 0, else 1 - 2 / (e^2|x| + 1)."""
    z = x * x
    near = fma(_polynomial(z, _TANH), z * x, x)
    size = abs(x)
    far = ONE - TWO / (_exp(TWO * size) + ONE)
    far = -far if x < ZERO else far
    return near if size < _TANH_NEAR else far


@inner
def _sigmoid(x):
    return ONE / (ONE + _exp(-x))


_ERF_NEAR, _ERF_END = floats(1, 4)
_ERF = floats(7.88911953e-05, -0.000802084128, 0.00518953534, -0.0268544446, 0.112836002, -0.376126271, 1.12837917)
_ERFC = floats(
    2.14961136e-05, -0.000439106373, 0.00419361109, -0.0251789678, 0.108372479, 0.633262612, 1.12955683, -0.000183444146
)


@inner
def _erf(x):
    """erf, error below 2e-7: an odd polynomial up to 1, beyond it 1 - e^-p(|x|)."""
    near = x * _polynomial(x * x, _ERF)
    size = abs(x)
    far = ONE - _exp(-_polynomial(_ERF_END if size > _ERF_END else size, _ERFC))
    far = -far if x < ZERO else far
    return near if size < _ERF_NEAR else far


_SQRT_HALF, _SQRT_TWO_OVER_PI, _GELU_CUBE = floats(0.5**0.5, (2 / np.pi) ** 0.5, 0.044715)


@inner
def _gelu(x):
    return HALF * x * (ONE + _erf(x * _SQRT_HALF))


@inner
def _gelu_tanh(x):
    return HALF * x * (ONE + _tanh(_SQRT_TWO_OVER_PI * (x + _GELU_CUBE * x * x * x)))


@inner
def _silu(x):
    return x * _sigmoid(x)


_LOG = floats(
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


@inner
def log(x):
    """ln x of a normal x > 0: ln(1 + f) = f - f^2 / 2 + f^3 p(f), the mantissa brought into [sqrt 1/2, sqrt 2)."""
    above = np.int32(bits(x) - _SQRT_HALF_BITS)
    exponent = np.float32(above >> 23)
    f = from_bits(np.int32((above & _MANTISSA) + _SQRT_HALF_BITS)) - ONE
    z = f * f
    r = fma(_polynomial(f, _LOG), z * f, exponent * _LN2_LOW)
    return fma(exponent, _LN2_HIGH, fma(-HALF, z, r) + f)


# pi / 2 in three parts; the first two are so short that their products with 0 .. 4 are exact, fused or not
# too
_TWO_OVER_PI, _PI_HALF_HIGH, _PI_HALF_MID = floats(2 / np.pi, 6433 / 2**12, 4021 / 2**24)
_PI_HALF_LOW = _f(np.pi / 2 - 6433 / 2**12 - 4021 / 2**24)
_SIN = floats(-0.000195166547, 0.00833217353, -0.166666549)
_COS = floats(2.44377282e-05, -0.00138873614, 0.0416666467)


@inner
def cos_sin(angle):
    """(cos, sin) of 0 <= angle <= 2 pi, reduced to a quarter turn around 0."""
    shifted = fma(angle, _TWO_OVER_PI, _ROUND)
    quarter = shifted - _ROUND
    r = fma(quarter, -_PI_HALF_MID, fma(quarter, -_PI_HALF_HIGH, angle))
    r = fma(quarter, -_PI_HALF_LOW, r)
    z = r * r
    sin = fma(_polynomial(z, _SIN), z * r, r)
    cos = fma(_polynomial(z, _COS), z * z, fma(-HALF, z, ONE))
    q = bits(shifted)
    c, s = (sin, cos) if q & 1 else (cos, sin)
    return (-c if (q + 1) & 2 else c), (-s if q & 2 else s)


@inner
def activate(values, n, code):
    """Activations that need a polynomial, in place on ``n`` values.

    One loop whose length is known at run time only: loops of `LANES` values, 16 with AVX2, LLVM unrolls before it could
    make vector code of them (tanh: 24 clocks a value, 2.4 in vectors).
    """
    wide_vectors()
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
