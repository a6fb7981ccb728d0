"""Sizes and memory of the narrow kernel: plain Python, no torch, no Triton."""

from __future__ import annotations

from dataclasses import dataclass

from kaleido_kernels.precision import OPERAND_BYTES, operand_parts
from kaleido_kernels.shapes import NetShape, next_power_of_two
from kaleido_kernels.tile import Tile

BIAS_COLUMNS = 2
"""Spare columns that a folded bias takes: high and low part."""


@dataclass(frozen=True)
class NarrowLayout:
    """Sizes of the narrow kernel's operands, from the shape alone.

    Args:
        width: padded width of the hidden layers, a power of two from 16.
        dim_padded: padded D, likewise.
        bias: "fold" (constant-1 columns carry the bias inside the products), "mma" (a product of its own) or "none".
    """

    width: int
    dim_padded: int
    bias: str


def narrow_layout(shape: NetShape) -> NarrowLayout:
    """Padded sizes of ``shape``, and how its bias is added.

    Folding needs two spare columns everywhere and an activation that keeps 1 at 1. It takes no instruction at all;
    a product of its own costs 16 more inner rows a layer (25 % at width 64, 14 % at 128).
    """
    width, dim_padded = next_power_of_two(max(shape.hidden, 1)), next_power_of_two(shape.dim)
    if not any(shape.bias):
        return NarrowLayout(width, dim_padded, "none")
    spare = shape.hidden + BIAS_COLUMNS <= width and shape.dim + BIAS_COLUMNS <= dim_padded
    folds = spare and shape.activation in ("relu", "leaky_relu")
    return NarrowLayout(width, dim_padded, "fold" if folds else "mma")


def narrow_sizes(n_layers: int, layout: NarrowLayout) -> list[tuple[int, int]]:
    """Padded (in, out) of each layer of the narrow kernel."""
    inner = [layout.width] * (n_layers - 1)
    edges = [layout.dim_padded, *inner, layout.dim_padded]
    return [(edges[i], edges[i + 1]) for i in range(n_layers)]


def narrow_shared(shape: NetShape, precision: str, tile: Tile) -> int:
    """Shared memory of a narrow program in bytes: all matrices, bias rows that are apart, a layout change of states.

    Exact for the reference networks on sm_90.
    """
    layout, item = narrow_layout(shape), OPERAND_BYTES[precision]
    sizes = narrow_sizes(shape.n_layers, layout)
    weights = sum(rows * cols for rows, cols in sizes) * operand_parts(precision)
    bias = 16 * sum(cols for _, cols in sizes) if layout.bias == "mma" else 0
    return (weights + bias) * item + 4 * tile.block_chains * layout.dim_padded
