"""The narrow kernel as a `kaleido_kernels.kernels.Plan`: tiles, sizes, memory. Plain Python: no torch, no Triton."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from kaleido_kernels.activations import ACTIVATIONS
from kaleido_kernels.precision import OPERAND_BYTES, operand_parts
from kaleido_kernels.shapes import NetShape, next_power_of_two
from kaleido_kernels.tile import (
    GpuFacts,
    Tile,
    too_many_registers,
    too_much_shared,
    too_much_tensor_memory,
    too_wide,
)

BY_DEFAULT, TAKES_CHECKS = True, True
VERDICTS = ("no stack", "quiet step loop")
MAX_WIDTH = 128
LARGEST_IEEE = 256
"""Layers x width up to which ieee products are unrolled: they use ordinary units, and more compile for minutes."""
tile_of = partial(Tile, "narrow")

BIAS_COLUMNS = 2
"""Spare columns that a folded bias takes: high and low part."""


class NarrowLayout(NamedTuple):
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
    folds = spare and ACTIVATIONS[shape.activation].keeps_one
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


def register_estimate(shape: NetShape, precision: str, tile: Tile) -> int:
    """Registers of a thread, estimated from what it holds at once; from 256 on it would spill inside the loop.

    That is accumulator, operand, state and its change. Split operands and smooth activations need more on the way.
    Fitted to sm_90, where the compiler takes up to 60 more without need: points2d 92 (compiled 95).
    """
    parts, layout = operand_parts(precision) * OPERAND_BYTES[precision] / 4, narrow_layout(shape)
    held, rest = layout.width * (1 + parts) + 2 * layout.dim_padded, 28
    rest += 40 if precision == "fp16x3" else 0
    rest += layout.width * 70 // 128 if ACTIVATIONS[shape.activation].bends and shape.activation != "tanh" else 0
    return int(tile.block_chains * held / (32 * tile.num_warps)) + rest


def candidates(shape: NetShape, precision: str, facts: GpuFacts) -> list[Tile]:
    """Tiles to choose from, best first. 64 chains: most programs on a multiprocessor, so that one's products cover
    another's activations."""
    if precision == "ieee" and shape.n_layers * narrow_layout(shape).width > LARGEST_IEEE:
        return []
    return [Tile("narrow", 64, 4), Tile("narrow", 32, 4)]


def yields(shape: NetShape, precision: str) -> str | None:
    """Why another kernel shall run a network unless this one is asked for by name: never."""
    return None


def trials(shape: NetShape, precision: str, facts: GpuFacts) -> list[Tile]:
    """Other tiles that are worth timing."""
    return [] if precision == "ieee" else [Tile("narrow", *rest) for rest in ((128, 8), (128, 4), (32, 1))]


def refusal(shape: NetShape, precision: str, tile: Tile, facts: GpuFacts) -> str | None:
    """Why a tile cannot run ``shape`` on a GPU: limit and need; None if it can."""
    return (
        too_wide("narrow", shape, MAX_WIDTH)
        # In split fp32 sm_100 compiled this one to a trap, but not that of 32 chains.
        or too_much_tensor_memory(tile, precision, tile == Tile("narrow", 64, 4), facts)
        or too_much_shared(tile, narrow_shared(shape, precision, tile), facts)
        or too_many_registers(tile, register_estimate(shape, precision, tile))
    )


def scratch_bytes(shape: NetShape, precision: str, tile: Tile, n_programs: int) -> int:
    """Bytes of memory besides weights and states."""
    return 0
