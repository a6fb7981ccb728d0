"""The wide kernel: any width. Persistent programs, activations in scratch memory that stays in L2, tiled weights.

One program owns a tile of chains through all steps. A layer loads blocks of activations and weights (by the copy
engine where there is one), multiplies, and stores the activations of the next layer to the program's scratch; a
barrier, with a fence between ordinary stores and the copy engine's loads, ends each layer. The last layer stores raw
sums, and a pass over the state in narrow blocks does bound, residual, draws and noise: beside a full accumulator it
would spill.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kaleido_kernels.arguments import (
    QUIET,
    UNSPECIALISED,
    LaunchKind,
    common_arguments,
    common_types,
    compiled_map,
)
from kaleido_kernels.launch import OPERANDS, LaunchRequest, Outputs, check_tensors, kind_of
from kaleido_kernels.noise import first_state, go_by_part, jitter_input, jitter_output, kept_share
from kaleido_kernels.packing import Layers
from kaleido_kernels.precision import usual_precision
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.steps import (
    Checking,
    Noise,
    Stored,
    Timing,
    activate,
    bound_output,
    check_rows,
    dense_layer,
    draw_at,
    draw_end,
    is_jittered,
    next_check,
    row_residual,
    tile_chains,
    to_operand,
    worst,
)
from kaleido_kernels.variant import Variant, use_asm_on
from kaleido_kernels.wide.pack import WideScratch, WideWeights, allocate_scratch, pack_wide
from kaleido_kernels.wide.plan import WideTile, wide_layout

TABLE_COLS = tl.constexpr(6)


@triton.jit
def load_block(desc, ptr, block, ROWS: tl.constexpr, INNER: tl.constexpr, USE_TMA: tl.constexpr):
    """Block number ``block`` of (ROWS, INNER) values."""
    if USE_TMA:
        return desc.load([block * ROWS, 0])
    else:
        offsets = tl.arange(0, ROWS)[:, None] * INNER + tl.arange(0, INNER)[None, :]
        return tl.load(ptr + block.to(tl.int64) * (ROWS * INNER) + offsets)


@triton.jit
def store_blocks(
    ptr, first_block, high, low, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr
):
    """A (ROWS, COLS) operand pair into the COLS / INNER blocks from ``first_block`` on, its parts side by side."""
    col = tl.arange(0, COLS)
    block = (first_block + col // INNER).to(tl.int64) * (PARTS * ROWS * INNER)
    target = ptr + block[None, :] + (tl.arange(0, ROWS)[:, None] * INNER + (col % INNER)[None, :])
    tl.store(target, high)
    if PARTS == 2:
        tl.store(target + ROWS * INNER, low)


@triton.jit
def end_stores(USE_TMA: tl.constexpr, USE_ASM: tl.constexpr):
    """Makes the program's stores visible to all its threads, and to the copy engine where that loads them."""
    if USE_TMA and USE_ASM:  # the interpreter has neither
        # Every thread must run it. No operand: Triton's development has let one thread alone run assembly that has one.
        tl.inline_asm_elementwise(
            "fence.proxy.async.global; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()


class Net(NamedTuple):
    """The network in memory, and the activations: see the kernel's arguments of these names."""

    act_desc: Any
    weight_desc: Any
    last_desc: Any
    act_ptr: Any
    weight_ptr: Any
    last_ptr: Any
    bias_ptr: Any
    last_bias_ptr: Any
    table_ptr: Any


class Scratch(NamedTuple):
    """What a program works in: its number, its first block of activations, memory, and its chains' rows there."""

    program: Any
    base: Any
    act_ptr: Any
    state_ptr: Any
    raw_row: Any
    state_row: Any


@triton.jit
def product_tile(
    act_desc, act_ptr, weight_desc, weight_ptr, bias_ptr, in_block, weight_block, bias_tile, inner_blocks,
    COLS: tl.constexpr, LAYOUT: tl.constexpr, MAP: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Input blocks times weight blocks plus bias: (rows, COLS) fp32. Weight blocks are (COLS, inner)."""
    ROWS: tl.constexpr = LAYOUT.rows
    INNER: tl.constexpr = LAYOUT.inner
    PARTS: tl.constexpr = LAYOUT.parts
    bias = tl.load(bias_ptr + bias_tile * COLS + tl.arange(0, COLS))
    acc = tl.broadcast_to(bias[None, :], (ROWS, COLS))
    for k in tl.range(0, inner_blocks, num_stages=LAYOUT.stages):
        h = (in_block + k) * PARTS
        w = (weight_block + k) * PARTS
        h_high = load_block(act_desc, act_ptr, h, ROWS, INNER, USE_TMA)
        w_high = load_block(weight_desc, weight_ptr, w, COLS, INNER, USE_TMA)
        h_low, w_low = h_high, w_high
        if PARTS == 2:
            h_low = load_block(act_desc, act_ptr, h + 1, ROWS, INNER, USE_TMA)
            w_low = load_block(weight_desc, weight_ptr, w + 1, COLS, INNER, USE_TMA)
        acc = dense_layer(h_high, h_low, w_high.T, w_low.T, acc, MAP)
    return acc


@triton.jit
def put_input(x, scratch, ids, block, step, jittered, keep, noise, MAP: tl.constexpr, LAYOUT: tl.constexpr):
    """Writes columns ``block * state_cols`` on of the input of ``step``: x, jittered where the step is."""
    COLS: tl.constexpr = LAYOUT.state_cols
    first_col = block * COLS
    x = jitter_input(x, step, jittered, noise, ids, first_col, MAP, LAYOUT.rows, COLS)
    col = first_col + tl.arange(0, COLS)
    x = tl.where(col[None, :] < MAP.dim, x, 0.0)
    high, low = to_operand(x, MAP)
    first_block = scratch.program * LAYOUT.program_blocks + first_col // LAYOUT.inner
    store_blocks(scratch.act_ptr, first_block, high, low, LAYOUT.rows, COLS, LAYOUT.inner, LAYOUT.parts)
    if keep:
        row = (scratch.program * LAYOUT.rows + tl.arange(0, LAYOUT.rows)).to(tl.int64) * LAYOUT.state_width
        tl.store(scratch.state_ptr + row[:, None] + col[None, :], x)


@triton.jit
def run_layers(net, scratch, MAP: tl.constexpr, LAYOUT: tl.constexpr, USE_ASM: tl.constexpr, USE_TMA: tl.constexpr):
    """All layers of one step, from the state's blocks in scratch to raw sums in it, ready to be read."""
    COLS: tl.constexpr = LAYOUT.cols
    LAST_COLS: tl.constexpr = LAYOUT.last_cols
    for layer in range(LAYOUT.n_layers - 1):
        entry = net.table_ptr + layer * TABLE_COLS
        inner_blocks = tl.load(entry)
        col_tiles = tl.load(entry + 1)
        weight_block = tl.load(entry + 2)
        bias_tile = tl.load(entry + 3)
        in_block = scratch.base + tl.load(entry + 4)
        out_block = scratch.base + tl.load(entry + 5)
        for n in range(col_tiles):
            acc = product_tile(
                net.act_desc, net.act_ptr, net.weight_desc, net.weight_ptr, net.bias_ptr,
                in_block, weight_block + n * inner_blocks, bias_tile + n, inner_blocks,
                COLS, LAYOUT, MAP, USE_TMA,
            )  # fmt: skip
            high, low = activate(acc, MAP, USE_ASM)
            first_block = out_block + n * (COLS // LAYOUT.inner)
            store_blocks(net.act_ptr, first_block, high, low, LAYOUT.rows, COLS, LAYOUT.inner, LAYOUT.parts)
        end_stores(USE_TMA, USE_ASM)
    entry = net.table_ptr + (LAYOUT.n_layers - 1) * TABLE_COLS
    inner_blocks = tl.load(entry)
    in_block = scratch.base + tl.load(entry + 4)
    for n in range((MAP.dim + LAST_COLS - 1) // LAST_COLS):
        acc = product_tile(
            net.act_desc, net.act_ptr, net.last_desc, net.last_ptr, net.last_bias_ptr,
            in_block, n * inner_blocks, n, inner_blocks, LAST_COLS, LAYOUT, MAP, USE_TMA,
        )  # fmt: skip
        tl.store(scratch.raw_row + (n * LAST_COLS + tl.arange(0, LAST_COLS))[None, :], acc)
    tl.debug_barrier()


@triton.jit
def put_first_input(start_ptr, scratch, chains, step, timing, noise, keep, MAP: tl.constexpr, LAYOUT: tl.constexpr):
    """The input of the launch's first step into scratch: given states or start noise, jittered where the step is."""
    COLS: tl.constexpr = LAYOUT.state_cols
    jittered = is_jittered(step, timing)
    for block in range(LAYOUT.state_width // COLS):
        x = first_state(start_ptr, noise, chains, block * COLS, MAP, LAYOUT.rows, COLS)
        put_input(x, scratch, chains.ids, block, step, jittered, keep, noise, MAP, LAYOUT)


@triton.jit
def end_step(
    scratch, chains, live, stored, saved_ptr, step, done, target, is_target, last_step, timing, noise,
    MAP: tl.constexpr, LAYOUT: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """The pass over the state after the layers of ``step``: bound, residual, noise, draw, and the next step's input.

    Returns (residual, distance to the saved state), both (rows,), where ``is_target``: there states are final, for
    ``live`` rows.
    """
    ROWS: tl.constexpr = LAYOUT.rows
    COLS: tl.constexpr = LAYOUT.state_cols
    BY_PARTS: tl.constexpr = noise.shares_ptr is not None
    draw = draw_at(step, timing)
    share = kept_share(noise, step, draw_end(draw, timing), timing)
    is_draw = step + 1 == draw_end(draw, timing)
    jittered = is_jittered(step + 1, timing)
    residual = tl.zeros([ROWS], tl.float32)
    distance = tl.zeros([ROWS], tl.float32)
    for block in range(LAYOUT.state_width // COLS):
        first_col = block * COLS
        col = first_col + tl.arange(0, COLS)
        mask = chains.exist[:, None] & (col[None, :] < MAP.dim)
        raw = tl.load(scratch.raw_row + col[None, :], mask=col[None, :] < MAP.dim, other=0.0)
        x = bound_output(raw, MAP, USE_ASM)
        if BY_PARTS:
            change = x - tl.load(scratch.state_row + col[None, :])
            tl.debug_barrier()  # `put_input` writes to where this was read
            if is_target:
                residual = worst(residual, row_residual(change, first_col, MAP.dim, COLS))
            x = go_by_part(x, change, share, MAP)
        elif is_target:
            change = row_residual(x - tl.load(scratch.state_row + col[None, :]), first_col, MAP.dim, COLS)
            residual = worst(residual, change)
            if saved_ptr is not None:
                saved = tl.load(saved_ptr + chains.rows[:, None] * MAP.dim + col[None, :], mask=mask, other=0.0)
                distance = worst(distance, row_residual(x - saved, first_col, MAP.dim, COLS))
                tl.debug_barrier()  # with a check at every step, `put_input` writes to where this was read
        x = jitter_output(x, step + 1, noise, chains.ids, first_col, MAP, ROWS, COLS)
        if stored.draws_ptr is not None:
            if is_draw:
                place = (chains.rows * timing.n_draws + draw)[:, None] * MAP.dim + col[None, :]
                tl.store(stored.draws_ptr + place, x, mask=mask)
        if is_target:
            final = stored.final_ptr + chains.rows[:, None] * MAP.dim + col[None, :]
            tl.store(final, x, mask=mask & live[:, None])
        if done < last_step:
            keep = BY_PARTS or done == target - 1
            put_input(x, scratch, chains.ids, block, step + 1, jittered, keep, noise, MAP, LAYOUT)
    return residual, distance


@triton.jit
def run_tile(
    net, scratch, chains, start_ptr, stored, checking, timing, noise, first_step, run_steps,
    MAP: tl.constexpr, LAYOUT: tl.constexpr, USE_ASM: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """All steps of the launch for the chains of one tile."""
    CHECKS: tl.constexpr = checking.saved_ptr is not None
    last_step = first_step + run_steps
    # States are final, and residuals wanted, at the end and at checks; inputs of steps that lead there are kept.
    target = tl.minimum(last_step, next_check(first_step, checking.every)) if CHECKS else last_step
    live = chains.exist
    if CHECKS:
        calm = tl.load(checking.calm_in_ptr + chains.rows, mask=chains.exist, other=-1)
    step = tl.full([], 0, tl.int32) + first_step
    keep = noise.shares_ptr is not None or target == first_step + 1
    put_first_input(start_ptr, scratch, chains, step, timing, noise, keep, MAP, LAYOUT)
    end_stores(USE_TMA, USE_ASM)
    done = first_step
    while done < last_step:
        step = tl.full([], 0, tl.int32) + done
        run_layers(net, scratch, MAP, LAYOUT, USE_ASM, USE_TMA)
        done += 1
        is_target = done == target
        if CHECKS:
            live = calm >= 0
            if is_target:
                target = tl.minimum(last_step, next_check(done, checking.every))
        residual, distance = end_step(
            scratch, chains, live, stored, checking.saved_ptr, step, done, target, is_target, last_step, timing,
            noise, MAP, LAYOUT, USE_ASM,
        )  # fmt: skip
        if is_target:
            if CHECKS:
                # Halted rows are computed on beside the others, and their states stay as they were stored.
                calm = check_rows(residual, distance, calm, done, chains.rows, checking)
                last_step = tl.where(tl.max(calm, axis=0) >= 0, last_step, done)
            else:
                tl.store(stored.residual_ptr + chains.rows, residual, mask=chains.exist)
        end_stores(USE_TMA, USE_ASM)


@triton.jit(do_not_specialize=(*UNSPECIALISED, "n_tiles"))
def wide_kernel(
    act_desc,  # copy descriptor over act_ptr, blocks (rows, inner)
    weight_desc,  # copy descriptor over weight_ptr, blocks (cols, inner)
    last_desc,  # copy descriptor over last_ptr, blocks (last_cols, inner)
    act_ptr,  # (n_programs * program_blocks * parts, rows, inner) operands, scratch
    weight_ptr,  # (blocks * parts, cols, inner) operands
    last_ptr,  # (blocks * parts, last_cols, inner) operands, last layer
    bias_ptr,  # (tiles, cols) fp32
    last_bias_ptr,  # (tiles, last_cols) fp32
    table_ptr,  # (n_layers, TABLE_COLS) int32, rows as WideLayer.row
    raw_ptr,  # (n_programs, rows, output_width) fp32, scratch
    state_ptr,  # (n_programs, rows, state_width) fp32, scratch
    n_tiles: tl.int32,
    draws_ptr, final_ptr, residual_ptr, start_ptr, chain_ids_ptr, saved_ptr, calm_in_ptr, calm_ptr, halt_ptr,
    shares_ptr, n_chains: tl.int64, first_chain: tl.int64, seed: tl.int64, jitter: tl.float32,
    burn_in: tl.int32, n_draws: tl.int32, thin: tl.int32, settle: tl.int32, first_step: tl.int32, run_steps: tl.int32,
    tol: tl.float32, patience: tl.int32, every: tl.int32,
    MAP: tl.constexpr, LAYOUT: tl.constexpr, USE_ASM: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Grid: (n_programs,); program p owns tiles p, p + n_programs, ... of ``LAYOUT.rows`` chains."""
    ROWS: tl.constexpr = LAYOUT.rows
    net = Net(act_desc, weight_desc, last_desc, act_ptr, weight_ptr, last_ptr, bias_ptr, last_bias_ptr, table_ptr)
    timing, noise = Timing(burn_in, n_draws, thin, settle), Noise(seed, jitter, shares_ptr)
    stored = Stored(draws_ptr, final_ptr, residual_ptr)
    n_steps = burn_in + n_draws * thin
    checking = Checking(saved_ptr, calm_in_ptr, residual_ptr, calm_ptr, halt_ptr, n_steps, every, tol, patience)
    program = tl.program_id(0)
    local = program * ROWS + tl.arange(0, ROWS)
    raw_row = raw_ptr + (local.to(tl.int64) * LAYOUT.output_width)[:, None]
    state_row = state_ptr + (local.to(tl.int64) * LAYOUT.state_width)[:, None]
    scratch = Scratch(program, program * LAYOUT.program_blocks, act_ptr, state_ptr, raw_row, state_row)
    for tile in range(program, n_tiles, tl.num_programs(0)):
        first_row = (tl.full([], 0, tl.int64) + tile) * ROWS
        chains = tile_chains(first_row, n_chains, first_chain, chain_ids_ptr, ROWS)
        run_tile(
            net, scratch, chains, start_ptr, stored, checking, timing, noise, first_step, run_steps,
            MAP, LAYOUT, USE_ASM, USE_TMA,
        )  # fmt: skip


@functools.lru_cache(maxsize=256)
def variant(shape: NetShape, precision: str, tile: WideTile, kind: LaunchKind = QUIET, use_asm: bool = True) -> Variant:
    """What `launch_wide` launches. ``precision`` is a device precision; "fp32" stands for "fp16x3"."""
    form = usual_precision(precision)
    constants = {
        "MAP": compiled_map(shape, form, kind),
        "LAYOUT": wide_layout(shape, tile, form),
        "USE_ASM": use_asm,
        "USE_TMA": tile.use_tma,
    }
    own = own_types(OPERANDS[form], tile)
    return Variant(wide_kernel, own | common_types(kind), constants, tile.warps, tile.stages)


def own_types(operand: str, tile: WideTile) -> dict[str, str]:
    """Name -> type of the kernel's own arguments; without the copy engine pointers stand in for its descriptors."""
    types = dict.fromkeys(("act_ptr", "weight_ptr", "last_ptr"), operand)
    types |= dict.fromkeys(("bias_ptr", "last_bias_ptr", "raw_ptr", "state_ptr"), "*fp32")
    types |= {"table_ptr": "*i32", "n_tiles": "i32"}
    for name, rows in (("act_desc", tile.rows), ("weight_desc", tile.cols), ("last_desc", tile.last_cols)):
        types[name] = f"tensordesc<{operand[1:]}[{rows},{tile.inner}]>" if tile.use_tma else operand
    return types


def launch_wide(packed: WideWeights, request: LaunchRequest, outputs: Outputs, scratch: WideScratch) -> None:
    """Run a launch on the device that holds ``packed``; CPU tensors need TRITON_INTERPRET=1.

    The grid has as many programs as ``scratch`` is for. Two launches at a time need two scratches.

    Raises:
        ValueError: tensors that do not fit.
    """
    device, shape, tile = packed.weight.device, packed.shape, packed.tile
    check_tensors(request, shape, device, outputs)
    n_tiles = -(-request.n_chains // tile.rows)
    if n_tiles == 0:
        return
    blocks = ((scratch.act, tile.rows), (packed.weight, tile.cols), (packed.last, tile.last_cols))
    sources = [TensorDescriptor.from_tensor(t, [rows, tile.inner]) if tile.use_tma else t for t, rows in blocks]
    arguments = [
        *sources,
        *(scratch.act, packed.weight, packed.last, packed.bias, packed.last_bias, packed.table),
        *(scratch.raw, scratch.state, n_tiles),
        *common_arguments(request, outputs),
    ]
    chosen = variant(shape, packed.precision, tile, kind_of(request, outputs), use_asm_on(device))
    chosen.launch(min(n_tiles, scratch.n_programs), arguments)


def launcher(
    layers: Layers,
    shape: NetShape,
    tile: WideTile,
    precision: str,
    device: torch.device,
    *,
    n_programs: int,
    **_: object,
) -> Callable[[LaunchRequest, Outputs], None]:
    """See `kaleido_kernels.kernels.make_launcher`."""
    packed = pack_wide(layers, shape, tile, precision, device)
    scratch = allocate_scratch(packed, n_programs)
    return lambda request, outputs: launch_wide(packed, request, outputs, scratch)
