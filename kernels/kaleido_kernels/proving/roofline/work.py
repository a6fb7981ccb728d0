"""What a step of a tile asks for, by kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise

from kaleido_kernels.proving.roofline.gpu import ALU_LANES, FMA_LANES, MUFU_LANES, SCHEDULERS
from kaleido_kernels.proving.roofline.loops import Loop, Overlap, Reuse
from kaleido_kernels.proving.roofline.model import TileWork
from kaleido_kernels.shapes import NetShape, next_power_of_two
from kaleido_kernels.wide.plan import (
    STATE_COLS,
    WideLayer,
    WideTile,
    output_width,
    padded_products,
    program_bytes,
    state_width,
    step_bytes,
    wide_layers,
)

ALU_KINDS = ("FMNMX", "F2FP", "PRMT", "LOP3", "ISETP", "FSETP", "SHF", "SEL", "FSEL", "IADD3", "LEA")
PRECISION_BYTES = {"fp32": 4, "ieee": 4, "fp16x3": 4, "tf32": 4, "fp16": 2, "bf16": 2}
"""Bytes of one operand value: split fp32 holds two fp16 values."""


def exact_fma(widths: tuple[int, ...]) -> int:
    """Multiply-adds of one step of one chain, without padding."""
    return sum(a * b for a, b in pairwise(widths))


def tensor_factor(precision: str) -> float:
    """fp16-rate multiply-adds spent for one product: 3 for split fp32, 2 for tf32 (half rate)."""
    return {"fp32": 3.0, "fp16x3": 3.0, "tf32": 2.0, "ieee": 0.0}.get(precision, 1.0)


def counted_work(counts: Mapping[str, float], n_warps: int) -> dict[str, float]:
    """``instructions``, ``alu`` and ``mufu`` of a tile-step from the instructions that one warp issues in a step.

    ``counts`` holds instructions by kind, with their sum under "all".
    """
    return {
        "instructions": counts.get("all", 0) * n_warps,
        "alu": sum(counts.get(kind, 0) for kind in ALU_KINDS) * n_warps,
        "mufu": counts.get("MUFU", 0) * n_warps,
    }


def instruction_cycles(issued: Mapping[str, float]) -> float:
    """Cycles that a program needs for what `counted_work` counted: of the busiest of the units."""
    units = (issued["instructions"] / SCHEDULERS, issued["alu"] * 32 / ALU_LANES, issued["mufu"] * 32 / MUFU_LANES)
    return max(units)


def step_counts(common: Mapping[str, float], rare: Mapping[str, float], rounds: int, rare_rounds: int) -> Counter[str]:
    """Instructions of a step that takes ``rounds`` rounds of a loop, ``rare_rounds`` of them the rare way."""
    total: Counter[str] = Counter()
    for kind in {*common, *rare}:
        total[kind] = int(common.get(kind, 0) * (rounds - rare_rounds) + rare.get(kind, 0) * rare_rounds)
    return total


def stream_overlap(stages: int) -> Overlap:
    """What the stream kernel's stages mean: its copies are issued behind the products of a round.

    So the second buffer of two stages never fills while a product runs, and from three on one does. Seen in every
    compiled variant.
    """
    return Overlap(max(0, stages - 1))


def wide_overlap(precision: str, stages: int) -> Overlap:
    """The same of the wide kernel: a round's copies are issued when the last of its products is under way."""
    return Overlap(max(0, stages - 1), 1 / 3 if precision == "fp16x3" else 1.0)


def narrow_work(
    shape: NetShape, rows: int, n_warps: int, precision: str, counts: Mapping[str, float], *, bias_rows: int = 0,
    programs: int = 1,
) -> TileWork:  # fmt: skip
    """A step of the narrow kernel, which loads nothing.

    ``bias_rows``: extra inner rows a layer of a bias added by a product of its own. ``programs`` fit one
    multiprocessor.
    """
    width, edge = next_power_of_two(max(shape.hidden, 1)), next_power_of_two(shape.dim)
    sides = [edge, *[width] * (shape.n_layers - 1), edge]
    products = sum(a * b * tensor_factor(precision) + bias_rows * b for a, b in pairwise(sides))
    scalar = rows * exact_fma(shape.widths) if precision == "ieee" else 0.0
    tensor = 0.0 if precision == "ieee" else rows * products
    issued = counted_work(counts, n_warps)
    step = Loop(1, fma=tensor, other=instruction_cycles(issued) + scalar / FMA_LANES)
    return TileWork(
        rows,
        exact_fma(shape.widths),
        tensor,
        scalar,
        instructions=issued["instructions"],
        alu=issued["alu"],
        mufu=issued["mufu"],
        loops=(step,),
        programs=programs,
    )


def stream_work(
    shape: NetShape, rows: int, n_warps: int, precision: str, counts: Mapping[str, float], *, n_tiles: int,
    programs: int, overlap: Overlap, starts: int = 0,
) -> TileWork:  # fmt: skip
    """A step of the stream kernel: ``n_tiles`` rounds of its loop; ``programs`` fit one multiprocessor.

    ``starts``: how often a step the loop begins anew, with nothing loaded. Before, its output went to memory and came
    back, and so did the next input.
    """
    width = next_power_of_two(max(shape.widths))
    tile = min(width, 128)
    issued = counted_work(counts, n_warps)
    weights = width * tile
    products = rows * weights * tensor_factor(precision)
    loaded = weights * PRECISION_BYTES[precision]
    loop = Loop(n_tiles, starts, products, instruction_cycles(issued) / n_tiles, loaded, 0.0, overlap)
    states = 4 * 4 * rows * shape.dim * starts
    return TileWork(
        rows,
        exact_fma(shape.widths),
        n_tiles * products,
        l2_bytes=n_tiles * loaded + states,
        instructions=issued["instructions"],
        alu=issued["alu"],
        mufu=issued["mufu"],
        loops=(loop,),
        waits=2 * starts,
        drained=states,
        programs=programs,
    )


def typical_epilogue(tile: WideTile, precision: str) -> float:
    """Instructions a warp issues for a finished tile of outputs, as read from compiled tiles of 128 x 256."""
    return (1000 if precision == "fp16x3" else 460) * _share_of_a_warp(tile) * tile.cols / 256


def typical_state_block(tile: WideTile) -> float:
    """The same for a block of the pass over the state."""
    return 700 * _share_of_a_warp(tile)


def _share_of_a_warp(tile: WideTile) -> float:
    return tile.rows / tile.warps / (128 / 8)


def wide_work(
    shape: NetShape, tile: WideTile, precision: str, *, epilogue: float | None = None,
    state_block: float | None = None, overlap: Overlap | None = None,
) -> TileWork:  # fmt: skip
    """A step of the wide kernel, of which a multiprocessor runs one program.

    Args:
        shape: the network.
        tile: how it is cut.
        precision: a device precision.
        epilogue: instructions a warp issues for each finished tile of outputs; None for what is usual.
        state_block: instructions a warp issues for each block of the pass over the state; None likewise.
        overlap: what hides its loads, as read from machine code; None for what the number of stages means.
    """
    layers = list(_wide_layers(shape, tile, precision))
    epilogue = typical_epilogue(tile, precision) if epilogue is None else epilogue
    state_block = typical_state_block(tile) if state_block is None else state_block
    blocks = state_width(shape, tile) // STATE_COLS
    col_tiles = sum(layer.col_tiles for layer, _, _ in layers)
    item = PRECISION_BYTES[precision]
    overlap = wide_overlap(precision, tile.stages) if overlap is None else overlap
    loops = [layer_loop(layer, cols, out, tile, precision, overlap) for layer, cols, out in layers]
    # Blocks of the state: raw sums are loaded, bounded, and stored as operands while the next block loads.
    block = tile.rows * STATE_COLS
    stored = item * block * (blocks - 1) / blocks
    state = Loop(blocks, other=state_block * tile.warps / SCHEDULERS, loaded=4 * block, stored=stored)
    products = tile.rows * padded_products(shape, tile)
    # A layer begins with its row of the table, and ends when its last tile's stores have arrived.
    last_tiles = tile.rows * sum(cols * out for _, cols, out in layers)
    return TileWork(
        tile.rows,
        exact_fma(shape.widths),
        products * tensor_factor(precision),
        products if precision == "ieee" else 0.0,
        step_bytes(shape, tile, precision),
        instructions=(col_tiles * epilogue + blocks * state_block) * tile.warps,
        loops=(*loops, state),
        serial=col_tiles * epilogue * tile.warps / SCHEDULERS,
        waits=2 * len(layers) + 1,
        drained=last_tiles + item * block,
        reuses=wide_reuses(shape, tile, precision),
    )


def _wide_layers(shape: NetShape, tile: WideTile, precision: str) -> Iterator[tuple[WideLayer, int, int]]:
    """Each layer with the columns of its tiles of outputs and the bytes of an output value as it is stored."""
    *hidden, last = wide_layers(shape, tile)
    for layer in hidden:
        yield layer, tile.cols, PRECISION_BYTES[precision]
    yield last, tile.last_cols, 4


def layer_loop(layer: WideLayer, cols: int, out: int, tile: WideTile, precision: str, overlap: Overlap) -> Loop:
    """The loops of products of one layer. The stores of a tile leave while the next tile loads."""
    rounds = layer.col_tiles * layer.inner_blocks
    fma = tile.rows * cols * tile.inner
    return Loop(
        rounds,
        starts=layer.col_tiles,
        fma=fma * tensor_factor(precision),
        other=fma / FMA_LANES if precision == "ieee" else 0.0,
        loaded=(tile.rows + cols) * tile.inner * PRECISION_BYTES[precision],
        stored=tile.rows * cols * out * (layer.col_tiles - 1) / rounds,
        overlap=overlap,
    )


def wide_reuses(shape: NetShape, tile: WideTile, precision: str) -> tuple[Reuse, ...]:
    """What a step of the wide kernel uses again. What a program wrote goes to memory and comes back: twice."""
    item = PRECISION_BYTES[precision]
    raw, found = 4 * tile.rows * output_width(shape, tile), []
    beside, weights_before = raw, 0  # the pass over the state reads raw sums while it writes the first layer's input
    for layer, cols, out in _wide_layers(shape, tile, precision):
        inner = layer.inner_blocks * tile.inner
        read, weights = tile.rows * inner * item, inner * cols * item
        found.append(Reuse(own=2 * read, between=read + beside, beside=weights_before))
        found.append(Reuse(own=(layer.col_tiles - 1) * read, between=read + tile.rows * cols * out, beside=weights))
        beside, weights_before = read, weights * layer.col_tiles
    found.append(Reuse(own=2 * raw, between=raw + beside, beside=weights_before))
    every_weight = padded_products(shape, tile) * item
    found.append(Reuse(common=every_weight, between=program_bytes(shape, tile, precision), beside=every_weight))
    return tuple(found)
