"""The stream kernel: padded width up to 256 whose weights do not fit a multiprocessor, read again in every step.

One program carries BLOCK chains through all steps of a launch as a flat loop over step x layer x half, one weight tile
(WIDTH, TILE) an iteration: from three stages on the next tiles are being loaded while a product runs, across layers and
steps:

    tile     0            1            2            3           ...  TILES - 1      0 ...
    layer    first        first        second       second           last           first of the next step
    half     columns      columns      columns      columns          columns
             0 .. 127     128 .. 255   0 .. 127     128 .. 255       0 .. 127

Up to width 128 a layer is one tile. At 256 it is two, as an accumulator of 256 columns leaves too few registers;
the first half's result waits in registers for the second. The last layer needs its second half only if D > 128.
Operands too stay in registers, as two halves at width 256, so that shared memory is for weights alone.

Inside the loop a state exists as the operand of the next step only. It ends wherever fp32 states are wanted: at draws,
at the two steps up to the end or to a check for the residual, and at every step with jitter. The output of its last
step goes through memory, from where `hand_on` makes draws, final states and the next input of it, a few columns at a
time. A flow's steps need their input in fp32: it waits in memory, and the loop stops at draws and at the end alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from kaleido_kernels.arguments import (
    QUIET,
    UNSPECIALISED,
    LaunchKind,
    common_arguments,
    common_types,
    compiled_map,
)
from kaleido_kernels.launch import OPERANDS, LaunchRequest, Outputs, check_tensors, check_tile, kind_of
from kaleido_kernels.noise import go_by_part, jitter_input, jitter_output, kept_share
from kaleido_kernels.packing import Layers
from kaleido_kernels.precision import usual_precision
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.steps import (
    Checking,
    Noise,
    Timing,
    activate,
    bound_output,
    check_rows,
    dense_layer,
    draw_at,
    draw_end,
    is_jittered_before,
    next_check,
    place_columns,
    row_residual,
    tile_chains,
    to_operand,
    worst,
)
from kaleido_kernels.stream.operands import Weights, fence_copies, from_words, load_piece, to_words
from kaleido_kernels.stream.pack import PackedStream, pack_stream
from kaleido_kernels.stream.plan import most_registers, register_estimate, stream_layout
from kaleido_kernels.stream.states import (
    go_by_part_in_memory,
    load_step_input,
    store_draw_start,
    store_first_input,
    store_output,
)
from kaleido_kernels.tile import Tile, too_many_registers
from kaleido_kernels.variant import Variant, use_asm_on


@triton.jit
def run_tiles(
    h, weights, n_tiles, input_ptr, output_ptr, chains, first_share_ptr, MAP: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr, USE_ASM: tl.constexpr, OWN_CELLS: tl.constexpr,
):  # fmt: skip
    """Whole steps, ``n_tiles`` weight tiles, from the operand h of the first one. The last one's output goes to memory.

    A layer's operand is (h, e), its second half empty up to width 128; g is the first half of the next layer's.
    """
    FIRST: tl.constexpr = LAYOUT.n_tiles - LAYOUT.last_tiles
    TILE: tl.constexpr = LAYOUT.tile
    HALVES: tl.constexpr = LAYOUT.width // TILE
    # In split fp32 words take more instructions than they save.
    WORDS: tl.constexpr = USE_ASM and (MAP.precision == "fp16" or MAP.precision == "bf16")
    h_high, h_low = to_words(h.high, h.low, LAYOUT, BLOCK, WORDS)
    e_high, e_low = to_words(h.rest_high, h.rest_low, LAYOUT, BLOCK, WORDS)
    g_high, g_low = h_high, h_low
    tile = 0
    for number in range(n_tiles):
        bias = tl.load(weights.bias_ptr + tile * TILE + tl.arange(0, TILE))
        acc = tl.broadcast_to(bias[None, :], (BLOCK, TILE))
        a_high, a_low = from_words(h_high, h_low, MAP, LAYOUT, BLOCK, WORDS, USE_ASM)
        w_high, w_low = load_piece(tile * LAYOUT.width, weights, MAP, TILE)
        if HALVES == 2:
            b_high, b_low = from_words(e_high, e_low, MAP, LAYOUT, BLOCK, WORDS, USE_ASM)
            v_high, v_low = load_piece(tile * LAYOUT.width + TILE, weights, MAP, TILE)
        fence_copies(USE_ASM)
        acc = dense_layer(a_high, a_low, w_high, w_low, acc, MAP)
        if HALVES == 2:
            acc = dense_layer(b_high, b_low, v_high, v_low, acc, MAP)
        second = tile % 2 == 1
        if HALVES == 2:
            # The operand has done its part. Here, so that g's registers are free for the results below.
            h_high, h_low = tl.where(second, g_high, h_high), tl.where(second, g_low, h_low)
        # Of the last layer in vain: with an else to the condition Triton 3.6 stops with an error.
        r_high, r_low = activate(acc, MAP, USE_ASM)
        r_high, r_low = to_words(r_high, r_low, LAYOUT, BLOCK, WORDS)
        if tile >= FIRST:
            x = bound_output(acc, MAP, USE_ASM)
            first_col = (tile - FIRST) * TILE if LAYOUT.last_tiles > 1 else 0
            if number >= n_tiles - LAYOUT.last_tiles:
                store_output(x, output_ptr, chains, first_col, MAP, TILE, OWN_CELLS)
            elif first_share_ptr is not None:
                share = tl.load(first_share_ptr + number // LAYOUT.n_tiles)
                x = go_by_part_in_memory(x, input_ptr, chains, first_col, share, MAP, TILE, OWN_CELLS)
            r_high, r_low = to_operand(x, MAP)
            r_high, r_low = to_words(r_high, r_low, LAYOUT, BLOCK, WORDS)
            if LAYOUT.last_tiles == 1:  # the second half meets the first layer's zero rows
                h_high, h_low, e_high, e_low = r_high, r_low, r_high, r_low
        if HALVES == 1:
            h_high, h_low = r_high, r_low
        else:
            e_high, e_low = tl.where(second, r_high, e_high), tl.where(second, r_low, e_low)
            g_high, g_low = r_high, r_low
        tile += 1
        if tile == LAYOUT.n_tiles:
            tile = 0


@triton.jit
def hand_on(
    output_ptr, draws_ptr, final_ptr, input_ptr, chains, live, draw, is_draw, done, target, next_draw_end, timing,
    noise, CHECKS: tl.constexpr, MAP: tl.constexpr, EDGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States from a step's output in memory: stores draws, and the next step's input or a final state.

    ``done``: steps done; ``target``: the number of them after which states are final, for ``live`` rows;
    ``next_draw_end``: of the draw that the next step works towards. Of a flow final states are the outputs.
    """
    BY_PARTS: tl.constexpr = noise.shares_ptr is not None
    tl.debug_barrier()
    for piece in tl.range(tl.where(done > 0, (MAP.dim + EDGE - 1) // EDGE, 0), num_stages=1):
        first_col = piece * EDGE
        offsets, mask = place_columns(chains, first_col, MAP.dim, EDGE)
        y = tl.load(output_ptr + offsets, mask=mask, other=0.0)
        x = jitter_output(y, done, noise, chains.ids, first_col, MAP, BLOCK, EDGE)
        if draws_ptr is not None:
            cols = first_col + tl.arange(0, EDGE)
            draw_offsets = (chains.rows[:, None] * timing.n_draws + draw) * MAP.dim + cols[None, :]
            tl.store(draws_ptr + draw_offsets, x, mask=mask & is_draw)
        if done < target and not BY_PARTS:
            jittered = is_jittered_before(done, next_draw_end, timing)
            x = jitter_input(x, done, jittered, noise, chains.ids, first_col, MAP, BLOCK, EDGE)
        # The output of the last step is stored before its noise: `store_residual` wants it, and adds the noise then.
        kept = tl.where(done == target, y, x) if MAP.jitter == "upstream" else x
        stored = mask & (live[:, None] | (done < target)) if CHECKS else mask
        if BY_PARTS:
            stored = mask & (done == target)  # the next input is noise
        tl.store(tl.where(done == target, final_ptr, input_ptr) + offsets, kept, mask=stored)


@triton.jit
def store_residual(
    residual_ptr, final_ptr, input_ptr, chains, end, noise, share, MAP: tl.constexpr, EDGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The last step's residual, from memory: with the step's input and output in registers the kernel takes 40 more."""
    tl.debug_barrier()
    residual = tl.zeros([BLOCK], tl.float32)
    for piece in tl.range((MAP.dim + EDGE - 1) // EDGE, num_stages=1):
        first_col = piece * EDGE
        offsets, mask = place_columns(chains, first_col, MAP.dim, EDGE)
        y = tl.load(final_ptr + offsets, mask=mask, other=0.0)
        before = tl.load(input_ptr + offsets, mask=mask, other=0.0)
        residual = worst(residual, row_residual(y - before, first_col, MAP.dim, EDGE))
        if MAP.jitter == "upstream" or noise.shares_ptr is not None:
            x = go_by_part(y, y - before, share, MAP)
            x = jitter_output(x, end, noise, chains.ids, first_col, MAP, BLOCK, EDGE)
            tl.store(final_ptr + offsets, x, mask=mask)
    tl.store(residual_ptr + chains.rows, residual, mask=chains.exist)


@triton.jit
def check_states(
    final_ptr, input_ptr, chains, calm, step, checking, MAP: tl.constexpr, EDGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`check_rows` after ``step`` steps, with residuals and distances from memory as in `store_residual`.

    The state becomes the next step's input. Halted rows are computed on from where they halted; no result is used.
    """
    tl.debug_barrier()
    residual = tl.zeros([BLOCK], tl.float32)
    distance = tl.zeros([BLOCK], tl.float32)
    for piece in tl.range((MAP.dim + EDGE - 1) // EDGE, num_stages=1):
        first_col = piece * EDGE
        offsets, mask = place_columns(chains, first_col, MAP.dim, EDGE)
        y = tl.load(final_ptr + offsets, mask=mask, other=0.0)
        before = tl.load(input_ptr + offsets, mask=mask, other=0.0)
        saved = tl.load(checking.saved_ptr + offsets, mask=mask, other=0.0)
        tl.debug_barrier()  # a layout of the store that differs from the load's would meet other threads' values
        tl.store(input_ptr + offsets, y, mask=mask)
        residual = worst(residual, row_residual(y - before, first_col, MAP.dim, EDGE))
        distance = worst(distance, row_residual(y - saved, first_col, MAP.dim, EDGE))
    return check_rows(residual, distance, calm, step, chains.rows, checking)


@triton.jit(do_not_specialize=UNSPECIALISED)
def stream_kernel(
    w_high_ptr,  # (n_tiles, width, tile) operand type
    w_low_ptr,  # the same of the low halves; w_high_ptr itself unless the precision is "fp16x3"
    bias_ptr,  # (n_tiles, tile) fp32
    input_ptr,  # (programs * BLOCK, D) fp32, row-major; scratch: inputs of steps, where they are wanted in fp32
    output_ptr,  # the same: outputs of steps
    draws_ptr, final_ptr, residual_ptr, start_ptr, chain_ids_ptr, saved_ptr, calm_in_ptr, calm_ptr, halt_ptr,
    shares_ptr, n_chains: tl.int64, first_chain: tl.int64, seed: tl.int64, jitter: tl.float32,
    burn_in: tl.int32, n_draws: tl.int32, thin: tl.int32, settle: tl.int32, first_step: tl.int32, run_steps: tl.int32,
    tol: tl.float32, patience: tl.int32, every: tl.int32,
    MAP: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr, USE_ASM: tl.constexpr, OWN_CELLS: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(n_chains, BLOCK),); program i carries chains i * BLOCK .. through all steps of the launch."""
    CHECKS: tl.constexpr = saved_ptr is not None
    BY_PARTS: tl.constexpr = shares_ptr is not None
    timing, noise = Timing(burn_in, n_draws, thin, settle), Noise(seed, jitter, shares_ptr)
    n_steps = burn_in + n_draws * thin
    checking = Checking(saved_ptr, calm_in_ptr, residual_ptr, calm_ptr, halt_ptr, n_steps, every, tol, patience)
    weights = Weights(w_high_ptr, w_low_ptr, bias_ptr)
    row0 = tl.program_id(0).to(tl.int64) * BLOCK
    chains = tile_chains(row0, n_chains, first_chain, chain_ids_ptr, BLOCK)

    t = first_step
    end = first_step + run_steps
    draw = draw_at(first_step, timing)
    this_draw_end = draw_end(draw, timing)
    if CHECKS:
        calm = tl.load(calm_in_ptr + chains.rows, mask=chains.exist, other=-1)

    store_first_input(start_ptr, input_ptr, chains, t, end, this_draw_end, timing, noise, MAP, LAYOUT.edge, BLOCK)
    while t < end:
        if BY_PARTS:  # nothing of the chains is kept through the loop of `run_tiles`
            chains = tile_chains(row0, n_chains, first_chain, chain_ids_ptr, BLOCK)
            if is_jittered_before(t, this_draw_end, timing):
                store_draw_start(input_ptr, chains, t, end, noise, MAP, LAYOUT.edge, BLOCK)
        h = load_step_input(input_ptr, chains, MAP, LAYOUT)
        target = tl.minimum(end, next_check(t, every)) if CHECKS else end
        # Up to the next draw, the input of the last step, or the end. With jitter up to the end of this step: noise is
        # made outside of the loop, a few columns at a time; inside it would spill (up to 5 KB of stack at width 256).
        stop = tl.where(t < target - 1, target - 1, target) if MAP.jitter == "none" else t + 1
        if not CHECKS:  # which keep no draws
            stop = tl.minimum(this_draw_end, stop)
        first_share_ptr = None
        if BY_PARTS:
            stop = tl.minimum(this_draw_end, end)
            first_share_ptr = shares_ptr + (t - this_draw_end + thin)
        run_tiles(
            h, weights, (stop - t) * LAYOUT.n_tiles, input_ptr, output_ptr, chains, first_share_ptr, MAP, LAYOUT, BLOCK,
            USE_ASM, OWN_CELLS,
        )  # fmt: skip
        is_draw = stop == this_draw_end
        stored_draw = draw
        if is_draw:
            draw += 1
            this_draw_end += thin
        # Never true, and not seen to be: or the compiler would keep all addresses in registers through the loop of
        # `run_tiles`.
        row0 = tl.where(stop < 0 if BY_PARTS else stop > end, row0 + 1, row0)
        chains = tile_chains(row0, n_chains, first_chain, chain_ids_ptr, BLOCK)
        live = calm >= 0 if CHECKS else chains.exist
        hand_on(
            output_ptr, draws_ptr, final_ptr, input_ptr, chains, live, stored_draw, is_draw, stop, target,
            this_draw_end, timing, noise, CHECKS, MAP, LAYOUT.edge, BLOCK,
        )  # fmt: skip
        t = stop
        if CHECKS:
            if t == target:
                calm = check_states(final_ptr, input_ptr, chains, calm, t, checking, MAP, LAYOUT.edge, BLOCK)
                end = tl.where(tl.max(calm, axis=0) >= 0, end, t)

    if not CHECKS:
        chains = tile_chains(row0, n_chains, first_chain, chain_ids_ptr, BLOCK)
        share = kept_share(noise, end - 1, draw_end(draw_at(end - 1, timing), timing), timing)
        store_residual(residual_ptr, final_ptr, input_ptr, chains, end, noise, share, MAP, LAYOUT.edge, BLOCK)


@functools.lru_cache(maxsize=256)
def variant(shape: NetShape, precision: str, tile: Tile, kind: LaunchKind = QUIET, use_asm: bool = True) -> Variant:
    """What `launch_stream` launches. ``precision`` is a device precision; "fp32" stands for "fp16x3".

    Raises:
        ValueError: a tile whose program needs more registers than there are. It is not only slow: of the split fp32 of
            width 256 in 64 chains and 4 warps, which spills 3 KB, ptxas 12.8 made code that takes an address from a
            register without a value (seen on an H200: illegal memory access).
    """
    form = usual_precision(precision)
    why = too_many_registers(tile, register_estimate(shape, form, tile))
    if why is not None:
        raise ValueError(why)
    constants = {
        "MAP": compiled_map(shape, form, kind),
        "LAYOUT": stream_layout(shape),
        "BLOCK": tile.block_chains,
        "USE_ASM": use_asm,
        "OWN_CELLS": use_asm
        and tile.block_chains >= 16 * tile.num_warps,  # a warp's least share of a product is 16 rows
    }
    own = dict.fromkeys(("w_high_ptr", "w_low_ptr"), OPERANDS[form]) | {
        "bias_ptr": "*fp32",
        "input_ptr": "*fp32",
        "output_ptr": "*fp32",
    }
    most = most_registers(shape, form, tile) if use_asm and not kind.checks else None  # which would spill a little
    return Variant(stream_kernel, own | common_types(kind), constants, tile.num_warps, tile.num_stages, most)


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
    chosen = variant(shape, packed.precision, tile, kind_of(request, outputs), use_asm_on(device))
    n_programs = -(-request.n_chains // tile.block_chains)
    inputs, outputs_of_steps = torch.empty(2, n_programs * tile.block_chains, shape.dim, device=device)
    if request.schedule.restarts:
        inputs[request.n_chains :].zero_()  # rows without a chain take part: what they hold might overflow
    arguments = [packed.high, packed.low, packed.bias, inputs, outputs_of_steps, *common_arguments(request, outputs)]
    chosen.launch(n_programs, arguments)


def launcher(
    layers: Layers, shape: NetShape, tile: Tile, precision: str, device: torch.device, **_: object
) -> Callable[[LaunchRequest, Outputs], None]:
    """See `kaleido_kernels.kernels.make_launcher`."""
    packed = pack_stream(layers, shape, precision, device)
    return lambda request, outputs: launch_stream(packed, request, tile, outputs)
