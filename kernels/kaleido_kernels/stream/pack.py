"""Weights as the stream kernel reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kaleido_kernels.packing import Layers, check_layers, device_precision, host_zeros, padded, split_operand
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.stream.plan import StreamLayout, stream_layout


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
    """Pack for `launch_stream`. ``precision`` is a device precision, or one asked for.

    Raises:
        ValueError: weights that do not fit the shape, the precision or the kernel.
    """
    check_layers(layers, shape)
    form, layout = device_precision(layers, precision), stream_layout(shape)
    tiles, biases = [], []
    for weight, bias in layers:
        matrix = padded(weight.detach().cpu().t(), layout.width, layout.width)
        row = host_zeros(1, weight.shape[0]) if bias is None else bias.detach().cpu()[None]
        tiles += list(matrix.split(layout.tile, dim=1))
        biases += list(padded(row, 1, layout.width)[0].split(layout.tile))
    high, low = split_operand(torch.stack(tiles[: layout.n_tiles]), form)
    high = high.to(device)
    low = low.to(device) if form == "fp16x3" else high
    return PackedStream(shape, form, layout, high, low, torch.stack(biases[: layout.n_tiles]).to(device))
