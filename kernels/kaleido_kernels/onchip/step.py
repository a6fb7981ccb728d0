"""A step of a group of warps in the onchip kernel: layers, and what ends it.

``MAP`` is what `kaleido_kernels.steps` says of it, ``LAYOUT`` an `kaleido_kernels.onchip.plan.OnchipLayout`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from kaleido_kernels.noise import go_by_part
from kaleido_kernels.onchip import layouts
from kaleido_kernels.onchip.products import halves_of, held_layer, hidden_layer, multiply, multiply_held
from kaleido_kernels.onchip.states import (
    chunk_columns,
    held_chunk,
    jitter_chunk,
    jitter_output_chunk,
    keep_chunk,
    kept_chunk,
    local_rows,
    place_chunk,
    publish_input,
    put_chunk,
    start_chunk,
)
from kaleido_kernels.steps import bound_output, is_jittered, worst


class Net(NamedTuple):
    """Biases and slots of layers in memory: see the kernel's arguments of these names."""

    bias_ptr: Any
    inner_ptr: Any


class Shared(NamedTuple):
    """What a program's warps share: chunks of activations, the same as whole layers, weights, barriers and flags."""

    act: Any
    wide_act: Any
    ring: Any
    ready: Any
    agreed: Any
    flags: Any


class Moment(NamedTuple):
    """A step that ends: number of steps done, its draw and whether that is complete, share of the way that is left.

    ``is_target``: states are final and residuals wanted; ``goes_on``: the next step is of this launch; ``jittered``:
    it has noise on its input, which is kept in fp32 if ``keep``.
    """

    done: Any
    draw: Any
    is_draw: Any
    share: Any
    is_target: Any
    goes_on: Any
    jittered: Any
    keep: Any


@gluon.jit
def row_worst(change, valid):
    """Largest |change| of each row where ``valid``; NaN if one of them is NaN."""
    size = gl.where(valid, gl.abs(change), 0.0)
    bad = gl.max((size != size).to(gl.int32), axis=1)  # a plain maximum drops NaN
    return gl.where(bad != 0, float("nan"), gl.max(size, axis=1))


@gluon.jit
def end_chunk(
    y, c, found, live, moment, rows, places, stored, checking, timing, noise, MAP: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """What a step does with chunk ``c`` of the last layer's sums ``y``, (group, 64) fp32: bound, residual, noise, draw,
    and the next input. Final states are stored of rows that are ``live``, (group,).

    Returns what is ``found`` so far, (group,) each: the residual, and with checks the distance to the saved state; and
    the chunk of the next input, where there is one.
    """
    X: gl.constexpr = layouts.accumulator(64)
    BY_PARTS: gl.constexpr = noise.shares_ptr is not None
    x = bound_output(gl.convert_layout(y, X, assert_trivial=True), MAP, True)
    cols = chunk_columns(c)
    valid = (cols < MAP.dim)[None, :]
    offsets, mask = place_chunk(rows, c, MAP, LAYOUT)
    if BY_PARTS:
        change = x - kept_chunk(c, places, LAYOUT)
        if moment.is_target:
            found = (worst(found[0], row_worst(change, valid)),)
        x = go_by_part(x, change, moment.share, MAP)
    elif moment.is_target:
        residual = worst(found[0], row_worst(x - kept_chunk(c, places, LAYOUT), valid))
        if checking.saved_ptr is not None:
            saved = gl.load(checking.saved_ptr + offsets, mask=mask, other=0.0)
            found = (residual, worst(found[1], row_worst(x - saved, mask)))
        else:
            found = (residual,)
    x = jitter_output_chunk(x, moment.done, noise, rows, c, MAP, LAYOUT)
    if stored.draws_ptr is not None:
        if moment.is_draw:
            row = rows.first + local_rows(LAYOUT).to(gl.int64)
            place = (row * timing.n_draws + moment.draw)[:, None] * MAP.dim + cols[None, :]
            gl.store(stored.draws_ptr + place, x, mask=mask)
    if moment.is_target:
        gl.store(stored.final_ptr + offsets, x, mask=mask & live[:, None])
    if moment.goes_on:
        x = jitter_chunk(x, moment.done, moment.jittered, noise, rows, c, MAP, LAYOUT)
        if not LAYOUT.held:
            put_chunk(x, c, places, MAP, LAYOUT)
        if moment.keep:
            keep_chunk(x, c, places, LAYOUT)
    return found, x


@gluon.jit
def run_held_layers(held, net, shared, turn, GROUP_NUMBER: gl.constexpr, MAP: gl.constexpr, LAYOUT: gl.constexpr):
    """`run_hidden_layers` with activations in registers: ``held`` is the step's input; returns (held, turn)."""
    ring = shared.ring
    held, turn = held_layer(
        held, net.bias_ptr, turn, ring, GROUP_NUMBER, LAYOUT.first_slots, LAYOUT.first_used, MAP, LAYOUT
    )
    if LAYOUT.n_layers > 2:
        for layer in range(1, LAYOUT.n_layers - 1):
            bias_ptr = net.bias_ptr + layer * LAYOUT.cols
            held, turn = held_layer(
                held, bias_ptr, turn, ring, GROUP_NUMBER, LAYOUT.hidden_slots, LAYOUT.pieces, MAP, LAYOUT
            )
    return held, turn


@gluon.jit
def run_hidden_layers(net, shared, turn, GROUP_NUMBER: gl.constexpr, MAP: gl.constexpr, LAYOUT: gl.constexpr):
    """All layers of a step but the last; returns the turn after them."""
    FIRST_USED: gl.constexpr = LAYOUT.first_used
    WRAP: gl.constexpr = LAYOUT.through_memory
    PIECES: gl.constexpr = LAYOUT.pieces
    FIRST_ONE: gl.constexpr = LAYOUT.first_slots == 1
    ONE: gl.constexpr = LAYOUT.hidden_slots == 1
    turn = hidden_layer(
        shared.act, shared.wide_act, GROUP_NUMBER, net.bias_ptr, LAYOUT.first_slots, turn, shared.ring, FIRST_USED,
        WRAP, FIRST_ONE, MAP, LAYOUT,
    )  # fmt: skip
    for layer in range(1, LAYOUT.n_layers - 1):
        if LAYOUT.hidden_slots > 0:
            n_slots = LAYOUT.hidden_slots
        else:
            n_slots = gl.load(net.inner_ptr + layer)
        bias_ptr = net.bias_ptr + layer * (LAYOUT.halves * LAYOUT.cols)
        turn = hidden_layer(
            shared.act, shared.wide_act, GROUP_NUMBER, bias_ptr, n_slots, turn, shared.ring, PIECES, False, ONE,
            MAP, LAYOUT,
        )  # fmt: skip
    return turn


@gluon.jit
def no_finds(checking, LAYOUT: gl.constexpr):
    """What `end_chunk` adds to: nothing found so far."""
    GROUP: gl.constexpr = LAYOUT.group
    nothing = gl.zeros([GROUP], gl.float32, layout=gl.SliceLayout(1, layouts.accumulator(64)))
    if checking.saved_ptr is not None:
        return nothing, nothing
    else:
        return (nothing,)


@gluon.jit
def run_held_last_layer(
    held, net, shared, turn, live, moment, rows, places, stored, checking, timing, noise, GROUP_NUMBER: gl.constexpr,
    MAP: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """`run_last_layer` of operands in registers; returns the next input as well, behind what was found."""
    bias_ptr = net.bias_ptr + (LAYOUT.n_layers - 1) * LAYOUT.cols
    acc, turn = multiply_held(
        held, bias_ptr, turn, shared.ring, GROUP_NUMBER, LAYOUT.last, LAYOUT.last_slots, LAYOUT.last_used, LAYOUT
    )
    found = no_finds(checking, LAYOUT)
    if LAYOUT.last == 64:
        found, x = end_chunk(acc, 0, found, live, moment, rows, places, stored, checking, timing, noise, MAP, LAYOUT)
        return found, (held_chunk(x, 0, MAP),), turn
    else:
        left, right = halves_of(acc)
        found, x = end_chunk(left, 0, found, live, moment, rows, places, stored, checking, timing, noise, MAP, LAYOUT)
        first = held_chunk(x, 0, MAP)
        found, x = end_chunk(right, 1, found, live, moment, rows, places, stored, checking, timing, noise, MAP, LAYOUT)
        return found, (first, held_chunk(x, 1, MAP)), turn


@gluon.jit
def run_last_layer(
    net, shared, turn, live, moment, rows, places, stored, checking, timing, noise, GROUP_NUMBER: gl.constexpr,
    MAP: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The last layer and the end of a step; returns what `end_chunk` found, where ``is_target``, and the turn."""
    LAST: gl.constexpr = LAYOUT.last
    USED: gl.constexpr = LAYOUT.last_used
    ONE: gl.constexpr = LAYOUT.last_slots == 1
    SLICES: gl.constexpr = LAST // 64
    RAGGED: gl.constexpr = LAYOUT.last_tiles * SLICES > LAYOUT.in_chunks
    bias_ptr = net.bias_ptr + (LAYOUT.n_layers - 1) * (LAYOUT.halves * LAYOUT.cols)
    own = GROUP_NUMBER * LAYOUT.chunks * LAYOUT.parts
    found = no_finds(checking, LAYOUT)
    for tile in range(LAYOUT.last_tiles):
        acc, turn = multiply(
            shared.act, own, 0, bias_ptr + tile * LAST, LAYOUT.last_slots, turn, shared.ring, GROUP_NUMBER, LAST, USED,
            False, ONE, True, LAYOUT,
        )  # fmt: skip
        if SLICES == 2:
            left, right = halves_of(acc)
        else:
            left = acc
        for number in gl.static_range(SLICES):
            if number == 0:
                y = left
            else:
                y = right
            c = tile * SLICES + number
            if RAGGED:
                if c < LAYOUT.in_chunks:
                    found, _ = end_chunk(
                        y, c, found, live, moment, rows, places, stored, checking, timing, noise,
                        MAP, LAYOUT,
                    )  # fmt: skip
            else:
                found, _ = end_chunk(
                    y, c, found, live, moment, rows, places, stored, checking, timing, noise,
                    MAP, LAYOUT,
                )  # fmt: skip
    return found, turn


@gluon.jit
def put_first_input(start_ptr, step, keep, rows, places, timing, noise, MAP: gl.constexpr, LAYOUT: gl.constexpr):
    """The input of the launch's first step: given states or start noise, jittered where the step is."""
    jittered = is_jittered(step, timing)
    for c in range(LAYOUT.in_chunks):
        x = start_chunk(start_ptr, noise, rows, c, MAP, LAYOUT)
        x = jitter_chunk(x, step, jittered, noise, rows, c, MAP, LAYOUT)
        put_chunk(x, c, places, MAP, LAYOUT)
        if keep:
            keep_chunk(x, c, places, LAYOUT)
    publish_input(places, True, LAYOUT)


@gluon.jit
def first_held_input(start_ptr, step, keep, rows, places, timing, noise, MAP: gl.constexpr, LAYOUT: gl.constexpr):
    """`put_first_input` for activations in registers: returns the input."""
    fence_async_shared()  # for the verdict "fenced layers" alone: no product reads what the compiler stored before
    first = first_chunk(start_ptr, 0, step, keep, rows, places, timing, noise, MAP, LAYOUT)
    if LAYOUT.in_chunks == 1:
        return (first,)
    else:
        return first, first_chunk(start_ptr, 1, step, keep, rows, places, timing, noise, MAP, LAYOUT)


@gluon.jit
def first_chunk(start_ptr, c, step, keep, rows, places, timing, noise, MAP: gl.constexpr, LAYOUT: gl.constexpr):
    """Chunk ``c`` of `first_held_input`."""
    x = start_chunk(start_ptr, noise, rows, c, MAP, LAYOUT)
    x = jitter_chunk(x, step, is_jittered(step, timing), noise, rows, c, MAP, LAYOUT)
    if keep:
        keep_chunk(x, c, places, LAYOUT)
    return held_chunk(x, c, MAP)
