"""The onchip kernel (Hopper): activations of 128 or 256 chains stay on the chip, weights stream through shared memory.

One program carries its chains through all steps of a launch. Two groups of four warps have half of the chains each and
multiply; a warp of its own copies weights, packed in the order of their use, into a ring of slots:

    producer   copies slot after slot as soon as both groups have done with what was there
    group 0    layer by layer: products with each slot, then bias and activation
    group 1    the same with its own chains: out of step with the other, one multiplies while the other activates

Up to width 256 activations of 16 bits stay in registers ("held"): a thread's sums of a layer are, rounded, its operands
of the next, and groups take turns. Wider ones and those of split fp32 are in shared memory, updated in place.

A state of up to 128 values never leaves the chip: the last layer's epilogue (bound, residual, draws, noise, clamp)
makes the next step's input of it. A wider one goes through memory as operands, 64 columns at a time,
and comes back by the copy engine as the first layer's inputs. States in fp32 are stored where they are wanted: before
the end or a check for the residual, and by a flow in every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kaleido_kernels.arguments import (
    QUIET,
    UNSPECIALISED,
    LaunchKind,
    common_arguments,
    common_types,
    compiled_map,
)
from kaleido_kernels.launch import OPERANDS, LaunchRequest, Outputs, check_tensors, kind_of
from kaleido_kernels.noise import kept_share
from kaleido_kernels.onchip import layouts
from kaleido_kernels.onchip.pack import OnchipScratch, PackedOnchip, allocate_scratch, pack_onchip
from kaleido_kernels.onchip.plan import OnchipTile, onchip_layout, too_long_turn
from kaleido_kernels.onchip.products import SLOT_ROWS, Ring, first_turn, stream_first_layer, stream_slots
from kaleido_kernels.onchip.states import CHUNK, Places, Rows, barrier, local_rows, publish_input
from kaleido_kernels.onchip.step import (
    Moment,
    Net,
    Shared,
    first_held_input,
    put_first_input,
    run_held_last_layer,
    run_held_layers,
    run_hidden_layers,
    run_last_layer,
)
from kaleido_kernels.packing import Layers
from kaleido_kernels.precision import usual_precision
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.steps import (
    Checking,
    Noise,
    Stored,
    Timing,
    check_rows,
    draw_at,
    draw_end,
    is_jittered,
    next_check,
)
from kaleido_kernels.variant import Variant

GROUP_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)
"""Registers of a thread: 2 groups x 128 x 240 + 128 x 24 of the multiprocessor's 65,536."""


class Span(NamedTuple):
    """Steps of the launch, and its tiles of chains."""

    first_step: Any
    run_steps: Any
    n_tiles: Any


@gluon.jit
def tell_alive(shared, calm, n_checks, GROUP_NUMBER: gl.constexpr):
    """Says whether a chain of this group goes on after check number ``n_checks``, counted through the launch."""
    alive = gl.max((calm >= 0).to(gl.int32), axis=0)
    flag = gl.full([1], 0, gl.int32, layout=layouts.one_value(4)) + alive
    shared.flags.index((n_checks & 1) * 2 + GROUP_NUMBER).store(flag)
    fence_async_shared()  # for the verdict "fenced layers" alone: no product or copy reads flags
    barrier()
    mbarrier.arrive(shared.agreed, count=1)


@gluon.jit
def is_any_alive(shared, n_checks, WARPS: gl.constexpr):
    """Whether a chain of either group goes on, the same for all warps.

    Flags have two places: before one is written again, the other group has passed the check between, and the producer
    the weights after it.
    """
    L: gl.constexpr = layouts.one_value(WARPS)
    mbarrier.wait(shared.agreed, n_checks & 1)
    first = shared.flags.index((n_checks & 1) * 2).load(L)
    second = shared.flags.index((n_checks & 1) * 2 + 1).load(L)
    return gl.max(first | second, axis=0) > 0


@gluon.jit
def run_tile(
    net, shared, turn, n_checks, rows, places, start_ptr, stored, checking, timing, noise, span,
    GROUP_NUMBER: gl.constexpr, MAP: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """All steps of the launch for a group's chains; returns (turn, n_checks) after them."""
    CHECKS: gl.constexpr = checking.saved_ptr is not None
    BY_PARTS: gl.constexpr = noise.shares_ptr is not None
    row = rows.first + local_rows(LAYOUT).to(gl.int64)
    live = row < rows.n_chains
    end = span.first_step + span.run_steps
    target = gl.minimum(end, next_check(span.first_step, checking.every)) if CHECKS else end
    if CHECKS:
        calm = gl.load(checking.calm_in_ptr + row, mask=live, other=-1)
    done = span.first_step + gl.full([], 0, gl.int32)
    keep = BY_PARTS or target == done + 1
    if LAYOUT.held:
        held = first_held_input(start_ptr, done, keep, rows, places, timing, noise, MAP, LAYOUT)
    else:
        held = (done,)  # nothing that is read
        put_first_input(start_ptr, done, keep, rows, places, timing, noise, MAP, LAYOUT)
    while done < end:
        if LAYOUT.held:
            hidden, turn = run_held_layers(held, net, shared, turn, GROUP_NUMBER, MAP, LAYOUT)
        else:
            hidden = held
            turn = run_hidden_layers(net, shared, turn, GROUP_NUMBER, MAP, LAYOUT)
        draw = draw_at(done, timing)
        this_draw_end = draw_end(draw, timing)
        share = kept_share(noise, done, this_draw_end, timing)
        done += 1
        is_target = done == target
        if CHECKS:
            live = calm >= 0
            if is_target:
                target = gl.minimum(end, next_check(done, checking.every))
        keep = BY_PARTS or done == target - 1
        moment = Moment(
            done, draw, done == this_draw_end, share, is_target, done < end, is_jittered(done, timing), keep
        )
        if LAYOUT.held:
            found, held, turn = run_held_last_layer(
                hidden, net, shared, turn, live, moment, rows, places, stored, checking, timing, noise, GROUP_NUMBER,
                MAP, LAYOUT,
            )  # fmt: skip
        else:
            found, turn = run_last_layer(
                net, shared, turn, live, moment, rows, places, stored, checking, timing, noise, GROUP_NUMBER, MAP,
                LAYOUT,
            )  # fmt: skip
        if is_target:
            if CHECKS:
                # Halted rows are computed on beside the others, and their states stay as they were stored.
                calm = check_rows(found[0], found[1], calm, done, row, checking)
                if done < end:
                    tell_alive(shared, calm, n_checks, GROUP_NUMBER)
                    end = gl.where(is_any_alive(shared, n_checks, 4), end, done)
                    n_checks += 1
            else:
                gl.store(stored.residual_ptr + row, found[0], mask=live)
        if not LAYOUT.held:
            publish_input(places, done < end, LAYOUT)
    return turn, n_checks


@gluon.jit
def run_group(
    GROUP_NUMBER: gl.constexpr, net, shared, scratch_ptr, state_ptr, start_ptr, chain_ids_ptr, n_chains, first_chain,
    stored, checking, timing, noise, span, MAP: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """What a group of warps does: its half of each of the program's tiles of chains."""
    GROUP: gl.constexpr = LAYOUT.group
    program = gl.program_id(0)
    number = (program * 2 + GROUP_NUMBER).to(gl.int64)
    size: gl.constexpr = GROUP * LAYOUT.in_chunks * CHUNK
    own = GROUP_NUMBER * LAYOUT.chunks * LAYOUT.parts
    places = Places(
        shared.act, own, scratch_ptr + number * size, state_ptr + number * size, shared.ready.index(GROUP_NUMBER)
    )
    turn, n_checks = first_turn(), gl.full([], 0, gl.int32)
    for tile in range(program, span.n_tiles, gl.num_programs(0)):
        first = (gl.full([], 0, gl.int64) + tile) * (2 * GROUP)
        rows = Rows(first + GROUP_NUMBER * GROUP, n_chains, first_chain, chain_ids_ptr)
        turn, n_checks = run_tile(
            net, shared, turn, n_checks, rows, places, start_ptr, stored, checking, timing, noise, span, GROUP_NUMBER,
            MAP, LAYOUT,
        )  # fmt: skip


@gluon.jit
def run_producer(weight_desc, input_desc, shared, checking, span, LAYOUT: gl.constexpr):
    """What the producer's warp does: weights, and inputs from memory, for all steps that the groups run."""
    CHECKS: gl.constexpr = checking.saved_ptr is not None
    FIRST: gl.constexpr = LAYOUT.halves * LAYOUT.in_chunks if LAYOUT.through_memory else 0
    turn, n_inputs, n_checks = first_turn(), gl.full([], 0, gl.int32), gl.full([], 0, gl.int32)
    for tile in range(gl.program_id(0), span.n_tiles, gl.num_programs(0)):
        end = span.first_step + span.run_steps
        target = gl.minimum(end, next_check(span.first_step, checking.every)) if CHECKS else end
        done = span.first_step + gl.full([], 0, gl.int32)
        while done < end:
            if LAYOUT.through_memory:
                turn = stream_first_layer(
                    weight_desc, input_desc, shared.act, shared.ready, n_inputs, turn, shared.ring, LAYOUT
                )
            turn = stream_slots(weight_desc, FIRST, LAYOUT.n_slots, turn, shared.ring, LAYOUT)
            n_inputs += 1
            done += 1
            if CHECKS:
                if done == target:
                    target = gl.minimum(end, next_check(done, checking.every))
                    if done < end:
                        end = gl.where(is_any_alive(shared, n_checks, 1), end, done)
                        n_checks += 1


# Types of numbers are written as Triton's: of Gluon's names for them it takes no notice, and goes by the first values.
@gluon.jit(do_not_specialize=(*UNSPECIALISED, "n_tiles"))
def onchip_kernel(
    weight_desc,  # copy descriptor over (n_slots * 256, 64) operands, blocks of a slot
    input_desc,  # copy descriptor over scratch_ptr, blocks of a chunk
    bias_ptr,  # (n_layers - 1, padded width) of hidden layers, then (last_tiles * last) of the last one, fp32
    inner_ptr,  # (n_layers - 1,) int32: slots of one half of a hidden layer's outputs
    scratch_ptr,  # (n_programs * 2, in_chunks, group, 64) operands, scratch; of one chunk where it is not used
    state_ptr,  # (n_programs * 2, in_chunks, group * 64) fp32, scratch; a chunk lies in the order of threads
    n_tiles: tl.int32,
    draws_ptr, final_ptr, residual_ptr, start_ptr, chain_ids_ptr, saved_ptr, calm_in_ptr, calm_ptr, halt_ptr,
    shares_ptr, n_chains: tl.int64, first_chain: tl.int64, seed: tl.int64, jitter: tl.float32,
    burn_in: tl.int32, n_draws: tl.int32, thin: tl.int32, settle: tl.int32, first_step: tl.int32, run_steps: tl.int32,
    tol: tl.float32, patience: tl.int32, every: tl.int32,
    MAP: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Grid: (n_programs,); program p owns tiles p, p + n_programs, ... of two groups of chains."""
    GROUP: gl.constexpr = LAYOUT.group
    SLOTS: gl.constexpr = LAYOUT.slots
    COLS: gl.constexpr = LAYOUT.cols
    N_CHUNKS: gl.constexpr = 2 * LAYOUT.chunks * LAYOUT.parts
    N_WIDE: gl.constexpr = 2 * LAYOUT.halves * LAYOUT.parts
    OPERAND: gl.constexpr = layouts.operand_type(MAP.precision)
    SWIZZLED: gl.constexpr = layouts.operands()
    slots = gl.allocate_shared_memory(OPERAND, [SLOTS, SLOT_ROWS, CHUNK], SWIZZLED)
    if LAYOUT.held:
        act, wide_act = slots, slots  # nothing that is used
    else:
        act = gl.allocate_shared_memory(OPERAND, [N_CHUNKS, GROUP, CHUNK], SWIZZLED)
        wide_act = act._reinterpret(OPERAND, [N_WIDE, GROUP, COLS], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    agreed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    flags = gl.allocate_shared_memory(gl.int32, [4, 1], layouts.flags())
    for number in gl.static_range(SLOTS):
        mbarrier.init(full.index(number), count=1)
        mbarrier.init(empty.index(number), count=2)
    for number in gl.static_range(2):
        mbarrier.init(order.index(number), count=1)
        mbarrier.init(ready.index(number), count=1)
    mbarrier.init(agreed, count=2)
    shared = Shared(act, wide_act, Ring(slots, full, empty, order), ready, agreed, flags)
    timing, noise = Timing(burn_in, n_draws, thin, settle), Noise(seed, jitter, shares_ptr)
    n_steps = burn_in + n_draws * thin
    checking = Checking(saved_ptr, calm_in_ptr, residual_ptr, calm_ptr, halt_ptr, n_steps, every, tol, patience)
    stored, span = Stored(draws_ptr, final_ptr, residual_ptr), Span(first_step, run_steps, n_tiles)
    net = Net(bias_ptr, inner_ptr)
    gl.warp_specialize(
        [
            (run_group, (
                gl.constexpr(0), net, shared, scratch_ptr, state_ptr, start_ptr, chain_ids_ptr, n_chains, first_chain,
                stored, checking, timing, noise, span, MAP, LAYOUT,
            )),
            (run_group, (
                gl.constexpr(1), net, shared, scratch_ptr, state_ptr, start_ptr, chain_ids_ptr, n_chains, first_chain,
                stored, checking, timing, noise, span, MAP, LAYOUT,
            )),
            (run_producer, (weight_desc, input_desc, shared, checking, span, LAYOUT)),
        ],
        [4, 1],
        [GROUP_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def variant(
    shape: NetShape, precision: str, tile: OnchipTile, kind: LaunchKind = QUIET, use_asm: bool = True
) -> Variant:
    """What `launch_onchip` launches. ``precision`` is a device precision; "fp32" stands for "fp16x3".

    Raises:
        ValueError: anything but an NVIDIA GPU, or a launch that would never end.
    """
    if not use_asm:
        raise ValueError("the onchip kernel is written for NVIDIA's instructions: use kernel='stream' or 'wide' here")
    form = usual_precision(precision)
    endless = too_long_turn(shape, form, tile)
    if endless is not None:
        raise ValueError(f"{tile.name}: {endless}")
    layout = onchip_layout(shape, tile, form)
    constants = {"MAP": compiled_map(shape, form, kind), "LAYOUT": layout}
    operand = OPERANDS[form]
    swizzled = repr(layouts.operands())
    own = {"weight_desc": f"tensordesc<{operand[1:]}[256,64],{swizzled}>"}
    own |= {"input_desc": f"tensordesc<{operand[1:]}[{layout.group},64],{swizzled}>"}
    own |= {"bias_ptr": "*fp32", "inner_ptr": "*i32", "scratch_ptr": operand, "state_ptr": "*fp32", "n_tiles": "i32"}
    return Variant(onchip_kernel, own | common_types(kind), constants, 4, 1)


def launch_onchip(packed: PackedOnchip, request: LaunchRequest, outputs: Outputs, scratch: OnchipScratch) -> None:
    """Run a launch on the device that holds ``packed``.

    The grid has as many programs as ``scratch`` is for. Two launches at a time need two scratches.

    Raises:
        ValueError: tensors that do not fit. A GPU of another compute capability than 9.0 is refused by the plan alone.
    """
    device, shape, tile = packed.weights.device, packed.shape, packed.tile
    check_tensors(request, shape, device, outputs)
    n_tiles = -(-request.n_chains // tile.chains)
    if n_tiles == 0:
        return
    swizzled = layouts.operands()
    arguments = [
        TensorDescriptor.from_tensor(packed.weights, [256, 64], swizzled),
        TensorDescriptor.from_tensor(scratch.inputs, [packed.layout.group, 64], swizzled),
        *(packed.bias, packed.inner, scratch.inputs, scratch.state, n_tiles),
        *common_arguments(request, outputs),
    ]
    chosen = variant(shape, packed.precision, tile, kind_of(request, outputs))
    chosen.launch(min(n_tiles, scratch.n_programs), arguments)


def launcher(
    layers: Layers,
    shape: NetShape,
    tile: OnchipTile,
    precision: str,
    device: torch.device,
    *,
    n_programs: int,
    **_: object,
) -> Callable[[LaunchRequest, Outputs], None]:
    """See `kaleido_kernels.kernels.make_launcher`."""
    packed = pack_onchip(layers, shape, tile, precision, device)
    scratch = allocate_scratch(packed, n_programs)
    return lambda request, outputs: launch_onchip(packed, request, outputs, scratch)
