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

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kaleido_kernels.launch import (
    OPERANDS,
    QUIET,
    UNSPECIALISED,
    LaunchKind,
    LaunchRequest,
    Outputs,
    argument_types,
    check_tensors,
    input_pointers,
    kind_of,
    scalar_arguments,
)
from kaleido_kernels.packing import Layers
from kaleido_kernels.precision import operand_parts, usual_precision
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.steps import (
    activate,
    add_jitter,
    bound_output,
    check_rows,
    dense_layer,
    is_jittered,
    next_check,
    row_chains,
    row_residual,
    start_tile,
    to_operand,
)
from kaleido_kernels.variant import Variant, use_asm_on
from kaleido_kernels.wide.pack import WideScratch, WideWeights, allocate_scratch, pack_wide
from kaleido_kernels.wide.plan import STATE_COLS, WideTile, output_width, program_blocks, state_width

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


@triton.jit
def product_tile(
    act_desc, act_ptr, weight_desc, weight_ptr, bias_ptr, in_block, weight_block, bias_tile, inner_blocks,
    ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Input blocks times weight blocks plus bias: (ROWS, COLS) fp32. Weight blocks are (COLS, INNER)."""
    bias = tl.load(bias_ptr + bias_tile * COLS + tl.arange(0, COLS))
    acc = tl.broadcast_to(bias[None, :], (ROWS, COLS))
    for k in tl.range(0, inner_blocks, num_stages=STAGES):
        h = (in_block + k) * PARTS
        w = (weight_block + k) * PARTS
        h_high = load_block(act_desc, act_ptr, h, ROWS, INNER, USE_TMA)
        w_high = load_block(weight_desc, weight_ptr, w, COLS, INNER, USE_TMA)
        h_low, w_low = h_high, w_high
        if PARTS == 2:
            h_low = load_block(act_desc, act_ptr, h + 1, ROWS, INNER, USE_TMA)
            w_low = load_block(weight_desc, weight_ptr, w + 1, COLS, INNER, USE_TMA)
        acc = dense_layer(h_high, h_low, w_high.T, w_low.T, acc, PRECISION)
    return acc


@triton.jit
def put_input(
    x, act_ptr, state_ptr, program, block, jittered, keep, jitter, seed, chains, step,
    LOW: tl.constexpr, HIGH: tl.constexpr, JITTER: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr, PROGRAM_BLOCKS: tl.constexpr,
    STATE_WIDTH: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Writes columns ``block * COLS`` on of the input of ``step``: x, jittered where the step is."""
    first_col = block * COLS
    if JITTER == "normal" or JITTER == "uniform":
        if jittered:
            x = add_jitter(x, jitter, seed, chains, first_col, step, LOW, HIGH, JITTER, DIM, ROWS, COLS)
    col = first_col + tl.arange(0, COLS)
    x = tl.where(col[None, :] < DIM, x, 0.0)
    high, low = to_operand(x, PRECISION)
    first_block = program * PROGRAM_BLOCKS + first_col // INNER
    store_blocks(act_ptr, first_block, high, low, ROWS, COLS, INNER, PARTS)
    if keep:
        row = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64) * STATE_WIDTH
        tl.store(state_ptr + row[:, None] + col[None, :], x)


@triton.jit
def run_layers(
    act_desc, weight_desc, last_desc, act_ptr, weight_ptr, last_ptr, bias_ptr, last_bias_ptr, table_ptr, raw_row, base,
    N_LAYERS: tl.constexpr, DIM: tl.constexpr, ACTIVATION: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr,
    PRECISION: tl.constexpr, USE_ASM: tl.constexpr, USE_TMA: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    LAST_COLS: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All layers of one step, from the state's blocks in scratch to raw sums at ``raw_row``, ready to be read."""
    for layer in range(N_LAYERS - 1):
        entry = table_ptr + layer * TABLE_COLS
        inner_blocks = tl.load(entry)
        col_tiles = tl.load(entry + 1)
        weight_block = tl.load(entry + 2)
        bias_tile = tl.load(entry + 3)
        in_block = base + tl.load(entry + 4)
        out_block = base + tl.load(entry + 5)
        for n in range(col_tiles):
            acc = product_tile(
                act_desc, act_ptr, weight_desc, weight_ptr, bias_ptr,
                in_block, weight_block + n * inner_blocks, bias_tile + n, inner_blocks,
                ROWS, COLS, INNER, PARTS, STAGES, PRECISION, USE_TMA,
            )  # fmt: skip
            high, low = activate(acc, ACTIVATION, NEGATIVE_SLOPE, PRECISION, USE_ASM)
            store_blocks(act_ptr, out_block + n * (COLS // INNER), high, low, ROWS, COLS, INNER, PARTS)
        end_stores(USE_TMA, USE_ASM)
    entry = table_ptr + (N_LAYERS - 1) * TABLE_COLS
    inner_blocks = tl.load(entry)
    in_block = base + tl.load(entry + 4)
    for n in range((DIM + LAST_COLS - 1) // LAST_COLS):
        acc = product_tile(
            act_desc, act_ptr, last_desc, last_ptr, last_bias_ptr, in_block, n * inner_blocks, n, inner_blocks,
            ROWS, LAST_COLS, INNER, PARTS, STAGES, PRECISION, USE_TMA,
        )  # fmt: skip
        tl.store(raw_row + (n * LAST_COLS + tl.arange(0, LAST_COLS))[None, :], acc)
    tl.debug_barrier()


@triton.jit(do_not_specialize=(*UNSPECIALISED, "n_tiles"))
def wide_kernel(
    draws_ptr,  # (n_chains, n_draws, DIM) fp32, row-major; unused without KEEP_DRAWS
    final_ptr,  # (n_chains, DIM) fp32, row-major
    residual_ptr,  # (n_chains,) fp32
    act_desc,  # copy descriptor over act_ptr, blocks (ROWS, INNER)
    weight_desc,  # copy descriptor over weight_ptr, blocks (COLS, INNER)
    last_desc,  # copy descriptor over last_ptr, blocks (LAST_COLS, INNER)
    act_ptr,  # (n_programs * PROGRAM_BLOCKS * PARTS, ROWS, INNER) operands, scratch
    weight_ptr,  # (blocks * PARTS, COLS, INNER) operands
    last_ptr,  # (blocks * PARTS, LAST_COLS, INNER) operands, last layer
    bias_ptr,  # (tiles, COLS) fp32
    last_bias_ptr,  # (tiles, LAST_COLS) fp32
    table_ptr,  # (N_LAYERS, TABLE_COLS) int32, rows as WideLayer.row
    raw_ptr,  # (n_programs, ROWS, OUTPUT_WIDTH) fp32, scratch
    state_ptr,  # (n_programs, ROWS, STATE_WIDTH) fp32, scratch
    start_ptr,  # (n_chains, DIM) fp32, row-major; unused without HAS_START
    chain_ids_ptr,  # (n_chains,) int64; unused without HAS_IDS
    saved_ptr,  # (n_chains, DIM) fp32, row-major; unused without CHECKS, as the next three
    calm_in_ptr,  # (n_chains,) int32
    calm_ptr,  # (n_chains,) int32
    halt_ptr,  # (n_chains,) int32
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
    tol,
    patience: tl.int32,
    every: tl.int32,
    n_tiles: tl.int32,
    N_LAYERS: tl.constexpr,
    DIM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    BOUND: tl.constexpr,
    PRECISION: tl.constexpr,
    JITTER: tl.constexpr,
    INIT: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_IDS: tl.constexpr,
    KEEP_DRAWS: tl.constexpr,
    CHECKS: tl.constexpr,
    USE_ASM: tl.constexpr,
    USE_TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LAST_COLS: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PROGRAM_BLOCKS: tl.constexpr,
    STATE_WIDTH: tl.constexpr,
    OUTPUT_WIDTH: tl.constexpr,
    STATE_COLS: tl.constexpr,
):
    """Grid: (n_programs,); program p owns tiles p, p + n_programs, ... of ROWS chains."""
    program = tl.program_id(0)
    base = program * PROGRAM_BLOCKS
    local = program * ROWS + tl.arange(0, ROWS)
    raw_row = raw_ptr + (local.to(tl.int64) * OUTPUT_WIDTH)[:, None]
    state_row = state_ptr + (local.to(tl.int64) * STATE_WIDTH)[:, None]
    N_BLOCKS: tl.constexpr = STATE_WIDTH // STATE_COLS
    for tile in range(program, n_tiles, tl.num_programs(0)):
        rows = (tl.full([], 0, tl.int64) + tile) * ROWS + tl.arange(0, ROWS)
        row_mask = rows < n_chains
        chains = row_chains(chain_ids_ptr, rows, row_mask, first_chain, HAS_IDS)
        step = tl.full([], 0, tl.int32) + first_step
        jittered = is_jittered(step, burn_in, thin, settle)
        end_step = first_step + run_steps
        # States are final, and residuals wanted, at the end and at checks; inputs of steps that lead there are kept.
        target = tl.minimum(end_step, next_check(first_step, every)) if CHECKS else end_step
        live = row_mask
        if CHECKS:
            calm = tl.load(calm_in_ptr + rows, mask=row_mask, other=-1)
        for block in range(N_BLOCKS):
            first_col = block * STATE_COLS
            col = first_col + tl.arange(0, STATE_COLS)
            mask = row_mask[:, None] & (col[None, :] < DIM)
            if HAS_START:
                x = tl.load(start_ptr + rows[:, None] * DIM + col[None, :], mask=mask, other=0.0)
            else:
                x = start_tile(seed, chains, first_col, LOW, HIGH, INIT, DIM, ROWS, STATE_COLS)
            put_input(
                x, act_ptr, state_ptr, program, block, jittered, target == first_step + 1, jitter, seed, chains, step,
                LOW, HIGH, JITTER, DIM, PRECISION, ROWS, INNER, PARTS, PROGRAM_BLOCKS, STATE_WIDTH, STATE_COLS,
            )  # fmt: skip
        end_stores(USE_TMA, USE_ASM)
        step_number = first_step
        while step_number < end_step:
            step = tl.full([], 0, tl.int32) + step_number
            run_layers(
                act_desc, weight_desc, last_desc, act_ptr, weight_ptr, last_ptr, bias_ptr, last_bias_ptr, table_ptr,
                raw_row, base, N_LAYERS, DIM, ACTIVATION, NEGATIVE_SLOPE, PRECISION, USE_ASM, USE_TMA,
                ROWS, COLS, LAST_COLS, INNER, PARTS, STAGES,
            )  # fmt: skip
            step_number += 1
            is_target = step_number == target
            if CHECKS:
                live = calm >= 0
                if is_target:
                    target = tl.minimum(end_step, next_check(step_number, every))
            past = step + 1 - burn_in
            draw = past // thin - 1
            is_draw = (past > 0) & (past == (draw + 1) * thin)
            jittered = is_jittered(step + 1, burn_in, thin, settle)
            residual = tl.zeros([ROWS], tl.float32)
            distance = tl.zeros([ROWS], tl.float32)
            for block in range(N_BLOCKS):
                first_col = block * STATE_COLS
                col = first_col + tl.arange(0, STATE_COLS)
                mask = row_mask[:, None] & (col[None, :] < DIM)
                x = bound_output(tl.load(raw_row + col[None, :], mask=col[None, :] < DIM, other=0.0), BOUND, USE_ASM)
                if is_target:
                    change = row_residual(x - tl.load(state_row + col[None, :]), first_col, DIM, STATE_COLS)
                    residual = tl.maximum(residual, change, propagate_nan=tl.PropagateNan.ALL)
                    if CHECKS:
                        saved = tl.load(saved_ptr + rows[:, None] * DIM + col[None, :], mask=mask, other=0.0)
                        apart = row_residual(x - saved, first_col, DIM, STATE_COLS)
                        distance = tl.maximum(distance, apart, propagate_nan=tl.PropagateNan.ALL)
                        tl.debug_barrier()  # with a check at every step, `put_input` writes to where this was read
                if JITTER == "upstream":
                    x = add_jitter(
                        x, jitter, seed, chains, first_col, step + 1, LOW, HIGH, JITTER, DIM, ROWS, STATE_COLS
                    )
                if KEEP_DRAWS:
                    if is_draw:
                        place = (rows * n_draws + draw)[:, None] * DIM + col[None, :]
                        tl.store(draws_ptr + place, x, mask=mask)
                if is_target:
                    tl.store(final_ptr + rows[:, None] * DIM + col[None, :], x, mask=mask & live[:, None])
                if step_number < end_step:
                    put_input(
                        x, act_ptr, state_ptr, program, block, jittered, step_number == target - 1,
                        jitter, seed, chains, step + 1,
                        LOW, HIGH, JITTER, DIM, PRECISION, ROWS, INNER, PARTS, PROGRAM_BLOCKS, STATE_WIDTH, STATE_COLS,
                    )  # fmt: skip
            if is_target:
                if CHECKS:
                    # Halted rows are computed on beside the others, and their states stay as they were stored.
                    calm = check_rows(
                        residual, distance, calm, step_number, burn_in + n_draws * thin, every, tol, patience, rows,
                        residual_ptr, calm_ptr, halt_ptr,
                    )  # fmt: skip
                    end_step = tl.where(tl.max(calm, axis=0) >= 0, end_step, step_number)
                else:
                    tl.store(residual_ptr + rows, residual, mask=row_mask)
            end_stores(USE_TMA, USE_ASM)


@functools.lru_cache(maxsize=256)
def variant(shape: NetShape, precision: str, tile: WideTile, kind: LaunchKind = QUIET, use_asm: bool = True) -> Variant:
    """What `launch_wide` launches. ``precision`` is a device precision; "fp32" stands for "fp16x3"."""
    form = usual_precision(precision)
    constants = {
        "N_LAYERS": shape.n_layers,
        "DIM": shape.dim,
        "LOW": shape.low,
        "HIGH": shape.high,
        "ACTIVATION": shape.activation,
        "NEGATIVE_SLOPE": shape.negative_slope,
        "BOUND": shape.bound,
        "PRECISION": form,
        "USE_ASM": use_asm,
        "USE_TMA": tile.use_tma,
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "LAST_COLS": tile.last_cols,
        "INNER": tile.inner,
        "PARTS": operand_parts(form),
        "STAGES": tile.stages,
        "PROGRAM_BLOCKS": program_blocks(shape, tile),
        "STATE_WIDTH": state_width(shape, tile),
        "OUTPUT_WIDTH": output_width(shape, tile),
        "STATE_COLS": STATE_COLS,
        **kind.constants,
    }
    return Variant(wide_kernel, wide_signature(OPERANDS[form], tile, kind), constants, tile.warps, tile.stages)


def wide_signature(operand: str, tile: WideTile, kind: LaunchKind) -> dict[str, str]:
    """Name -> type of the arguments of a launch; without the copy engine pointers stand in for its descriptors."""
    signature = argument_types(operand, "*fp32", kind) | {"table_ptr": "*i32", "n_tiles": "i32"}
    del signature["w_high_ptr"], signature["w_low_ptr"]
    signature |= dict.fromkeys(("act_ptr", "weight_ptr", "last_ptr"), operand)
    signature |= dict.fromkeys(("last_bias_ptr", "raw_ptr", "state_ptr"), "*fp32")
    for name, rows in (("act_desc", tile.rows), ("weight_desc", tile.cols), ("last_desc", tile.last_cols)):
        signature[name] = f"tensordesc<{operand[1:]}[{rows},{tile.inner}]>" if tile.use_tma else operand
    return signature


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
        outputs.draws if outputs.draws is not None else outputs.final,
        outputs.final,
        outputs.residual,
        *sources,
        *(scratch.act, packed.weight, packed.last, packed.bias, packed.last_bias, packed.table),
        *(scratch.raw, scratch.state),
        *input_pointers(request, outputs),
        *scalar_arguments(request),
        n_tiles,
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
