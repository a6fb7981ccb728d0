"""Weights as the kernels read them: padded, tiled, split, on the host and once per model.

Every kernel multiplies rows of chains by matrices (in, out): weights are stored transposed from torch's (out, in).
Padding is zeros; a padded input value meets a zero row, a padded output is never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from kaleido_kernels.precision import DevicePrecision, WeightsRange
from kaleido_kernels.precision import device_precision as precision_within
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.tiles import (
    BIAS_COLUMNS,
    NarrowLayout,
    StreamLayout,
    narrow_layout,
    narrow_sizes,
    stream_layout,
)

Layers = Sequence[tuple[Tensor, Tensor | None]]
"""One (weight (out, in), bias (out,) or None) a layer, fp32."""

OPERAND_TYPES = {
    "fp16x3": torch.float16,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "ieee": torch.float32,
}
BIAS_ROWS = 16  # least inner size of a product
SATURATE = 30.0  # tanh(30) and sigmoid(30) are 1 in fp32: the last layer hands the constant column on through the bound


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


@dataclass(frozen=True)
class PackedNarrow:
    """A network as `narrow_kernel` reads it.

    Args:
        shape: what was packed.
        precision: "fp16x3", "ieee", "tf32", "fp16" or "bf16".
        layout: padded sizes.
        high, low: all matrices one after another, flat: (dim_padded, width), (width, width) ..., (width, dim_padded).
        bias_rows: "mma": (16, padded out) a layer, flat, row 0 the high and row 1 the low part; else one unused value.
    """

    shape: NetShape
    precision: str
    layout: NarrowLayout
    high: Tensor
    low: Tensor
    bias_rows: Tensor


def pack_narrow(layers: Layers, shape: NetShape, precision: str, device: torch.device | str = "cpu") -> PackedNarrow:
    """Pack for `kaleido_kernels.narrow`. ``precision`` is one of `PRECISIONS`.

    Raises:
        ValueError: weights that do not fit the shape or the precision.
    """
    check_layers(layers, shape)
    form, layout = device_precision(layers, precision), narrow_layout(shape)
    sizes = narrow_sizes(shape.n_layers, layout)
    matrices, bias_rows = [], []
    for index, (weight, bias) in enumerate(layers):
        rows, columns = sizes[index]
        matrix = _pad(weight.detach().cpu().t(), rows, columns)
        parts = _bias_parts(None if bias is None else bias.detach().cpu(), shape.widths[index + 1], form)
        if layout.bias == "fold":
            keep = SATURATE if index == shape.n_layers - 1 else 1.0
            _fold_bias(matrix, parts, shape.widths[index], shape.widths[index + 1], keep)
        matrices.append(matrix.flatten())
        bias_rows.append(_pad(parts, BIAS_ROWS, columns).flatten())
    high, low = split_operand(torch.cat(matrices), form)
    rows_tensor = torch.cat(bias_rows) if layout.bias == "mma" else host_zeros(16)
    rows_tensor = rows_tensor.to(OPERAND_TYPES[form])
    high = high.to(device)
    low = low.to(device) if form == "fp16x3" else high
    return PackedNarrow(shape, form, layout, high, low, rows_tensor.to(device))


def _pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    padded = host_zeros(rows, columns)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded


def _bias_parts(bias: Tensor | None, n_out: int, precision: str) -> Tensor:
    """(2, n_out) fp32: the bias rounded to an operand, and what rounding left; zeros without a bias."""
    if bias is None:
        return host_zeros(BIAS_COLUMNS, n_out)
    high = round_operand(bias, precision)
    return torch.stack((high, bias - high))


def _fold_bias(matrix: Tensor, parts: Tensor, n_in: int, n_out: int, keep: float) -> None:
    """Write the bias into the rows that meet the constant-1 columns, and hand these columns on to the next layer."""
    for part in range(BIAS_COLUMNS):
        matrix[n_in + part, :n_out] = parts[part]
        matrix[n_in + part, n_out + part] = keep


@dataclass(frozen=True)
class PackedStream:
    """A network as `stream_kernel` reads it.

    Args:
        shape: what was packed.
        precision: "fp16x3", "ieee", "tf32", "fp16" or "bf16".
        layout: padded sizes.
        high, low: (n_tiles, width, tile), the tiles in the order of their use.
        bias: (n_tiles, tile) fp32.
    """

    shape: NetShape
    precision: str
    layout: StreamLayout
    high: Tensor
    low: Tensor
    bias: Tensor


def pack_stream(layers: Layers, shape: NetShape, precision: str, device: torch.device | str = "cpu") -> PackedStream:
    """Pack for `kaleido_kernels.stream`. ``precision`` is one of `PRECISIONS`.

    Raises:
        ValueError: weights that do not fit the shape, the precision or the kernel.
    """
    check_layers(layers, shape)
    form, layout = device_precision(layers, precision), stream_layout(shape)
    tiles, biases = [], []
    for weight, bias in layers:
        matrix = _pad(weight.detach().cpu().t(), layout.width, layout.width)
        row = host_zeros(1, weight.shape[0]) if bias is None else bias.detach().cpu()[None]
        tiles += list(matrix.split(layout.tile, dim=1))
        biases += list(_pad(row, 1, layout.width)[0].split(layout.tile))
    high, low = split_operand(torch.stack(tiles[: layout.n_tiles]), form)
    high = high.to(device)
    low = low.to(device) if form == "fp16x3" else high
    return PackedStream(shape, form, layout, high, low, torch.stack(biases[: layout.n_tiles]).to(device))
