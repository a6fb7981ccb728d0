"""States of the stream kernel in memory: inputs of steps, in fp32."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kaleido_kernels.noise import first_state, flow_start, go_by_part, jitter_input
from kaleido_kernels.steps import columns_at, is_jittered_before, place_columns, to_operand


class Operand(NamedTuple):
    """The operand of a step: its first LAYOUT.tile inputs, and those behind, which without any are the same."""

    high: Any
    low: Any
    rest_high: Any
    rest_low: Any


@triton.jit
def store_first_input(
    start_ptr, input_ptr, chains, t, end, first_draw_end, timing, noise,
    MAP: tl.constexpr, EDGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The input of the launch's first step into memory: given states or start noise, jittered where that step is."""
    # t < end always. A count known at compile time would be unrolled and the noise of all pieces made at once: with
    # D = 64 and width 128 in 152 registers instead of 128, too many for two programs on a multiprocessor.
    pieces = tl.where(t < end, (MAP.dim + EDGE - 1) // EDGE, 0)
    for piece in tl.range(pieces, num_stages=1):
        offsets, mask = place_columns(chains, piece * EDGE, MAP.dim, EDGE)
        x = first_state(start_ptr, noise, chains, piece * EDGE, MAP, BLOCK, EDGE)
        jittered = is_jittered_before(t, first_draw_end, timing)
        x = jitter_input(x, t, jittered, noise, chains.ids, piece * EDGE, MAP, BLOCK, EDGE)
        tl.store(input_ptr + offsets, x, mask=mask)


@triton.jit
def store_draw_start(input_ptr, chains, t, end, noise, MAP: tl.constexpr, EDGE: tl.constexpr, BLOCK: tl.constexpr):
    """What a draw of a flow that begins with step ``t`` starts from into memory; counted as in `store_first_input`."""
    # With all of EDGE the flow of deep128 needs more than 128 registers, and no second program fits.
    HALF: tl.constexpr = EDGE // 2
    pieces = tl.where(t < end, (MAP.dim + HALF - 1) // HALF, 0)
    for piece in tl.range(pieces, num_stages=1):
        offsets, mask = place_columns(chains, piece * HALF, MAP.dim, HALF)
        tl.store(input_ptr + offsets, flow_start(noise, chains.ids, piece * HALF, t, MAP, BLOCK, HALF), mask=mask)


@triton.jit
def load_input(input_ptr, chains, first_col, MAP: tl.constexpr, TILE: tl.constexpr):
    """Columns first_col .. of a step's input in memory, as an operand (BLOCK, TILE)."""
    inputs, mask = columns_at(input_ptr, chains, first_col, MAP.dim, TILE)
    return to_operand(tl.load(inputs, mask=mask, other=0.0), MAP)


@triton.jit
def load_step_input(input_ptr, chains, MAP: tl.constexpr, LAYOUT: tl.constexpr):
    """The operand of a step from its input in memory, which other threads may have written."""
    tl.debug_barrier()
    high, low = load_input(input_ptr, chains, 0, MAP, LAYOUT.tile)
    # With D <= tile the second half meets zero rows, so that it may be the first once more.
    rest_high, rest_low = high, low
    if MAP.dim > LAYOUT.tile:
        rest_high, rest_low = load_input(input_ptr, chains, LAYOUT.tile, MAP, LAYOUT.tile)
    tl.debug_barrier()
    return Operand(high, low, rest_high, rest_low)


@triton.jit
def cells_of(ptr, chains, first_col, MAP: tl.constexpr, TILE: tl.constexpr):
    """(pointers, mask) of columns first_col .. of a step's input or output in memory, also in rows without a chain.

    They have memory too; to leave them out costs registers.
    """
    cells, _ = columns_at(ptr, chains, first_col, MAP.dim, TILE)
    return cells, tl.broadcast_to((first_col + tl.arange(0, TILE) < MAP.dim)[None, :], cells.shape)


@triton.jit
def store_cells(cells, mask, x, OWN_CELLS: tl.constexpr):
    """x into memory; OWN_CELLS: each value is one thread's, which stores it as x lies.

    A plain store would have a layout of its own, to which values go through shared memory: 33 KB of it, and at width
    256 3 KB of spilled registers. So would a plain load.
    """
    if OWN_CELLS:
        tl.inline_asm_elementwise(
            "{ .reg .pred %ok; setp.ne.s32 %ok, $3, 0; @%ok st.global.b32 [$1], $2; mov.b32 $0, 0; }", "=r,l,f,r",
            [cells.to(tl.int64), x, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(cells, x, mask=mask)


@triton.jit
def store_output(x, output_ptr, chains, first_col, MAP: tl.constexpr, TILE: tl.constexpr, OWN_CELLS: tl.constexpr):
    """A step's output x, columns first_col .., into memory."""
    cells, mask = cells_of(output_ptr, chains, first_col, MAP, TILE)
    store_cells(cells, mask, x, OWN_CELLS)


@triton.jit
def go_by_part_in_memory(
    y, input_ptr, chains, first_col, share, MAP: tl.constexpr, TILE: tl.constexpr, OWN_CELLS: tl.constexpr
):
    """Columns first_col .. of the state after a flow's step with output y; it takes the place of the step's input."""
    cells, mask = cells_of(input_ptr, chains, first_col, MAP, TILE)
    if OWN_CELLS:
        before = tl.inline_asm_elementwise(
            "{ .reg .pred %ok; setp.ne.s32 %ok, $2, 0; mov.b32 $0, 0; @%ok ld.global.b32 $0, [$1]; }", "=f,l,r",
            [cells.to(tl.int64), mask.to(tl.int32)], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        before = tl.load(cells, mask=mask, other=0.0)
        tl.debug_barrier()  # several threads may load a value
    x = go_by_part(y, y - before, share, MAP)
    store_cells(cells, mask, x, OWN_CELLS)
    return x
