"""Weights as the narrow kernel reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kaleido_kernels.narrow.plan import BIAS_COLUMNS, NarrowLayout, narrow_layout, narrow_sizes
from kaleido_kernels.packing import (
    OPERAND_TYPES,
    Layers,
    check_layers,
    device_precision,
    host_zeros,
    padded,
    round_operand,
    split_operand,
)
from kaleido_kernels.shapes import NetShape

BIAS_ROWS = 16  # least inner size of a product
SATURATE = 30.0  # tanh(30) and sigmoid(30) are 1 in fp32: the last layer hands the constant column on through the bound


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
    """Pack for `launch_narrow`. ``precision`` is a device precision, or one asked for.

    Raises:
        ValueError: weights that do not fit the shape or the precision.
    """
    check_layers(layers, shape)
    form, layout = device_precision(layers, precision), narrow_layout(shape)
    sizes = narrow_sizes(shape.n_layers, layout)
    matrices, bias_rows = [], []
    for index, (weight, bias) in enumerate(layers):
        rows, columns = sizes[index]
        matrix = padded(weight.detach().cpu().t(), rows, columns)
        parts = _bias_parts(None if bias is None else bias.detach().cpu(), shape.widths[index + 1], form)
        if layout.bias == "fold":
            keep = SATURATE if index == shape.n_layers - 1 else 1.0
            _fold_bias(matrix, parts, shape.widths[index], shape.widths[index + 1], keep)
        matrices.append(matrix.flatten())
        bias_rows.append(padded(parts, BIAS_ROWS, columns).flatten())
    high, low = split_operand(torch.cat(matrices), form)
    rows_tensor = torch.cat(bias_rows) if layout.bias == "mma" else host_zeros(16)
    rows_tensor = rows_tensor.to(OPERAND_TYPES[form])
    high = high.to(device)
    low = low.to(device) if form == "fp16x3" else high
    return PackedNarrow(shape, form, layout, high, low, rows_tensor.to(device))


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
