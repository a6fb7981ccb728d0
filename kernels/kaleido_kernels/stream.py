"""The stream kernel: padded width up to 256 whose weights do not fit a multiprocessor, read again in every step.

One program carries BLOCK chains through all steps of a launch as a flat loop over step x layer x half, one weight tile
(WIDTH, TILE) an iteration: the next tiles are being loaded while a product runs, across layers and steps:

    tile     0            1            2            3           ...  TILES - 1      0 ...
    layer    first        first        second       second           last           first of the next step
    half     columns      columns      columns      columns          columns
             0 .. 127     128 .. 255   0 .. 127     128 .. 255       0 .. 127

Up to width 128 a layer is one tile. At 256 it is two, as an accumulator of 256 columns leaves too few registers;
the first half's result waits in registers for the second. The last layer needs its second half only if D > 128.

Inside the loop a state exists as the operand of the next step only. The flat loop stops before the last layer wherever
fp32 states are wanted (at draws, and at the last two steps for the residual): output code in it would spill registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kaleido_kernels.launch import (
    OPERANDS,
    QUIET,
    UNSPECIALISED,
    LaunchRequest,
    NetShape,
    Outputs,
    argument_types,
    check_tensors,
    check_tile,
    pointer_arguments,
    scalar_arguments,
    use_asm_on,
    variant_of,
)
from kaleido_kernels.packing import PackedStream, StreamLayout, stream_layout
from kaleido_kernels.steps import (
    activate,
    add_jitter,
    bound_output,
    dense_layer,
    row_chains,
    row_residual,
    start_tile,
    to_operand,
)
from kaleido_kernels.tiles import Tile


@triton.jit
def join_halves(left, right, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """(BLOCK, TILE) twice -> (BLOCK, 2 * TILE), side by side."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (BLOCK, 2 * TILE))


@triton.jit
def widen(x, BLOCK: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr):
    """(BLOCK, FROM) -> (BLOCK, TO), zeros on the right; both powers of two."""
    if FROM == TO:
        return x
    else:
        return widen(join_halves(x, tl.zeros_like(x), BLOCK, FROM), BLOCK, 2 * FROM, TO)


@triton.jit
def jitter_input(
    x, t, quiet_from, first_col, jitter, seed, chains, LOW: tl.constexpr, HIGH: tl.constexpr,
    JITTER: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """input_t from x_t: with noise if step t is jittered, that is if 0 < t < quiet_from."""
    if JITTER == "normal" or JITTER == "uniform":
        if (t > 0) & (t < quiet_from):
            x = add_jitter(x, jitter, seed, chains, first_col, t, LOW, HIGH, JITTER, DIM, BLOCK, TILE)
    return x


@triton.jit
def layer_tile(
    tile, h_high, h_low, w_high_ptr, w_low_ptr, bias_ptr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK, COLS) fp32: the first COLS columns that weight tile ``tile`` makes of a layer, before the activation."""
    cols = tl.arange(0, COLS)
    offsets = tl.arange(0, WIDTH)[:, None] * TILE + cols[None, :]
    w_high = tl.load(w_high_ptr + tile * (WIDTH * TILE) + offsets)
    w_low = tl.load(w_low_ptr + tile * (WIDTH * TILE) + offsets) if PRECISION == "fp16x3" else w_high
    bias = tl.load(bias_ptr + tile * TILE + cols)
    acc = tl.broadcast_to(bias[None, :], (BLOCK, COLS))
    return dense_layer(h_high, h_low, w_high, w_low, acc, PRECISION)


@triton.jit(do_not_specialize=UNSPECIALISED)
def stream_kernel(
    draws_ptr,  # (n_chains, n_draws, DIM) fp32, row-major; unused without KEEP_DRAWS
    final_ptr,  # (n_chains, DIM) fp32, row-major
    residual_ptr,  # (n_chains,) fp32
    w_high_ptr,  # (TILES, WIDTH, TILE) operand type
    w_low_ptr,  # the same of the low halves; w_high_ptr itself unless PRECISION is "fp16x3"
    bias_ptr,  # (TILES, TILE) fp32
    start_ptr,  # (n_chains, DIM) fp32, row-major; unused without HAS_START
    chain_ids_ptr,  # (n_chains,) int64; unused without HAS_IDS
    last_input_ptr,  # (n_chains, DIM) fp32, row-major; scratch: the input of the last step, for its residual
    n_chains: tl.int64,
    first_chain: tl.int64,
    seed: tl.int64,
    jitter,
    burn_in: tl.int32,
    n_draws: tl.int32,
    thin: tl.int32,
    settle: tl.int32,
    first_step: tl.int32,
    run_steps: tl.int32,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    EDGE: tl.constexpr,
    TILES: tl.constexpr,
    LAST_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    BOUND: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PRECISION: tl.constexpr,
    JITTER: tl.constexpr,
    INIT: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_IDS: tl.constexpr,
    KEEP_DRAWS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Grid: (cdiv(n_chains, BLOCK),); program i carries chains i * BLOCK .. through all steps of the launch."""
    HALVES: tl.constexpr = WIDTH // TILE
    row0 = tl.program_id(0).to(tl.int64) * BLOCK
    rows = row0 + tl.arange(0, BLOCK)
    cols = tl.arange(0, EDGE)
    row_mask = rows < n_chains
    chains = row_chains(chain_ids_ptr, rows, row_mask, first_chain, HAS_IDS)

    t = first_step
    end = first_step + run_steps
    draw = tl.maximum(first_step - burn_in, 0) // thin
    draw_end = burn_in + (draw + 1) * thin

    g_high, g_low = to_operand(tl.zeros([BLOCK, TILE], tl.float32), PRECISION)
    h_high, h_low = g_high, g_low
    for half in tl.static_range(HALVES):
        if half * TILE < DIM:
            mask = row_mask[:, None] & (half * TILE + cols < DIM)[None, :]
            offsets = rows[:, None] * DIM + (half * TILE + cols)[None, :]
            if HAS_START:
                x = tl.load(start_ptr + offsets, mask=mask, other=0.0)
            else:
                x = start_tile(seed, chains, half * TILE, LOW, HIGH, INIT, DIM, BLOCK, EDGE)
            x = jitter_input(
                x, t, draw_end - settle, half * TILE, jitter, seed, chains, LOW, HIGH, JITTER, DIM, BLOCK, EDGE
            )  # fmt: skip
            tl.store(last_input_ptr + offsets, x, mask=mask & (t == end - 1))
        else:
            x = tl.zeros([BLOCK, EDGE], tl.float32)
        r_high, r_low = to_operand(x, PRECISION)
        r_high = widen(r_high, BLOCK, EDGE, TILE)
        r_low = widen(r_low, BLOCK, EDGE, TILE) if PRECISION == "fp16x3" else r_high
        if HALVES == 1:
            h_high, h_low = r_high, r_low
        elif half == 0:
            g_high, g_low = r_high, r_low
        else:
            h_high = join_halves(g_high, r_high, BLOCK, TILE)
            h_low = join_halves(g_low, r_low, BLOCK, TILE) if PRECISION == "fp16x3" else h_high

    while t < end:
        # Up to the next draw, the input of the last step, or the end.
        stop = tl.minimum(draw_end, tl.where(t < end - 1, end - 1, end))
        tile = 0
        for _ in range((stop - t) * TILES - LAST_TILES):
            acc = layer_tile(tile, h_high, h_low, w_high_ptr, w_low_ptr, bias_ptr, WIDTH, TILE, TILE, BLOCK, PRECISION)
            if tile < TILES - LAST_TILES:
                r_high, r_low = activate(acc, ACTIVATION, NEGATIVE_SLOPE, PRECISION, USE_ASM)
            else:
                first_col = (tile - (TILES - LAST_TILES)) * TILE
                y = bound_output(acc, BOUND, USE_ASM)
                if JITTER == "upstream":
                    y = add_jitter(y, jitter, seed, chains, first_col, t + 1, LOW, HIGH, JITTER, DIM, BLOCK, TILE)
                else:
                    y = jitter_input(
                        y, t + 1, draw_end - settle, first_col, jitter, seed, chains, LOW, HIGH,
                        JITTER, DIM, BLOCK, TILE,
                    )  # fmt: skip
                r_high, r_low = to_operand(y, PRECISION)
            if HALVES == 1:
                h_high, h_low = r_high, r_low
            else:
                if tile % 2 == 0:
                    g_high, g_low = r_high, r_low
                if (tile % 2 == 1) | (tile == TILES - 1):
                    # A last layer of one tile joins it with itself: the second half meets the first layer's zero rows.
                    h_high = join_halves(g_high, r_high, BLOCK, TILE)
                    h_low = join_halves(g_low, r_low, BLOCK, TILE) if PRECISION == "fp16x3" else h_high
            tile += 1
            if tile == TILES:
                tile = 0
                t += 1

        is_draw = stop == draw_end
        this_draw = draw
        if is_draw:
            draw += 1
            draw_end += thin
        next_high, next_low = h_high, h_low
        # Never true, and not seen to be: or the compiler would keep all addresses in registers through the loop above
        # (255 registers and 352 bytes of stack instead of 194 and none, width 128).
        row0 = tl.where(stop > end, row0 + 1, row0)
        rows = row0 + tl.arange(0, BLOCK)
        row_mask = rows < n_chains
        for half in tl.static_range(LAST_TILES):
            tile_index = TILES - LAST_TILES + half
            mask = row_mask[:, None] & (half * TILE + cols < DIM)[None, :]
            offsets = rows[:, None] * DIM + (half * TILE + cols)[None, :]
            acc = layer_tile(
                tile_index, h_high, h_low, w_high_ptr, w_low_ptr, bias_ptr, WIDTH, TILE, EDGE, BLOCK, PRECISION
            )
            y = bound_output(acc, BOUND, USE_ASM)
            x = y
            if JITTER == "upstream":
                x = add_jitter(y, jitter, seed, chains, half * TILE, stop, LOW, HIGH, JITTER, DIM, BLOCK, EDGE)
            if KEEP_DRAWS:
                draw_offsets = (rows[:, None] * n_draws + this_draw) * DIM + (half * TILE + cols)[None, :]
                tl.store(draws_ptr + draw_offsets, x, mask=mask & is_draw)
            if stop < end:
                x = jitter_input(
                    x, stop, draw_end - settle, half * TILE, jitter, seed, chains, LOW, HIGH, JITTER, DIM, BLOCK, EDGE
                )  # fmt: skip
            kept = tl.where(stop == end, y, x) if JITTER == "upstream" else x
            kept_ptr = tl.where(stop == end, final_ptr, last_input_ptr)
            tl.store(kept_ptr + offsets, kept, mask=mask & (stop >= end - 1))
            r_high, r_low = to_operand(x, PRECISION)
            r_high = widen(r_high, BLOCK, EDGE, TILE)
            r_low = widen(r_low, BLOCK, EDGE, TILE) if PRECISION == "fp16x3" else r_high
            if HALVES == 1:
                next_high, next_low = r_high, r_low
            else:
                if half == 0:
                    g_high, g_low = r_high, r_low
                if half == LAST_TILES - 1:
                    next_high = join_halves(g_high, r_high, BLOCK, TILE)
                    next_low = join_halves(g_low, r_low, BLOCK, TILE) if PRECISION == "fp16x3" else next_high
        h_high, h_low = next_high, next_low
        t = stop
    # The residual is taken from memory: with both states in registers the loop above would have 40 fewer.
    tl.debug_barrier()
    residual = tl.zeros([BLOCK], tl.float32)
    for half in tl.static_range(LAST_TILES):
        mask = row_mask[:, None] & (half * TILE + cols < DIM)[None, :]
        offsets = rows[:, None] * DIM + (half * TILE + cols)[None, :]
        y = tl.load(final_ptr + offsets, mask=mask, other=0.0)
        before = tl.load(last_input_ptr + offsets, mask=mask, other=0.0)
        change = row_residual(y - before, half * TILE, DIM, EDGE)
        residual = tl.maximum(residual, change, propagate_nan=tl.PropagateNan.ALL)
        if JITTER == "upstream":
            x = add_jitter(y, jitter, seed, chains, half * TILE, end, LOW, HIGH, JITTER, DIM, BLOCK, EDGE)
            tl.store(final_ptr + offsets, x, mask=mask)
    tl.store(residual_ptr + rows, residual, mask=row_mask)


def constants(
    shape: NetShape, layout: StreamLayout, precision: str, tile: Tile, variant: dict[str, Any], use_asm: bool
) -> dict[str, Any]:
    """The compile-time constants of a launch. ``variant``: JITTER, INIT, HAS_START, HAS_IDS, KEEP_DRAWS."""
    return {
        "DIM": shape.dim,
        "WIDTH": layout.width,
        "TILE": layout.tile,
        "EDGE": layout.edge,
        "TILES": layout.n_tiles,
        "LAST_TILES": layout.last_tiles,
        "BLOCK": tile.block_chains,
        "ACTIVATION": shape.activation,
        "NEGATIVE_SLOPE": shape.negative_slope,
        "BOUND": shape.bound,
        "LOW": shape.low,
        "HIGH": shape.high,
        "PRECISION": precision,
        "USE_ASM": use_asm,
        **variant,
    }


def launch_stream(packed: PackedStream, request: LaunchRequest, tile: Tile, outputs: Outputs) -> None:
    """Run a launch on the device that holds ``packed``; CPU tensors need TRITON_INTERPRET=1.

    Raises:
        ValueError: a tile for another kernel, tensors that do not fit, more loop turns than 32 bits count.
    """
    check_tile(tile, "stream")
    device, shape = packed.high.device, packed.shape
    check_tensors(request, shape, device, outputs)
    if request.n_run * packed.layout.n_tiles >= 2**31:
        raise ValueError(
            f"run_steps is {request.n_run:,} with {packed.layout.n_tiles} tiles a step: the loop counts to 2**31; "
            f"launch at most {2**31 // packed.layout.n_tiles - 1:,} steps at a time"
        )
    if request.n_chains == 0:
        return
    values = constants(shape, packed.layout, packed.precision, tile, variant_of(request, outputs), use_asm_on(device))
    stream_kernel[(triton.cdiv(request.n_chains, tile.block_chains),)](
        *pointer_arguments(packed.high, packed.low, packed.bias, request, outputs),
        torch.empty_like(outputs.final),
        *scalar_arguments(request),
        **values,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def aot_signature(
    shape: NetShape, precision: str, tile: Tile, variant: dict[str, Any] | None = None, use_asm: bool = True
) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    """What `launch_stream` would compile: (kernel, signature, constants, num_warps, num_stages).

    ``precision`` is a device precision ("fp32" stands for "fp16x3"); ``variant`` overrides `launch.QUIET`.
    """
    form = "fp16x3" if precision == "fp32" else precision
    values = constants(shape, stream_layout(shape), form, tile, {**QUIET, **(variant or {})}, use_asm)
    signature = (
        argument_types(OPERANDS[form], "*fp32") | {"last_input_ptr": "*fp32"} | dict.fromkeys(values, "constexpr")
    )
    return stream_kernel, signature, values, tile.num_warps, tile.num_stages
