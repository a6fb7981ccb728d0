"""Sizes and memory of the stream kernel: plain Python, no torch, no Triton."""

from __future__ import annotations

from dataclasses import dataclass

from kaleido_kernels.precision import OPERAND_BYTES, operand_parts
from kaleido_kernels.shapes import NetShape, next_power_of_two
from kaleido_kernels.tile import Tile

STREAM_TILE = 128
"""Columns of a weight tile of the stream kernel."""
STREAM_EDGE = 16
"""Most columns of states that the stream kernel handles at once, outside of its loop: more take more registers."""


@dataclass(frozen=True)
class StreamLayout:
    """Sizes of the stream kernel's operands, from the shape alone.

    Args:
        width: padded width of every layer, first and last included: a power of two from 16 to 256.
        tile: columns of one weight tile: ``width``, or half of it at 256.
        edge: columns of outputs that are handled at once outside of the loop.
        n_tiles: weight tiles of a step.
        last_tiles: how many of them belong to the last layer.
    """

    width: int
    tile: int
    edge: int
    n_tiles: int
    last_tiles: int


def stream_layout(shape: NetShape) -> StreamLayout:
    """Padded sizes of ``shape``.

    Raises:
        ValueError: a layer wider than 256.
    """
    width = next_power_of_two(max(shape.widths))
    if width > 2 * STREAM_TILE:
        raise ValueError(f"a layer is {max(shape.widths)} wide: the stream kernel takes up to 256; use the wide kernel")
    tile = min(width, STREAM_TILE)
    last_tiles = -(-shape.dim // tile)
    n_tiles = (shape.n_layers - 1) * (width // tile) + last_tiles
    return StreamLayout(width, tile, min(next_power_of_two(shape.dim), STREAM_EDGE), n_tiles, last_tiles)


def stream_shared(shape: NetShape, precision: str, tile: Tile) -> int:
    """Shared memory of a stream program in bytes, estimated: weight tiles in flight and the operand of the product."""
    layout, item = stream_layout(shape), OPERAND_BYTES[precision] * operand_parts(precision)
    return (tile.num_stages * layout.width * layout.tile + tile.block_chains * layout.width) * item
