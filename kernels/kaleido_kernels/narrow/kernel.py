"""The narrow kernel: padded width up to 128, all weights resident, activations in registers, layers unrolled.

One program carries BLOCK chains through all steps of a launch:

    registers       x (BLOCK, DIM_PADDED) fp32 -> h (BLOCK, WIDTH) -> ... -> x
    shared memory   every weight matrix, loaded once before the first step

Without jitter the step loop touches neither shared nor global memory except through the operands of its products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
from kaleido_kernels.narrow.pack import PackedNarrow, pack_narrow
from kaleido_kernels.narrow.plan import narrow_layout
from kaleido_kernels.noise import first_state, go_by_part, jitter_input, jitter_output, kept_share
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
    place_columns,
    row_residual,
    tile_chains,
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


class Network(NamedTuple):
    """All layers in registers: tuples of operands, the bias rows and the ones that they are multiplied by."""

    high: Any
    low: Any
    bias_rows: Any
    ones: Any


@triton.jit
def load_network(
    w_high_ptr, w_low_ptr, bias_ptr, MAP: tl.constexpr, LAYOUT: tl.constexpr, N_LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole network, which stays in shared memory and registers from then on."""
    DIM_PADDED: tl.constexpr = LAYOUT.dim_padded
    WIDTH: tl.constexpr = LAYOUT.width
    high = load_layers(w_high_ptr, N_LAYERS, DIM_PADDED, WIDTH)
    low = load_layers(w_low_ptr, N_LAYERS, DIM_PADDED, WIDTH) if MAP.precision == "fp16x3" else high
    bias_rows = load_bias_rows(bias_ptr, N_LAYERS, DIM_PADDED, WIDTH) if LAYOUT.bias == "mma" else high
    ones = tl.full([BLOCK, 16], 1.0, tl.float32).to(bias_ptr.dtype.element_ty)
    return Network(high, low, bias_rows, ones)


@triton.jit
def layer_sums(
    h_high, h_low, net, layer: tl.constexpr, OUT: tl.constexpr, MAP: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(BLOCK, OUT) fp32: a layer before its activation."""
    acc = tl.zeros([BLOCK, OUT], tl.float32)
    if LAYOUT.bias == "mma":
        acc = tl.dot(net.ones, net.bias_rows[layer], acc, input_precision="ieee")
    return dense_layer(h_high, h_low, net.high[layer], net.low[layer], acc, MAP)


@triton.jit
def network(
    x, net, MAP: tl.constexpr, LAYOUT: tl.constexpr, N_LAYERS: tl.constexpr, BLOCK: tl.constexpr, USE_ASM: tl.constexpr
):
    """bound(MLP(x)) of a tile, (BLOCK, DIM_PADDED) fp32."""
    WIDTH: tl.constexpr = LAYOUT.width
    DIM_PADDED: tl.constexpr = LAYOUT.dim_padded
    h_high, h_low = to_operand(x, MAP)
    for layer in tl.static_range(N_LAYERS - 1):
        acc = layer_sums(h_high, h_low, net, layer, WIDTH, MAP, LAYOUT, BLOCK)
        h_high, h_low = activate(acc, MAP, USE_ASM)
    out = layer_sums(h_high, h_low, net, N_LAYERS - 1, DIM_PADDED, MAP, LAYOUT, BLOCK)
    return bound_output(out, MAP, USE_ASM)


@triton.jit
def store_draw(
    x, draws_ptr, row0, rows, n_kept, n_draws, draw, DIM: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr
):
    """Stores a tile's states as draw ``draw`` of the first ``n_kept`` chains."""
    cols = tl.arange(0, COLS)
    offsets = (rows[:, None] * n_draws + draw) * DIM + cols[None, :]
    # A mask of its own: kept through the steps it costs registers, and with ieee products one that is spilled.
    kept = (tl.arange(0, BLOCK) < n_kept - row0)[:, None] & (cols < DIM)[None, :]
    tl.store(draws_ptr + offsets, x, mask=kept)


@triton.jit
def check_chains(
    x, change, calm, step, rows, offsets, mask, final_ptr, checking, DIM: tl.constexpr, COLS: tl.constexpr
):
    """Stores the states after ``step`` steps and looks at them; returns ``calm`` after it.

    Halted rows are computed on beside the others, and their states stay as they were stored.
    """
    live = mask & (calm >= 0)[:, None]
    tl.store(final_ptr + offsets, x, mask=live)
    saved = tl.load(checking.saved_ptr + offsets, mask=live, other=0.0)
    residual, distance = row_residual(change, 0, DIM, COLS), row_residual(x - saved, 0, DIM, COLS)
    return check_rows(residual, distance, calm, step, rows, checking)


@triton.jit(do_not_specialize=UNSPECIALISED)
def narrow_kernel(
    w_high_ptr,  # all matrices (in, out) one after another, operand type
    w_low_ptr,  # the same of the low halves; w_high_ptr itself unless the precision is "fp16x3"
    bias_ptr,  # (16, out) rows a layer, operand type; unused unless the layout's bias is "mma"
    draws_ptr, final_ptr, residual_ptr, start_ptr, chain_ids_ptr, saved_ptr, calm_in_ptr, calm_ptr, halt_ptr,
    shares_ptr, n_chains: tl.int64, first_chain: tl.int64, seed: tl.int64, jitter: tl.float32,
    burn_in: tl.int32, n_draws: tl.int32, thin: tl.int32, settle: tl.int32, first_step: tl.int32, run_steps: tl.int32,
    tol: tl.float32, patience: tl.int32, every: tl.int32,
    MAP: tl.constexpr, LAYOUT: tl.constexpr, N_LAYERS: tl.constexpr, BLOCK: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(n_chains, BLOCK),); program i carries chains i * BLOCK .. through all steps of the launch."""
    CHECKS: tl.constexpr = saved_ptr is not None
    BY_PARTS: tl.constexpr = shares_ptr is not None
    DIM_PADDED: tl.constexpr = LAYOUT.dim_padded
    timing, noise = Timing(burn_in, n_draws, thin, settle), Noise(seed, jitter, shares_ptr)
    n_steps = burn_in + n_draws * thin
    checking = Checking(saved_ptr, calm_in_ptr, residual_ptr, calm_ptr, halt_ptr, n_steps, every, tol, patience)
    row0 = tl.program_id(0).to(tl.int64) * BLOCK
    chains = tile_chains(row0, n_chains, first_chain, chain_ids_ptr, BLOCK)
    offsets, mask = place_columns(chains, 0, MAP.dim, DIM_PADDED)
    x = first_state(start_ptr, noise, chains, 0, MAP, BLOCK, DIM_PADDED)
    # Padded columns begin as 1: two of them carry the folded bias through the layers, the others meet zero weights.
    x = tl.where((tl.arange(0, DIM_PADDED) < MAP.dim)[None, :], x, 1.0)
    net = load_network(w_high_ptr, w_low_ptr, bias_ptr, MAP, LAYOUT, N_LAYERS, BLOCK)

    end = first_step + run_steps
    # Steps are run in stretches: up to each draw, or up to each check.
    length = every if CHECKS else thin
    stretch = first_step // every if CHECKS else draw_at(first_step, timing)
    last_stretch = (end - 1) // every if CHECKS else draw_at(end - 1, timing)
    if CHECKS:
        calm = tl.load(calm_in_ptr + chains.rows, mask=chains.exist, other=-1)
    change = tl.zeros([BLOCK, DIM_PADDED], tl.float32)
    for number in range(stretch, last_stretch + 1):
        stretch_end = (number + 1) * every if CHECKS else draw_end(number, timing)
        stop = tl.minimum(stretch_end, end)
        # Not carried from stretch to stretch: Triton 3.6 and 3.7 take a carried value for dead that is only the bound
        # of an inner loop, and every stretch would begin at first_step.
        begin = tl.where(number == stretch, first_step, stretch_end - length)
        if BY_PARTS:  # only there does a flow have noise
            starts = is_jittered_before(begin, stretch_end, timing)
            x = jitter_input(x, begin, starts, noise, chains.ids, 0, MAP, BLOCK, DIM_PADDED)
        for t in range(begin, stop):
            if not BY_PARTS:
                jittered = is_jittered_before(t, stretch_end, timing)
                x = jitter_input(x, t, jittered, noise, chains.ids, 0, MAP, BLOCK, DIM_PADDED)
            share = kept_share(noise, t, stretch_end, timing)
            y = network(x, net, MAP, LAYOUT, N_LAYERS, BLOCK, USE_ASM)
            change = y - x
            y = go_by_part(y, change, share, MAP)
            x = jitter_output(y, t + 1, noise, chains.ids, 0, MAP, BLOCK, DIM_PADDED)
        if draws_ptr is not None:
            n_kept = tl.where(stop == stretch_end, n_chains, 0)
            store_draw(x, draws_ptr, row0, chains.rows, n_kept, n_draws, number, MAP.dim, DIM_PADDED, BLOCK)
        if CHECKS:
            calm = check_chains(
                x, change, calm, stop, chains.rows, offsets, mask, final_ptr, checking, MAP.dim, DIM_PADDED
            )
            # When all have halted, the stretches that are left are empty.
            end = tl.where(tl.max(calm, axis=0) >= 0, end, stop)

    if not CHECKS:
        tl.store(final_ptr + offsets, x, mask=mask)
        tl.store(residual_ptr + chains.rows, row_residual(change, 0, MAP.dim, DIM_PADDED), mask=chains.exist)


@functools.lru_cache(maxsize=256)
def variant(shape: NetShape, precision: str, tile: Tile, kind: LaunchKind = QUIET, use_asm: bool = True) -> Variant:
    """What `launch_narrow` launches. ``precision`` is a device precision; "fp32" stands for "fp16x3"."""
    form, layout = usual_precision(precision), narrow_layout(shape)
    constants = {
        "MAP": compiled_map(shape, form, kind),
        "LAYOUT": layout,
        "N_LAYERS": shape.n_layers,
        "BLOCK": tile.block_chains,
        "USE_ASM": use_asm,
    }
    own = dict.fromkeys(("w_high_ptr", "w_low_ptr", "bias_ptr"), OPERANDS[form])
    return Variant(narrow_kernel, own | common_types(kind), constants, tile.num_warps, tile.num_stages)


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
    arguments = [packed.high, packed.low, packed.bias_rows, *common_arguments(request, outputs)]
    chosen.launch(-(-request.n_chains // tile.block_chains), arguments)


def launcher(
    layers: Layers, shape: NetShape, tile: Tile, precision: str, device: torch.device, **_: object
) -> Callable[[LaunchRequest, Outputs], None]:
    """See `kaleido_kernels.kernels.make_launcher`."""
    packed = pack_narrow(layers, shape, precision, device)
    return lambda request, outputs: launch_narrow(packed, request, tile, outputs)
