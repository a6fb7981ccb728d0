"""Conversion from one type to another: what the rule of ``cvt`` computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kaleido_kernels.proving.emulation.kinds import F32, HELD, KINDS, U32, U64, Array, Kind, rounded_bf16, rounded_tf32
from kaleido_kernels.proving.emulation.ptx import Instruction

Compute = Callable[..., Array]
Form = tuple[Compute, tuple[Kind, ...], Kind]
"""What is computed, from what, giving what."""


def converted(instruction: Instruction) -> Form:
    """cvt from one type to another; two fp32 into a packed pair, the first source above the second."""
    parts = instruction.parts
    result, source = KINDS[parts[-2]], KINDS[parts[-1]]
    relu = "relu" in parts
    if result.name in ("f16x2", "bf16x2"):

        def pack(high: Array, low: Array) -> Array:
            halves = [_short(value, result, relu).astype(U32) for value in (high, low)]
            return halves[0] << U32(16) | halves[1]

        return pack, (source, source), KINDS["b32"]
    if result.name == "tf32":
        return rounded_tf32, (source,), KINDS["b32"]
    if result.name in ("f16", "bf16"):
        return lambda x: _short(x, result, relu), (source,), KINDS["b16"]
    if source.floating and not result.floating:
        return _to_integer(parts[1], result), (source,), result
    if result.floating:
        return lambda x: x.astype(result.seen), (source,), result
    return lambda x: _extended(x).astype(HELD[result.width]), (source,), KINDS[result.width]


def _short(values: Array, kind: Kind, relu: bool) -> Array:
    """fp32 as bits of fp16 or bf16; with ``relu`` what is below zero is zero and NaN stays NaN."""
    if relu:
        values = np.where(np.isnan(values), values, np.maximum(values, F32(0)))
    return rounded_bf16(values) if kind.name.startswith("bf16") else values.astype(np.float16).view(np.uint16)


def _to_integer(rounding: str, result: Kind) -> Compute:
    """fp32 to 32 bits: what does not fit is cut to the nearest that does, NaN is 0."""
    rounded = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}[rounding]
    limits = np.iinfo(result.seen)

    def compute(x: Array) -> Array:
        inside = np.nan_to_num(rounded(x).astype(np.float64), nan=0.0).clip(float(limits.min), float(limits.max))
        return inside.astype(np.int64).astype(result.seen)

    return compute


def _extended(x: Array) -> Array:
    """Integers in 64 bits: signed ones keep their sign."""
    return x.astype(np.int64).view(U64) if x.dtype.kind == "i" else x.astype(U64)
