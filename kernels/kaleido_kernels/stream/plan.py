"""The stream kernel as a `kaleido_kernels.kernels.Plan`: tiles, sizes, memory. Plain Python: no torch, no Triton."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from kaleido_kernels.activations import ACTIVATIONS
from kaleido_kernels.precision import OPERAND_BYTES, operand_parts
from kaleido_kernels.shapes import NetShape, next_power_of_two
from kaleido_kernels.tile import MAX_REGISTERS, REGISTERS, GpuFacts, Tile, too_many_registers, too_much_shared, too_wide

BY_DEFAULT, TAKES_CHECKS = True, True
VERDICTS = ("no stack",)
tile_of = partial(Tile, "stream")

STREAM_TILE = 128
"""Columns of a weight tile of the stream kernel."""
STREAM_EDGE = 8
"""Columns of states that the stream kernel handles at once, outside of its loop: more take more registers."""


class StreamLayout(NamedTuple):
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
    return StreamLayout(width, tile, STREAM_EDGE, n_tiles, last_tiles)


def stream_shared(shape: NetShape, precision: str, tile: Tile) -> int:
    """Shared memory of a stream program in bytes: weight tiles in flight, or a step's input on its way to registers.

    Beside the tiles one release of Triton or another has the chains' numbers there.
    """
    layout, item = stream_layout(shape), OPERAND_BYTES[precision] * operand_parts(precision)
    tiles = tile.num_stages * layout.width * layout.tile * item + 8 * tile.block_chains
    return max(tiles, 4 * tile.block_chains * layout.tile)


def register_estimate(shape: NetShape, precision: str, tile: Tile) -> int:
    """Registers of a thread, estimated from what it holds at once; from 256 on it would spill inside the loop.

    That is accumulator, operand, the half that waits. Split operands and smooth activations need more on the way.
    Fitted to sm_90, where the compiler takes up to 60 more without need: deep128 126 (122), digits 190 (218).
    """
    parts, layout = operand_parts(precision) * OPERAND_BYTES[precision] / 4, stream_layout(shape)
    two = layout.width > layout.tile
    held, rest = layout.tile + layout.width * parts + (layout.tile * parts if two else 0), 30
    rest += 70 if ACTIVATIONS[shape.activation].bends and two else 0
    rest += 20 if shape.activation == "gelu" and not two else 0  # its error function
    return int(tile.block_chains * held / (32 * tile.num_warps)) + rest


def most_registers(shape: NetShape, precision: str, tile: Tile) -> int | None:
    """Most registers of a thread where two programs fit a multiprocessor; None for what it takes by itself.

    That is up to 225 of the 128 that suffice, so that deep128's second program would not fit.
    """
    threads = 32 * tile.num_warps
    fits_twice = 2 * threads * register_estimate(shape, precision, tile) <= REGISTERS
    most = REGISTERS // (2 * threads)
    return most if fits_twice and most <= MAX_REGISTERS else None


def candidates(shape: NetShape, precision: str, facts: GpuFacts) -> list[Tile]:
    """Tiles to choose from, best first. 128 chains take half the weight traffic of 64; three stages load ahead."""
    return [] if precision == "ieee" else [Tile("stream", *rest) for rest in ((128, 8, 3), (128, 8, 2), (64, 4, 2))]


def yields(shape: NetShape, precision: str) -> str | None:
    """Why another kernel shall run a network unless this one is asked for by name: never."""
    return None


def trials(shape: NetShape, precision: str, facts: GpuFacts) -> list[Tile]:
    """Other tiles that are worth timing."""
    others = ((128, 8, 4), (128, 8, 2), (64, 4, 3), (128, 4, 3), (256, 8, 3))
    return [] if precision == "ieee" else [Tile("stream", *rest) for rest in others]


def refusal(shape: NetShape, precision: str, tile: Tile, facts: GpuFacts) -> str | None:
    """Why a tile cannot run ``shape`` on a GPU: limit and need; None if it can."""
    wide = too_wide("stream", shape, 2 * STREAM_TILE)
    if wide is not None:
        return wide
    if facts.capability[0] == 8 and stream_layout(shape).width > STREAM_TILE:
        # In every tile tried: Triton's prefetch pass, which runs for these GPUs alone, stops with an error.
        return f"{tile.name}: Triton cannot compile widths over 128 with jitter for compute capability 8"
    return too_much_shared(tile, stream_shared(shape, precision, tile), facts) or too_many_registers(
        tile, register_estimate(shape, precision, tile)
    )


def scratch_bytes(shape: NetShape, precision: str, tile: Tile, n_programs: int) -> int:
    """Bytes of memory besides weights and states."""
    return 0
