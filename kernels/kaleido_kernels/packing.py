"""Weights as the kernels read them: padded, tiled, split, on the host and once per model.

Every kernel multiplies rows of chains by matrices (in, out): weights are stored transposed from torch's (out, in).
Padding is zeros; a padded input value meets a zero row, a padded output is never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from kaleido_kernels.precision import DevicePrecision, WeightsRange
from kaleido_kernels.precision import device_precision as precision_within
from kaleido_kernels.shapes import NetShape

Layers = Sequence[tuple[Tensor, Tensor | None]]
"""One (weight (out, in), bias (out,) or None) a layer, fp32."""

OPERAND_TYPES = {
    "fp16x3": torch.float16,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "ieee": torch.float32,
}


def device_precision(layers: Layers, precision: str) -> DevicePrecision:
    """How the kernels compute ``precision`` with these weights: see `kaleido_kernels.precision.device_precision`.

    "fp16x3" and "ieee" were decided before and stand.

    Raises:
        ValueError: unknown precision, weights that are not finite, or outside the range of the mode.
    """
    for index, (weight, bias) in enumerate(layers):
        for name, tensor in (("weight", weight), ("bias", bias)):
            size = _largest(tensor)
            if not size < float("inf"):  # also true of NaN
                raise ValueError(f"layer {index}: {name} holds {size}: every value must be finite")
    if precision in ("fp16x3", "ieee"):
        return cast("DevicePrecision", precision)
    return precision_within(precision, weights_range(layers))


def weights_range(layers: Layers) -> WeightsRange:
    """Sizes of the weights."""
    weights = [_largest(weight) for weight, _ in layers]
    largest = max(weights + [_largest(bias) for _, bias in layers])
    return WeightsRange(largest, min((size for size in weights if size > 0), default=1.0))


def _largest(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None or not tensor.numel() else float(tensor.detach().abs().max())


def check_layers(layers: Layers, shape: NetShape) -> None:
    """Refuse weights that do not fit ``shape``."""
    if len(layers) != shape.n_layers:
        raise ValueError(f"{len(layers)} layers of weights for a shape of {shape.n_layers} layers: they must agree")
    for index, (weight, bias) in enumerate(layers):
        want = (shape.widths[index + 1], shape.widths[index])
        if tuple(weight.shape) != want or weight.dtype != torch.float32:
            raise ValueError(
                f"layer {index}: weight is {tuple(weight.shape)} {weight.dtype}: it must be {want} float32"
            )
        if (bias is not None) != shape.bias[index]:
            raise ValueError(f"layer {index}: shape.bias says {shape.bias[index]}, the weights say {bias is not None}")
        if bias is not None and tuple(bias.shape) != want[:1]:
            raise ValueError(f"layer {index}: bias is {tuple(bias.shape)}: it must be {want[:1]}")


def host_zeros(*shape: int) -> Tensor:
    """fp32 zeros in main memory, whatever the host program's default type and device."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def round_tf32(x: Tensor) -> Tensor:
    """fp32 values rounded to 10 bits of mantissa, ties to even: tensor cores would cut the rest off instead."""
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF
    return torch.where(torch.isfinite(x), rounded.view(torch.float32), x)


def round_operand(x: Tensor, precision: str) -> Tensor:
    """fp32 values as an operand of a device precision holds them (fp16x3: its high half), still fp32."""
    if precision == "tf32":
        return round_tf32(x)
    return x if precision == "ieee" else x.to(OPERAND_TYPES[precision]).to(torch.float32)


def split_operand(x: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """(high, low) operands of fp32 ``x``; low is high itself except for fp16x3, where high + low has 22 bits."""
    if precision == "tf32":
        high = round_tf32(x)
        return high, high
    high = x.to(OPERAND_TYPES[precision])
    if precision != "fp16x3":
        return high, high
    return high, (x - high.to(torch.float32)).to(torch.float16)


def padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """``matrix`` in the corner of (rows, columns) zeros."""
    result = host_zeros(rows, columns)
    result[: matrix.shape[0], : matrix.shape[1]] = matrix
    return result
