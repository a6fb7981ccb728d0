"""Layers of the onchip kernel: products with weights that stream through a ring of slots, and what streams them.

A slot holds (256, 64) operands: in a hidden layer of width 256 or 512 256 outputs of one chunk of inputs, else fewer
outputs of several chunks, one below the other. In split fp32 a slot of low halves follows each slot of high ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kaleido_kernels.onchip import layouts
from kaleido_kernels.onchip.states import CHUNK, barrier
from kaleido_kernels.steps import activate

SLOT_ROWS = gl.constexpr(256)


class Ring(NamedTuple):
    """Slots of weights, with a barrier for each that is full, and one for each that both groups have done with.

    ``order``: a barrier for each group, that it may multiply, where groups take turns.
    """

    slots: Any
    full: Any
    empty: Any
    order: Any


class Turn(NamedTuple):
    """The slot that comes next, and phases: bit 0 is that of its barriers, bit 1 that of the order of groups."""

    slot: Any
    phases: Any


@gluon.jit
def first_turn():
    """The ring's first slot in its first round."""
    return Turn(gl.full([], 0, gl.int32), gl.full([], 0, gl.int32))


@gluon.jit
def next_turn(turn, LAYOUT: gl.constexpr):
    """The slot after ``turn``."""
    wraps = turn.slot == LAYOUT.slots - 1
    return Turn(gl.where(wraps, 0, turn.slot + 1), gl.where(wraps, turn.phases ^ 1, turn.phases))


@gluon.jit
def await_full(turn, ring):
    """Until a slot's weights are there."""
    mbarrier.wait(ring.full.index(turn.slot), turn.phases & 1)


@gluon.jit
def release_before(turn, pred, ring, LAYOUT: gl.constexpr):
    """This group has done with the slot before ``turn``."""
    slot = gl.where(turn.slot == 0, LAYOUT.slots - 1, turn.slot - 1)
    mbarrier.arrive(ring.empty.index(slot), count=1, pred=pred)


@gluon.jit
def weights_of(turn, ring, piece, COLS: gl.constexpr):
    """Weights (64, COLS) of chunk number ``piece`` in the slot of ``turn``."""
    weights = ring.slots.index(turn.slot)
    if COLS < SLOT_ROWS:
        weights = weights.slice(piece * COLS, COLS, dim=0)
    return weights.permute((1, 0))


@gluon.jit
def await_turn(turn, ring, GROUP_NUMBER: gl.constexpr, LAYOUT: gl.constexpr):
    """Until this group may multiply, where groups take turns."""
    if LAYOUT.in_turns:
        mbarrier.wait(ring.order.index(GROUP_NUMBER), (turn.phases >> 1) ^ (1 - GROUP_NUMBER))


@gluon.jit
def hand_turn(acc, turn, ring, GROUP_NUMBER: gl.constexpr, LAYOUT: gl.constexpr):
    """The other group may multiply; returns (acc, turn).

    One product is left to run meanwhile, so that the matrix units never wait; with more the groups would share them and
    come into step, and activate at the same time.
    """
    if LAYOUT.in_turns:
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(ring.order.index(1 - GROUP_NUMBER), count=1)
        turn = Turn(turn.slot, turn.phases ^ 2)
    return acc, turn


@gluon.jit
def add_slot(acc, begun, act, first, turn, ring, COLS: gl.constexpr, USED: gl.constexpr, LOW: gl.constexpr):
    """acc, if ``begun``, plus products of chunks ``first`` .. of ``act`` with a slot.

    In split fp32 LOW is how many chunks further on their low halves are, whose products come first; else 0.
    """
    for piece in gl.static_range(USED):
        weights = weights_of(turn, ring, piece, COLS)
        goes_on = begun if piece == 0 else True
        if LOW > 0:
            acc = warpgroup_mma(act.index(first + LOW + piece), weights, acc, use_acc=goes_on, is_async=True)
            goes_on = True
        acc = warpgroup_mma(act.index(first + piece), weights, acc, use_acc=goes_on, is_async=True)
    return acc


@gluon.jit
def add_number(
    acc, number, act, own, chunk, turn, ring, COLS: gl.constexpr, USED: gl.constexpr, WRAP: gl.constexpr,
    FIRST: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """acc plus the products of slot ``number`` of `multiply`, where sums begin with the FIRST; returns (acc, turn)."""
    PARTS: gl.constexpr = LAYOUT.parts
    LOW: gl.constexpr = LAYOUT.chunks if PARTS == 2 else 0
    first = chunk + number * USED
    if WRAP:
        first = first % LAYOUT.chunks
    await_full(turn, ring)
    acc = add_slot(acc, not FIRST, act, own + first, turn, ring, COLS, USED, LOW)
    acc = warpgroup_mma_wait(USED * PARTS, deps=(acc,))
    if not FIRST:
        release_before(turn, True, ring, LAYOUT)
    turn = next_turn(turn, LAYOUT)
    if PARTS == 2:
        await_full(turn, ring)
        acc = add_slot(acc, True, act, own + first, turn, ring, COLS, USED, 0)
        acc = warpgroup_mma_wait(USED, deps=(acc,))
        release_before(turn, True, ring, LAYOUT)
        turn = next_turn(turn, LAYOUT)
    return acc, turn


@gluon.jit
def multiply(
    act, own, chunk, bias_ptr, n_slots, turn, ring, GROUP_NUMBER: gl.constexpr, COLS: gl.constexpr, USED: gl.constexpr,
    WRAP: gl.constexpr, ONE: gl.constexpr, EARLY: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Products of chunks ``chunk`` .. of a group with the next ``n_slots`` slots, ONE or more, plus bias; returns them
    and the turn after.

    A product always waits behind the running one; a slot is released when the product after its own was issued.
    WRAP: chunks are taken modulo a layer's, as inputs from memory arrive. Where groups take turns, one multiplies while
    the other does what follows; else narrow layers, of one slot, would keep them in step, and both wait at once.
    """
    GROUP: gl.constexpr = LAYOUT.group
    acc = gl.zeros([GROUP, COLS], gl.float32, layout=layouts.accumulator(COLS))
    await_turn(turn, ring, GROUP_NUMBER, LAYOUT)
    acc, turn = add_number(acc, 0, act, own, chunk, turn, ring, COLS, USED, WRAP, True, LAYOUT)
    if not ONE:  # the compiler would take a loop without rounds away, and what it carries with it
        for number in range(1, n_slots):
            acc, turn = add_number(acc, number, act, own, chunk, turn, ring, COLS, USED, WRAP, False, LAYOUT)
    acc, turn = hand_turn(acc, turn, ring, GROUP_NUMBER, LAYOUT)
    bias_ptrs = bias_ptr + gl.arange(0, COLS, layout=gl.SliceLayout(0, layouts.accumulator(COLS)))
    if EARLY:  # the bias arrives during the last products; beside outputs that wait there are no registers for it
        bias = gl.load(bias_ptrs)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        release_before(turn, True, ring, LAYOUT)
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
        release_before(turn, True, ring, LAYOUT)
        bias = gl.load(bias_ptrs)
    return acc + bias[None, :], turn


@gluon.jit
def multiply_held(
    held, bias_ptr, turn, ring, GROUP_NUMBER: gl.constexpr, COLS: gl.constexpr, N_SLOTS: gl.constexpr,
    USED: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """`multiply` of operands in registers: ``held``, a tuple of chunks (group, 64), USED of them with each slot."""
    GROUP: gl.constexpr = LAYOUT.group
    acc = gl.zeros([GROUP, COLS], gl.float32, layout=layouts.accumulator(COLS))
    await_turn(turn, ring, GROUP_NUMBER, LAYOUT)
    for number in gl.static_range(N_SLOTS):
        await_full(turn, ring)
        for piece in gl.static_range(USED):
            weights = weights_of(turn, ring, piece, COLS)
            chunk = gl.convert_layout(held[number * USED + piece], layouts.held(COLS), assert_trivial=True)
            acc = warpgroup_mma(chunk, weights, acc, use_acc=number + piece > 0, is_async=True)
        acc = warpgroup_mma_wait(USED, deps=(acc,))
        if number > 0:
            release_before(turn, True, ring, LAYOUT)
        turn = next_turn(turn, LAYOUT)
    bias = gl.load(bias_ptr + gl.arange(0, COLS, layout=gl.SliceLayout(0, layouts.accumulator(COLS))))
    acc, turn = hand_turn(acc, turn, ring, GROUP_NUMBER, LAYOUT)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    release_before(turn, True, ring, LAYOUT)
    return acc + bias[None, :], turn


@gluon.jit
def halves_of(x):
    """The left and the right half of the columns of x; both stay where they are."""
    ROWS: gl.constexpr = x.shape[0]
    COLS: gl.constexpr = x.shape[1]
    return gl.split(gl.permute(gl.reshape(x, [ROWS, 2, COLS // 2]), (0, 2, 1)))


@gluon.jit
def as_chunk(x):
    """64 columns of a wider accumulator; they stay where they are."""
    return gl.convert_layout(x, layouts.accumulator(64), assert_trivial=True)


@gluon.jit
def hold_layer(high, LAYOUT: gl.constexpr):
    """A hidden layer's outputs (group, cols) as a tuple of chunks for `multiply_held`."""
    left, right = halves_of(high)
    if LAYOUT.chunks == 2:
        return as_chunk(left), as_chunk(right)
    else:
        a, b = halves_of(left)
        c, d = halves_of(right)
        return as_chunk(a), as_chunk(b), as_chunk(c), as_chunk(d)


@gluon.jit
def held_layer(
    held, bias_ptr, turn, ring, GROUP_NUMBER: gl.constexpr, N_SLOTS: gl.constexpr, USED: gl.constexpr,
    MAP: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """One hidden layer of a group, from operands in registers to such; returns (held, turn)."""
    acc, turn = multiply_held(held, bias_ptr, turn, ring, GROUP_NUMBER, LAYOUT.cols, N_SLOTS, USED, LAYOUT)
    high, _ = activate(acc, MAP, True)
    return hold_layer(high, LAYOUT), turn


@gluon.jit
def hidden_layer(
    act, wide_act, GROUP_NUMBER: gl.constexpr, bias_ptr, n_slots, turn, ring, USED: gl.constexpr, WRAP: gl.constexpr,
    ONE: gl.constexpr, MAP: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """One hidden layer of a group, in place; returns the turn after it.

    The first half's outputs wait in registers until all products have read the inputs that they replace.
    """
    COLS: gl.constexpr = LAYOUT.cols
    HALVES: gl.constexpr = LAYOUT.halves
    OWN: gl.constexpr = GROUP_NUMBER * HALVES * LAYOUT.parts
    own = GROUP_NUMBER * LAYOUT.chunks * LAYOUT.parts
    for half in gl.static_range(HALVES):
        chunk = half * LAYOUT.in_chunks if WRAP else 0
        acc, turn = multiply(
            act, own, chunk, bias_ptr + half * COLS, n_slots, turn, ring, GROUP_NUMBER, COLS, USED, WRAP, ONE,
            half == 0, LAYOUT,
        )  # fmt: skip
        high, low = activate(acc, MAP, True)
        if half + 1 < HALVES:
            parked = high
    if HALVES == 2:
        wide_act.index(OWN).store(parked)
    wide_act.index(OWN + HALVES - 1).store(high)
    if LAYOUT.parts == 2:
        wide_act.index(OWN + 1).store(low)
    fence_async_shared()
    barrier()
    return turn


@gluon.jit
def await_empty(turn, ring):
    """Until both groups have done with a slot's last weights; at once in the first round."""
    mbarrier.wait(ring.empty.index(turn.slot), (turn.phases & 1) ^ 1)


@gluon.jit
def stream_slots(weight_desc, first, end, turn, ring, LAYOUT: gl.constexpr):
    """Weights ``first`` .. ``end`` of a step into the ring; returns the turn after them."""
    BYTES: gl.constexpr = weight_desc.block_type.nbytes
    for number in range(first, end):
        await_empty(turn, ring)
        full = ring.full.index(turn.slot)
        mbarrier.expect(full, BYTES)
        tma.async_copy_global_to_shared(weight_desc, [number * SLOT_ROWS, 0], full, ring.slots.index(turn.slot))
        turn = next_turn(turn, LAYOUT)
    return turn


@gluon.jit
def stream_first_layer(weight_desc, input_desc, act, ready, count, turn, ring, LAYOUT: gl.constexpr):
    """Weights of the first layer with the inputs from memory that they are multiplied with; returns the turn after.

    The first weights are under way before the inputs are ready. A chunk's place is free when its last weights' slot is:
    there are at least as many chunks of activations as slots.
    """
    BYTES: gl.constexpr = weight_desc.block_type.nbytes + 2 * input_desc.block_type.nbytes
    IN_CHUNKS: gl.constexpr = LAYOUT.in_chunks
    ALL: gl.constexpr = LAYOUT.halves * IN_CHUNKS
    AHEAD: gl.constexpr = min(LAYOUT.slots, ALL)
    ahead = turn
    for number in range(AHEAD):
        await_empty(ahead, ring)
        full = ring.full.index(ahead.slot)
        mbarrier.expect(full, BYTES)
        tma.async_copy_global_to_shared(weight_desc, [number * SLOT_ROWS, 0], full, ring.slots.index(ahead.slot))
        ahead = next_turn(ahead, LAYOUT)
    mbarrier.wait(ready.index(0), count & 1)
    mbarrier.wait(ready.index(1), count & 1)
    program = gl.program_id(0)
    for number in range(ALL):
        full = ring.full.index(turn.slot)
        if number >= AHEAD:
            await_empty(turn, ring)
            mbarrier.expect(full, BYTES)
            tma.async_copy_global_to_shared(weight_desc, [number * SLOT_ROWS, 0], full, ring.slots.index(turn.slot))
        row = (program * (2 * IN_CHUNKS) + number % IN_CHUNKS) * CHUNK
        chunk = number % LAYOUT.chunks
        tma.async_copy_global_to_shared(input_desc, [row, 0], full, act.index(chunk))
        tma.async_copy_global_to_shared(
            input_desc, [row + IN_CHUNKS * CHUNK, 0], full, act.index(LAYOUT.chunks + chunk)
        )
        turn = next_turn(turn, LAYOUT)
    return turn
