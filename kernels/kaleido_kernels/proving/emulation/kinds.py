"""Types of values: how PTX names them, how registers hold them, how numpy sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""One value a thread."""
U16, U32, U64, F32 = np.uint16, np.uint32, np.uint64, np.float32
HELD: dict[str, Any] = {"pred": np.bool_, "b16": U16, "b32": U32, "b64": U64}
"""Width of a register -> how it is held: bits, whatever they mean."""
POISON = {"pred": False, "b16": 0xFFFF, "b32": 0x7FFFFFFF, "b64": 2**64 - 1}
"""What a register holds that nothing was written to: NaN, or an address in no tensor."""


@dataclass(frozen=True)
class Kind:
    """A type as an opcode's modifier names it.

    Args:
        name: such as "s32".
        width: of the register that holds it.
        seen: numpy's type of it; a packed pair has that of one of its halves.
        floating: whether it is a floating-point number.
        size: bytes in memory.
    """

    name: str
    width: str
    seen: Any
    floating: bool = False
    size: int = 4

    @property
    def bits(self) -> int:
        """Bits of the register."""
        return int(self.width[1:])


_INTEGERS = [
    Kind(f"{letter}{bits}", f"b{max(bits, 16)}", np.dtype(f"{'i' if letter == 's' else 'u'}{max(bits, 16) // 8}").type,
         size=bits // 8)
    for bits in (8, 16, 32, 64)
    for letter in "sub"
]  # fmt: skip
KINDS = {kind.name: kind for kind in _INTEGERS} | {
    "pred": Kind("pred", "pred", np.bool_, size=1),
    "f16": Kind("f16", "b16", np.float16, True, 2),
    "bf16": Kind("bf16", "b16", F32, True, 2),
    "f32": Kind("f32", "b32", F32, True, 4),
    "tf32": Kind("tf32", "b32", F32, True, 4),
    "f64": Kind("f64", "b64", np.float64, True, 8),
    "f16x2": Kind("f16x2", "b32", np.float16, True, 4),
    "bf16x2": Kind("bf16x2", "b32", F32, True, 4),
}


def seen(held: Array, kind: Kind) -> Array:
    """Bits as values; 16-bit brain floats as fp32, packed pairs as twice as many values."""
    if kind.name == "bf16":
        return widened(held)
    if kind.name == "bf16x2":
        return widened(held.view(U16))
    return held if held.dtype.type is kind.seen else held.view(kind.seen)


def held(values: Array, kind: Kind) -> Array:
    """Values as bits, rounded to nearest even where the type is shorter."""
    if kind.name == "bf16":
        return rounded_bf16(values)
    if kind.name == "bf16x2":
        return rounded_bf16(values).view(U32)
    if values.dtype.type is not kind.seen:
        values = values.astype(kind.seen)
    target = HELD[kind.width]
    return values if values.dtype.type is target else np.ascontiguousarray(values).view(target)


def widened(bits: Array) -> Array:
    """Bits of bf16 as fp32 values."""
    return (bits.astype(U32) << U32(16)).view(F32)


def rounded_bf16(values: Array) -> Array:
    """fp32 values as bits of bf16, to nearest even; every NaN is the canonical one, as cvt makes it."""
    bits = np.ascontiguousarray(values, dtype=F32).view(U32).astype(U64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(U16)
    return np.where(np.isnan(values), U16(0x7FFF), rounded)


def cut_tf32(bits: Array) -> Array:
    """fp32 as the matrix units read it in a product of TF32: the last 13 bits do not count."""
    return (bits & U32(0xFFFFE000)).view(F32)


def rounded_tf32(values: Array) -> Array:
    """fp32 values rounded to TF32, ties away from zero (cvt.rna), as fp32 bits."""
    bits = np.ascontiguousarray(values, dtype=F32).view(U32)
    return np.where(np.isnan(values), bits, (bits + U32(0x1000)) & U32(0xFFFFE000))


def flushed(values: Array) -> Array:
    """Subnormal fp32 values as zeros of the same sign (modifier ``.ftz``)."""
    return np.where(np.abs(values) < F32(2.0**-126), np.copysign(F32(0), values), values)
