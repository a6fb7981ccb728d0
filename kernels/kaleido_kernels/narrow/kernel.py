"""The narrow kernel: padded width up to 128, all weights resident, activations in registers, layers unrolled.

One program carries BLOCK chains through all steps of a launch:

    registers       x (BLOCK, DIM_PADDED) fp32 -> h (BLOCK, WIDTH) -> ... -> x
    shared memory   every weight matrix, loaded once before the first step

Without jitter the step loop touches neither shared nor global memory except through the operands of its products.
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
from kaleido_kernels.narrow.pack import PackedNarrow, pack_narrow
from kaleido_kernels.narrow.plan import narrow_layout
from kaleido_kernels.packing import Layers
from kaleido_kernels.precision import usual_precision
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.steps import (
    activate,
    add_jitter,
    bound_output,
    check_rows,
    dense_layer,
    row_chains,
    row_residual,
    start_tile,
    to_operand,
)
from kaleido_kernels.tile import Tile
from kaleido_kernels.variant import Variant, use_asm_on


@triton.jit
def load_matrix(ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A contiguous (ROWS, COLS) matrix."""
    return tl.load(ptr + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :])


@triton.jit
def load_layers(ptr, N_LAYERS: tl.constexpr, DIM_PADDED: tl.constexpr, WIDTH: tl.constexpr):
    """All matrices as a tuple, in the order that `kaleido_kernels.packing` stores them."""
    if N_LAYERS == 1:
        return (load_matrix(ptr, DIM_PADDED, DIM_PADDED),)
    else:
        layers = (load_matrix(ptr, DIM_PADDED, WIDTH),)
        for layer in tl.static_range(N_LAYERS - 2):
            layer_ptr = ptr + DIM_PADDED * WIDTH + layer * WIDTH * WIDTH
            layers = layers + (load_matrix(layer_ptr, WIDTH, WIDTH),)  # type: ignore[assignment]  # noqa: RUF005
        last_ptr = ptr + DIM_PADDED * WIDTH + (N_LAYERS - 2) * WIDTH * WIDTH
        return layers + (load_matrix(last_ptr, WIDTH, DIM_PADDED),)  # noqa: RUF005


@triton.jit
def load_bias_rows(ptr, N_LAYERS: tl.constexpr, DIM_PADDED: tl.constexpr, WIDTH: tl.constexpr):
    """The (16, out) bias rows of all layers as a tuple."""
    layers = ()
    for layer in tl.static_range(N_LAYERS - 1):
        layer_ptr = ptr + layer * 16 * WIDTH
        layers = layers + (load_matrix(layer_ptr, 16, WIDTH),)  # type: ignore[assignment]  # noqa: RUF005
    return layers + (load_matrix(ptr + (N_LAYERS - 1) * 16 * WIDTH, 16, DIM_PADDED),)  # noqa: RUF005


@triton.jit
def network(
    x, w_high, w_low, bias_rows, ones,
    N_LAYERS: tl.constexpr, DIM_PADDED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr, BOUND: tl.constexpr,
    PRECISION: tl.constexpr, BIAS: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """bound(MLP(x)) of a tile, (BLOCK, DIM_PADDED) fp32."""
    h_high, h_low = to_operand(x, PRECISION)
    for layer in tl.static_range(N_LAYERS - 1):
        acc = tl.zeros([BLOCK, WIDTH], tl.float32)
        if BIAS == "mma":
            acc = tl.dot(ones, bias_rows[layer], acc, input_precision="ieee")
        acc = dense_layer(h_high, h_low, w_high[layer], w_low[layer], acc, PRECISION)
        h_high, h_low = activate(acc, ACTIVATION, NEGATIVE_SLOPE, PRECISION, USE_ASM)
    out = tl.zeros([BLOCK, DIM_PADDED], tl.float32)
    if BIAS == "mma":
        out = tl.dot(ones, bias_rows[N_LAYERS - 1], out, input_precision="ieee")
    out = dense_layer(h_high, h_low, w_high[N_LAYERS - 1], w_low[N_LAYERS - 1], out, PRECISION)
    return bound_output(out, BOUND, USE_ASM)


@triton.jit(do_not_specialize=UNSPECIALISED)
def narrow_kernel(
    draws_ptr,  # (n_chains, n_draws, DIM) fp32, row-major; unused without KEEP_DRAWS
    final_ptr,  # (n_chains, DIM) fp32, row-major
    residual_ptr,  # (n_chains,) fp32
    w_high_ptr,  # all matrices (in, out) one after another, operand type
    w_low_ptr,  # the same of the low halves; w_high_ptr itself unless PRECISION is "fp16x3"
    bias_ptr,  # (16, out) rows a layer, operand type; unused unless BIAS is "mma"
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
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    N_LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    BOUND: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PRECISION: tl.constexpr,
    BIAS: tl.constexpr,
    JITTER: tl.constexpr,
    INIT: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_IDS: tl.constexpr,
    KEEP_DRAWS: tl.constexpr,
    CHECKS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Grid: (cdiv(n_chains, BLOCK),); program i carries chains i * BLOCK .. through all steps of the launch."""
    row0 = tl.program_id(0).to(tl.int64) * BLOCK
    rows = row0 + tl.arange(0, BLOCK)
    cols = tl.arange(0, DIM_PADDED)
    row_mask = rows < n_chains
    mask = row_mask[:, None] & (cols < DIM)[None, :]
    chains = row_chains(chain_ids_ptr, rows, row_mask, first_chain, HAS_IDS)

    if HAS_START:
        x = tl.load(start_ptr + rows[:, None] * DIM + cols[None, :], mask=mask, other=1.0)
    else:
        x = start_tile(seed, chains, 0, LOW, HIGH, INIT, DIM, BLOCK, DIM_PADDED)
    # Padded columns begin as 1: two of them carry the folded bias through the layers, the others meet zero weights.
    x = tl.where((cols < DIM)[None, :], x, 1.0)

    w_high = load_layers(w_high_ptr, N_LAYERS, DIM_PADDED, WIDTH)
    w_low = load_layers(w_low_ptr, N_LAYERS, DIM_PADDED, WIDTH) if PRECISION == "fp16x3" else w_high
    bias_rows = load_bias_rows(bias_ptr, N_LAYERS, DIM_PADDED, WIDTH) if BIAS == "mma" else w_high
    ones = tl.full([BLOCK, 16], 1.0, tl.float32).to(bias_ptr.dtype.element_ty)

    offsets = rows[:, None] * DIM + cols[None, :]
    end = first_step + run_steps
    # Steps are run in stretches: up to each draw, or up to each check.
    stretch = tl.maximum(first_step - burn_in, 0) // thin
    last_stretch = tl.maximum(end - 1 - burn_in, 0) // thin
    if CHECKS:
        stretch, last_stretch = first_step // every, (end - 1) // every
        calm = tl.load(calm_in_ptr + rows, mask=row_mask, other=-1)
    change = tl.zeros([BLOCK, DIM_PADDED], tl.float32)
    for number in range(stretch, last_stretch + 1):
        stretch_end = (number + 1) * every if CHECKS else burn_in + (number + 1) * thin
        stop = tl.minimum(stretch_end, end)
        # Not carried from stretch to stretch: Triton 3.6 and 3.7 take a carried value for dead that is only the bound
        # of an inner loop, and every stretch would begin at first_step.
        begin = tl.where(number == stretch, first_step, stretch_end - (every if CHECKS else thin))
        for t in range(begin, stop):
            if JITTER == "normal" or JITTER == "uniform":
                if (t > 0) & (t < stretch_end - settle):
                    x = add_jitter(x, jitter, seed, chains, 0, t, LOW, HIGH, JITTER, DIM, BLOCK, DIM_PADDED)
            y = network(
                x, w_high, w_low, bias_rows, ones, N_LAYERS, DIM_PADDED, WIDTH, BLOCK,
                ACTIVATION, NEGATIVE_SLOPE, BOUND, PRECISION, BIAS, USE_ASM,
            )  # fmt: skip
            change = y - x
            x = y
            if JITTER == "upstream":
                x = add_jitter(y, jitter, seed, chains, 0, t + 1, LOW, HIGH, JITTER, DIM, BLOCK, DIM_PADDED)
        if KEEP_DRAWS:
            draw_offsets = (rows[:, None] * n_draws + number) * DIM + cols[None, :]
            # A mask of its own: kept through the steps it costs registers, and with ieee products one that is spilled.
            n_kept = tl.where(stop == stretch_end, n_chains, 0) - row0
            kept = (tl.arange(0, BLOCK) < n_kept)[:, None] & (cols < DIM)[None, :]
            tl.store(draws_ptr + draw_offsets, x, mask=kept)
        if CHECKS:
            # Halted rows are computed on beside the others, and their states stay as they were stored. When all have
            # halted, the stretches that are left are empty.
            live = mask & (calm >= 0)[:, None]
            tl.store(final_ptr + offsets, x, mask=live)
            saved = tl.load(saved_ptr + offsets, mask=live, other=0.0)
            calm = check_rows(
                row_residual(change, 0, DIM, DIM_PADDED), row_residual(x - saved, 0, DIM, DIM_PADDED), calm,
                stop, burn_in + n_draws * thin, every, tol, patience, rows, residual_ptr, calm_ptr, halt_ptr,
            )  # fmt: skip
            end = tl.where(tl.max(calm, axis=0) >= 0, end, stop)

    if not CHECKS:
        tl.store(final_ptr + offsets, x, mask=mask)
        tl.store(residual_ptr + rows, row_residual(change, 0, DIM, DIM_PADDED), mask=row_mask)


@functools.lru_cache(maxsize=256)
def variant(shape: NetShape, precision: str, tile: Tile, kind: LaunchKind = QUIET, use_asm: bool = True) -> Variant:
    """What `launch_narrow` launches. ``precision`` is a device precision; "fp32" stands for "fp16x3"."""
    form, layout = usual_precision(precision), narrow_layout(shape)
    constants = {
        "DIM": shape.dim,
        "DIM_PADDED": layout.dim_padded,
        "WIDTH": layout.width,
        "N_LAYERS": shape.n_layers,
        "BLOCK": tile.block_chains,
        "ACTIVATION": shape.activation,
        "NEGATIVE_SLOPE": shape.negative_slope,
        "BOUND": shape.bound,
        "LOW": shape.low,
        "HIGH": shape.high,
        "PRECISION": form,
        "BIAS": layout.bias,
        "USE_ASM": use_asm,
        **kind.constants,
    }
    signature = argument_types(OPERANDS[form], OPERANDS[form], kind)
    return Variant(narrow_kernel, signature, constants, tile.num_warps, tile.num_stages)


def launch_narrow(packed: PackedNarrow, request: LaunchRequest, tile: Tile, outputs: Outputs) -> None:
    """Run a launch on the device that holds ``packed``; CPU tensors need TRITON_INTERPRET=1.

    Raises:
        ValueError: a tile for another kernel, tensors that do not fit.
    """
    check_tile(tile, "narrow")
    device, shape = packed.high.device, packed.shape
    check_tensors(request, shape, device, outputs)
    if request.n_chains == 0:
        return
    chosen = variant(shape, packed.precision, tile, kind_of(request, outputs), use_asm_on(device))
    pointers = pointer_arguments(packed.high, packed.low, packed.bias_rows, request, outputs)
    chosen.launch(-(-request.n_chains // tile.block_chains), [*pointers, *scalar_arguments(request)])


def launcher(
    layers: Layers, shape: NetShape, tile: Tile, precision: str, device: torch.device, **_: object
) -> Callable[[LaunchRequest, Outputs], None]:
    """See `kaleido_kernels.kernels.make_launcher`."""
    packed = pack_narrow(layers, shape, precision, device)
    return lambda request, outputs: launch_narrow(packed, request, tile, outputs)
