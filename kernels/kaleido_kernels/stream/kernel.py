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
fp32 states are wanted: at draws, at the two steps up to the end or to a check for the residual, and at every step with
jitter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from kaleido_kernels.launch import (
    OPERANDS,
    QUIET,
    UNSPECIALISED,
    LaunchKind,
    LaunchRequest,
    Outputs,
    argument_types,
    check_tensors,
    check_tile,
    kind_of,
    pointer_arguments,
    scalar_arguments,
)
from kaleido_kernels.packing import Layers
from kaleido_kernels.precision import usual_precision
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.steps import (
    activate,
    add_jitter,
    bound_output,
    check_rows,
    dense_layer,
    next_check,
    row_chains,
    row_residual,
    start_tile,
    to_operand,
)
from kaleido_kernels.stream.pack import PackedStream, pack_stream
from kaleido_kernels.stream.plan import stream_layout
from kaleido_kernels.tile import Tile
from kaleido_kernels.variant import Variant, use_asm_on


@triton.jit
def join_halves(left, right, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """(BLOCK, TILE) twice -> (BLOCK, 2 * TILE), side by side."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (BLOCK, 2 * TILE))


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
def layer_columns(
    tile, first_col, h_high, h_low, w_high_ptr, w_low_ptr, bias_ptr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK, COLS) fp32 before the activation: columns first_col .. of what weight tile ``tile`` makes of h."""
    cols = first_col + tl.arange(0, COLS)
    offsets = tl.arange(0, WIDTH)[:, None] * TILE + cols[None, :]
    w_high = tl.load(w_high_ptr + tile * (WIDTH * TILE) + offsets)
    w_low = tl.load(w_low_ptr + tile * (WIDTH * TILE) + offsets) if PRECISION == "fp16x3" else w_high
    bias = tl.load(bias_ptr + tile * TILE + cols)
    acc = tl.broadcast_to(bias[None, :], (BLOCK, COLS))
    return dense_layer(h_high, h_low, w_high, w_low, acc, PRECISION)


@triton.jit
def store_first_input(
    start_ptr, input_ptr, rows, row_mask, chains, t, end, quiet_from, jitter, seed,
    DIM: tl.constexpr, EDGE: tl.constexpr, BLOCK: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    JITTER: tl.constexpr, INIT: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    """The input of the launch's first step into memory: given states or start noise, jittered where that step is."""
    # t < end always. A count known at compile time would be unrolled and the noise of all pieces made at once: with
    # D = 64 and width 128 in 152 registers instead of 128, too many for two programs on a multiprocessor.
    pieces = tl.where(t < end, (DIM + EDGE - 1) // EDGE, 0)
    for piece in tl.range(pieces, num_stages=1):
        cols = piece * EDGE + tl.arange(0, EDGE)
        mask = row_mask[:, None] & (cols < DIM)[None, :]
        offsets = rows[:, None] * DIM + cols[None, :]
        if HAS_START:
            x = tl.load(start_ptr + offsets, mask=mask, other=0.0)
        else:
            x = start_tile(seed, chains, piece * EDGE, LOW, HIGH, INIT, DIM, BLOCK, EDGE)
        x = jitter_input(x, t, quiet_from, piece * EDGE, jitter, seed, chains, LOW, HIGH, JITTER, DIM, BLOCK, EDGE)
        tl.store(input_ptr + offsets, x, mask=mask)


@triton.jit
def load_input(
    input_ptr, rows, row_mask, first_col,
    DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns first_col .. of a step's input in memory, as an operand (BLOCK, TILE)."""
    cols = first_col + tl.arange(0, TILE)
    mask = row_mask[:, None] & (cols < DIM)[None, :]
    x = tl.load(input_ptr + rows[:, None] * DIM + cols[None, :], mask=mask, other=0.0)
    return to_operand(x, PRECISION)


@triton.jit
def load_step_input(
    input_ptr, rows, row_mask,
    DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The operand (BLOCK, WIDTH) of a step from its input in memory, which other threads may have written."""
    tl.debug_barrier()
    h_high, h_low = load_input(input_ptr, rows, row_mask, 0, DIM, BLOCK, TILE, PRECISION)
    if WIDTH > TILE:
        # With D <= TILE the second half meets zero rows, so that it may be the first once more.
        r_high, r_low = h_high, h_low
        if DIM > TILE:
            r_high, r_low = load_input(input_ptr, rows, row_mask, TILE, DIM, BLOCK, TILE, PRECISION)
        h_high = join_halves(h_high, r_high, BLOCK, TILE)
        h_low = join_halves(h_low, r_low, BLOCK, TILE) if PRECISION == "fp16x3" else h_high
    tl.debug_barrier()
    return h_high, h_low


@triton.jit
def last_layer(
    h_high, h_low, w_high_ptr, w_low_ptr, bias_ptr, draws_ptr, final_ptr, input_ptr,
    rows, row_mask, live, chains, n_draws, draw, is_draw, done, target, quiet_from, jitter, seed,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, EDGE: tl.constexpr, TILES: tl.constexpr,
    LAST_TILES: tl.constexpr, BLOCK: tl.constexpr, BOUND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    PRECISION: tl.constexpr, JITTER: tl.constexpr, KEEP_DRAWS: tl.constexpr, CHECKS: tl.constexpr,
    USE_ASM: tl.constexpr,
):  # fmt: skip
    """Last layer of a step whose states are wanted in fp32: stores draws, and the next step's input or a final state.

    ``done``: steps done when this one is; ``target``: the number of them after which states are final, for ``live``
    rows.
    """
    for piece in tl.static_range((DIM + EDGE - 1) // EDGE):
        cols = piece * EDGE + tl.arange(0, EDGE)
        mask = row_mask[:, None] & (cols < DIM)[None, :]
        offsets = rows[:, None] * DIM + cols[None, :]
        acc = layer_columns(
            TILES - LAST_TILES + piece * EDGE // TILE, piece * EDGE % TILE,
            h_high, h_low, w_high_ptr, w_low_ptr, bias_ptr, WIDTH, TILE, EDGE, BLOCK, PRECISION,
        )  # fmt: skip
        y = bound_output(acc, BOUND, USE_ASM)
        x = y
        if JITTER == "upstream":
            x = add_jitter(y, jitter, seed, chains, piece * EDGE, done, LOW, HIGH, JITTER, DIM, BLOCK, EDGE)
        if KEEP_DRAWS:
            draw_offsets = (rows[:, None] * n_draws + draw) * DIM + cols[None, :]
            tl.store(draws_ptr + draw_offsets, x, mask=mask & is_draw)
        if done < target:
            x = jitter_input(
                x, done, quiet_from, piece * EDGE, jitter, seed, chains, LOW, HIGH, JITTER, DIM, BLOCK, EDGE
            )
        # The output of the last step is stored before its noise: `store_residual` wants it, and adds the noise then.
        kept = tl.where(done == target, y, x) if JITTER == "upstream" else x
        stored = mask & (live[:, None] | (done < target)) if CHECKS else mask
        tl.store(tl.where(done == target, final_ptr, input_ptr) + offsets, kept, mask=stored)


@triton.jit
def store_residual(
    residual_ptr, final_ptr, input_ptr, rows, row_mask, chains, end, jitter, seed,
    DIM: tl.constexpr, EDGE: tl.constexpr, BLOCK: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    JITTER: tl.constexpr,
):  # fmt: skip
    """The last step's residual, from memory: with the step's input and output in registers the kernel takes 40 more."""
    tl.debug_barrier()
    residual = tl.zeros([BLOCK], tl.float32)
    for piece in tl.range((DIM + EDGE - 1) // EDGE, num_stages=1):
        cols = piece * EDGE + tl.arange(0, EDGE)
        mask = row_mask[:, None] & (cols < DIM)[None, :]
        offsets = rows[:, None] * DIM + cols[None, :]
        y = tl.load(final_ptr + offsets, mask=mask, other=0.0)
        before = tl.load(input_ptr + offsets, mask=mask, other=0.0)
        change = row_residual(y - before, piece * EDGE, DIM, EDGE)
        residual = tl.maximum(residual, change, propagate_nan=tl.PropagateNan.ALL)
        if JITTER == "upstream":
            x = add_jitter(y, jitter, seed, chains, piece * EDGE, end, LOW, HIGH, JITTER, DIM, BLOCK, EDGE)
            tl.store(final_ptr + offsets, x, mask=mask)
    tl.store(residual_ptr + rows, residual, mask=row_mask)


@triton.jit
def check_states(
    final_ptr, input_ptr, saved_ptr, rows, row_mask, calm, step, n_steps, every, tol, patience,
    residual_ptr, calm_ptr, halt_ptr,
    DIM: tl.constexpr, EDGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`check_rows` after ``step`` steps, with residuals and distances from memory as in `store_residual`.

    The state becomes the next step's input. Halted rows are computed on from where they halted, for nobody.
    """
    tl.debug_barrier()
    residual = tl.zeros([BLOCK], tl.float32)
    distance = tl.zeros([BLOCK], tl.float32)
    for piece in tl.range((DIM + EDGE - 1) // EDGE, num_stages=1):
        cols = piece * EDGE + tl.arange(0, EDGE)
        mask = row_mask[:, None] & (cols < DIM)[None, :]
        offsets = rows[:, None] * DIM + cols[None, :]
        y = tl.load(final_ptr + offsets, mask=mask, other=0.0)
        before = tl.load(input_ptr + offsets, mask=mask, other=0.0)
        saved = tl.load(saved_ptr + offsets, mask=mask, other=0.0)
        tl.debug_barrier()  # a layout of the store that differs from the load's would meet other threads' values
        tl.store(input_ptr + offsets, y, mask=mask)
        change = row_residual(y - before, piece * EDGE, DIM, EDGE)
        residual = tl.maximum(residual, change, propagate_nan=tl.PropagateNan.ALL)
        apart = row_residual(y - saved, piece * EDGE, DIM, EDGE)
        distance = tl.maximum(distance, apart, propagate_nan=tl.PropagateNan.ALL)
    return check_rows(
        residual, distance, calm, step, n_steps, every, tol, patience, rows, residual_ptr, calm_ptr, halt_ptr
    )  # fmt: skip


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
    saved_ptr,  # (n_chains, DIM) fp32, row-major; unused without CHECKS, as the next three
    calm_in_ptr,  # (n_chains,) int32
    calm_ptr,  # (n_chains,) int32
    halt_ptr,  # (n_chains,) int32
    input_ptr,  # (n_chains, DIM) fp32, row-major; scratch: inputs of steps, where they are wanted in fp32
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
    CHECKS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Grid: (cdiv(n_chains, BLOCK),); program i carries chains i * BLOCK .. through all steps of the launch."""
    HALVES: tl.constexpr = WIDTH // TILE
    row0 = tl.program_id(0).to(tl.int64) * BLOCK
    rows = row0 + tl.arange(0, BLOCK)
    row_mask = rows < n_chains
    chains = row_chains(chain_ids_ptr, rows, row_mask, first_chain, HAS_IDS)

    t = first_step
    end = first_step + run_steps
    draw = tl.maximum(first_step - burn_in, 0) // thin
    draw_end = burn_in + (draw + 1) * thin
    live = row_mask
    if CHECKS:
        calm = tl.load(calm_in_ptr + rows, mask=row_mask, other=-1)

    store_first_input(
        start_ptr, input_ptr, rows, row_mask, chains, t, end, draw_end - settle, jitter, seed,
        DIM, EDGE, BLOCK, LOW, HIGH, JITTER, INIT, HAS_START,
    )  # fmt: skip
    while t < end:
        h_high, h_low = load_step_input(input_ptr, rows, row_mask, DIM, BLOCK, WIDTH, TILE, PRECISION)
        target = tl.minimum(end, next_check(t, every)) if CHECKS else end
        # Up to the next draw, the input of the last step, or the end. With jitter up to the end of this step: noise is
        # made outside of the loop, EDGE columns at a time; inside it would spill (up to 5 KB of stack at width 256).
        stop = tl.minimum(draw_end, tl.where(t < target - 1, target - 1, target)) if JITTER == "none" else t + 1
        g_high, g_low = to_operand(tl.zeros([BLOCK, TILE], tl.float32), PRECISION)
        tile = 0
        for _ in range((stop - t) * TILES - LAST_TILES):
            acc = layer_columns(
                tile, 0, h_high, h_low, w_high_ptr, w_low_ptr, bias_ptr, WIDTH, TILE, TILE, BLOCK, PRECISION
            )  # fmt: skip
            if JITTER != "none":
                r_high, r_low = activate(acc, ACTIVATION, NEGATIVE_SLOPE, PRECISION, USE_ASM)
            elif tile < TILES - LAST_TILES:
                r_high, r_low = activate(acc, ACTIVATION, NEGATIVE_SLOPE, PRECISION, USE_ASM)
            else:
                r_high, r_low = to_operand(bound_output(acc, BOUND, USE_ASM), PRECISION)
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
        # Never true, and not seen to be: or the compiler would keep all addresses in registers through the loop above
        # (ROWS_NOTE).
        row0 = tl.where(stop > end, row0 + 1, row0)
        rows = row0 + tl.arange(0, BLOCK)
        row_mask = rows < n_chains
        if CHECKS:
            live = calm >= 0
        last_layer(
            h_high, h_low, w_high_ptr, w_low_ptr, bias_ptr, draws_ptr, final_ptr, input_ptr,
            rows, row_mask, live, chains, n_draws, this_draw, is_draw, stop, target, draw_end - settle, jitter, seed,
            DIM, WIDTH, TILE, EDGE, TILES, LAST_TILES, BLOCK, BOUND, LOW, HIGH, PRECISION, JITTER, KEEP_DRAWS, CHECKS,
            USE_ASM,
        )  # fmt: skip
        t = stop
        if CHECKS:
            if t == target:
                calm = check_states(
                    final_ptr, input_ptr, saved_ptr, rows, row_mask, calm, t, burn_in + n_draws * thin, every,
                    tol, patience, residual_ptr, calm_ptr, halt_ptr, DIM, EDGE, BLOCK,
                )  # fmt: skip
                end = tl.where(tl.max(calm, axis=0) >= 0, end, t)

    if not CHECKS:
        store_residual(
            residual_ptr, final_ptr, input_ptr, rows, row_mask, chains, end, jitter, seed,
            DIM, EDGE, BLOCK, LOW, HIGH, JITTER,
        )  # fmt: skip


@functools.lru_cache(maxsize=256)
def variant(shape: NetShape, precision: str, tile: Tile, kind: LaunchKind = QUIET, use_asm: bool = True) -> Variant:
    """What `launch_stream` launches. ``precision`` is a device precision; "fp32" stands for "fp16x3"."""
    form, layout = usual_precision(precision), stream_layout(shape)
    constants = {
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
        "PRECISION": form,
        "USE_ASM": use_asm,
        **kind.constants,
    }
    signature = argument_types(OPERANDS[form], "*fp32", kind) | {"input_ptr": "*fp32"}
    return Variant(stream_kernel, signature, constants, tile.num_warps, tile.num_stages)


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
    pointers = pointer_arguments(packed.high, packed.low, packed.bias, request, outputs)
    inputs = torch.empty_like(outputs.final)
    chosen.launch(-(-request.n_chains // tile.block_chains), [*pointers, inputs, *scalar_arguments(request)])


def launcher(
    layers: Layers, shape: NetShape, tile: Tile, precision: str, device: torch.device, **_: object
) -> Callable[[LaunchRequest, Outputs], None]:
    """See `kaleido_kernels.kernels.make_launcher`."""
    packed = pack_stream(layers, shape, precision, device)
    return lambda request, outputs: launch_stream(packed, request, tile, outputs)
