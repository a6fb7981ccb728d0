"""The wide kernel: any width. Persistent programs, activations in scratch memory that stays in L2, tiled weights.

One program owns a tile of chains through all steps. A layer loads blocks of activations and weights (by the copy
engine where there is one), multiplies, and stores the activations of the next layer to the program's scratch; a
barrier, with a fence between ordinary stores and the copy engine's loads, ends each layer. The last layer makes the
next step's input; where more is wanted of a step, it stores raw sums, and a pass over the state in narrow blocks does
bound, residual, draws and noise: beside a full accumulator they would spill.
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
from kaleido_kernels.wide.blocks import end_stores, product_tile, store_blocks
from kaleido_kernels.wide.pack import WideScratch, WideWeights, allocate_scratch, pack_wide
from kaleido_kernels.wide.plan import WideTile, wide_layout

TABLE_COLS = tl.constexpr(6)


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
def put_input(x, scratch, ids, block, step, jittered, keep, noise, MAP: tl.constexpr, LAYOUT: tl.constexpr):
    """Writes columns ``block * state_cols`` on of the input of ``step``: x, jittered where the step is."""
    COLS: tl.constexpr = LAYOUT.state_cols
    first_col = block * COLS
    x = jitter_input(x, step, jittered, noise, ids, first_col, MAP, LAYOUT.rows, COLS)
    col = first_col + tl.arange(0, COLS)
    x = tl.where(col[None, :] < MAP.dim, x, 0.0)
    high, low = to_operand(x, MAP)
    first_block = scratch.program * LAYOUT.program_blocks + first_col // LAYOUT.inner
    store_blocks(scratch.act_ptr, first_block, high, low, None, LAYOUT.rows, COLS, LAYOUT.inner, LAYOUT.parts)
    if keep:
        row = (scratch.program * LAYOUT.rows + tl.arange(0, LAYOUT.rows)).to(tl.int64) * LAYOUT.state_width
        tl.store(scratch.state_ptr + row[:, None] + col[None, :], x)


@triton.jit
def run_layers(
    net, scratch, quiet, MAP: tl.constexpr, LAYOUT: tl.constexpr, USE_ASM: tl.constexpr, USE_TMA: tl.constexpr
):
    """All layers of one step, from the state's blocks in scratch to raw sums in it, ready to be read.

    If the step is ``quiet``, to the next input in the state's blocks instead: nothing reads those in the last layer if
    there is a hidden one.
    """
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
            store_blocks(net.act_ptr, first_block, high, low, None, LAYOUT.rows, COLS, LAYOUT.inner, LAYOUT.parts)
        end_stores(USE_TMA, USE_ASM)
    entry = net.table_ptr + (LAYOUT.n_layers - 1) * TABLE_COLS
    inner_blocks = tl.load(entry)
    in_block = scratch.base + tl.load(entry + 4)
    for n in range((MAP.dim + LAST_COLS - 1) // LAST_COLS):
        acc = product_tile(
            net.act_desc, net.act_ptr, net.last_desc, net.last_ptr, net.last_bias_ptr,
            in_block, n * inner_blocks, n, inner_blocks, LAST_COLS, LAYOUT, MAP, USE_TMA,
        )  # fmt: skip
        first_col = n * LAST_COLS
        col = first_col + tl.arange(0, LAST_COLS)
        if quiet:
            x = tl.where(col[None, :] < MAP.dim, bound_output(acc, MAP, USE_ASM), 0.0)
            high, low = to_operand(x, MAP)
            store_blocks(
                net.act_ptr, scratch.base + first_col // LAYOUT.inner, high, low, LAYOUT.state_width - first_col,
                LAYOUT.rows, LAST_COLS, LAYOUT.inner, LAYOUT.parts,
            )  # fmt: skip
        else:
            tl.store(scratch.raw_row + col[None, :], acc)
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
def is_quiet(done, target, timing, noise, stored, MAP: tl.constexpr, LAYOUT: tl.constexpr):
    """Whether step number ``done``, counted from 1, only makes the next input: no noise, nothing wanted in fp32.

    Its sums need no way through memory, which took 3 (fp32) to 10 % (fp16) of the time of mnist on an H200. Without a
    hidden layer the next input would overwrite the one that is being read.
    """
    if noise.shares_ptr is not None or MAP.jitter == "upstream" or LAYOUT.n_layers == 1:
        return tl.full([], 0, tl.int1)
    else:
        quiet = done < target - 1
        if MAP.jitter != "none":
            quiet = quiet & (is_jittered(done, timing) == 0)
        if stored.draws_ptr is not None:
            quiet = quiet & (done != draw_end(draw_at(done - 1, timing), timing))
        return quiet


@triton.jit
def run_tile(
    net, scratch, chains, start_ptr, stored, checking, timing, noise, first_step, run_steps,
    MAP: tl.constexpr, LAYOUT: tl.constexpr, USE_ASM: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """All steps of the launch for the chains of one tile."""
    CHECKS: tl.constexpr = checking.saved_ptr is not None
    ROWS: tl.constexpr = LAYOUT.rows
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
        done += 1
        is_target = done == target
        quiet = is_quiet(done, target, timing, noise, stored, MAP, LAYOUT)
        run_layers(net, scratch, quiet, MAP, LAYOUT, USE_ASM, USE_TMA)
        if CHECKS:
            live = calm >= 0
            if is_target:
                target = tl.minimum(last_step, next_check(done, checking.every))
        residual = tl.zeros([ROWS], tl.float32)
        distance = tl.zeros([ROWS], tl.float32)
        if not quiet:
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
