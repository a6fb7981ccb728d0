"""Precisions: those that are asked for, and how a kernel computes them. Plain Python: no torch, no Triton."""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
"""What the kernels can be asked for."""

DevicePrecision = Literal["fp16x3", "ieee", "tf32", "fp16", "bf16"]
"""How a kernel computes: "fp16x3" is fp32 by three fp16 products, "ieee" is fp32 by plain fp32 products."""

OPERAND_BYTES: dict[str, int] = {"fp16x3": 2, "ieee": 4, "tf32": 4, "fp16": 2, "bf16": 2}
"""Bytes of one operand of a product."""

FP16_LARGEST = 65504.0
BF16_LARGEST = 3.3895313892515355e38
FP32_LARGEST = 3.4028234663852886e38
LARGEST_OPERANDS = {"fp32": FP32_LARGEST, "tf32": FP32_LARGEST, "fp16": FP16_LARGEST, "bf16": BF16_LARGEST}
"""Beyond them a value of fp32 or fp64 rounds to infinity, but for half a last place."""
SPLIT_LARGEST = 6e4  # fp16x3: the high half must not round to infinity
SPLIT_SMALLEST = 2.0**-6  # fp16x3: a layer whose largest weight is below loses bits of the low half (spacing 6e-8)
FP16_SMALLEST = 2.0**-14  # fp16: below it all weights of a layer are subnormal


class WeightsRange(NamedTuple):
    """Sizes of a network's weights: what decides which device precision they fit.

    Args:
        largest: the largest size of a weight or bias.
        smallest: the least, over the layers, of the largest size of a weight; layers of zeros are left out.
    """

    largest: float
    smallest: float


USUAL = WeightsRange(1.0, 1.0)
"""A range that fits every precision, as those of nearly all trained networks do; plans without weights take it."""


def device_precision(precision: str, weights: WeightsRange) -> DevicePrecision:
    """How the kernels compute ``precision``: "fp32" as "fp16x3" where the weights' range allows, else as "ieee".

    Raises:
        ValueError: unknown precision, or weights outside of its range.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: the kernels know {', '.join(PRECISIONS)}")
    largest, smallest = weights
    if not largest < float("inf"):
        raise ValueError(f"the largest weight is {largest} as fp32: the kernels need values that fp32 holds")
    if precision == "fp16":
        if largest > FP16_LARGEST:
            raise ValueError(
                f"precision 'fp16': the largest weight is {largest:.3g}, at most 65504 fits; use 'bf16' or 'fp32'"
            )
        if smallest < FP16_SMALLEST:
            raise ValueError(
                f"precision 'fp16': a layer has no weight above {smallest:.3g}, below 6.1e-5 fp16 loses its bits; "
                "use 'bf16' or 'fp32'"
            )
    if precision == "bf16" and largest > BF16_LARGEST:
        raise ValueError(f"precision 'bf16': the largest weight is {largest:.3g}, at most 3.39e38 fits; use 'fp32'")
    if precision == "fp32":
        return "fp16x3" if largest < SPLIT_LARGEST and smallest >= SPLIT_SMALLEST else "ieee"
    return cast("DevicePrecision", precision)


def usual_precision(precision: str) -> DevicePrecision:
    """The device precision of weights of the usual range; a device precision stands for itself."""
    return cast("DevicePrecision", precision) if precision in OPERAND_BYTES else device_precision(precision, USUAL)


def in_words(precision: DevicePrecision | str) -> str:
    """A device precision as a person knows it."""
    return {"fp16x3": "fp32", "ieee": "fp32 by plain products"}.get(precision, precision)


def operand_parts(precision: DevicePrecision | str) -> int:
    """Operands that hold one value: high and low part of split fp32, else one."""
    return 2 if precision == "fp16x3" else 1
