"""States of the stream kernel in memory: inputs of steps, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from kaleido_kernels.noise import first_state, flow_start, go_by_part, jitter_input
from kaleido_kernels.steps import columns_at, is_jittered_before, place_columns, to_operand


@triton.jit
def join_halves(left, right, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """(BLOCK, TILE) twice -> (BLOCK, 2 * TILE), side by side."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (BLOCK, 2 * TILE))


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
def load_step_input(input_ptr, chains, MAP: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """The operand (BLOCK, width) of a step from its input in memory, which other threads may have written."""
    tl.debug_barrier()
    h_high, h_low = load_input(input_ptr, chains, 0, MAP, LAYOUT.tile)
    if LAYOUT.width > LAYOUT.tile:
        # With D <= tile the second half meets zero rows, so that it may be the first once more.
        r_high, r_low = h_high, h_low
        if MAP.dim > LAYOUT.tile:
            r_high, r_low = load_input(input_ptr, chains, LAYOUT.tile, MAP, LAYOUT.tile)
        h_high = join_halves(h_high, r_high, BLOCK, LAYOUT.tile)
        h_low = join_halves(h_low, r_low, BLOCK, LAYOUT.tile) if MAP.precision == "fp16x3" else h_high
    tl.debug_barrier()
    return h_high, h_low


@triton.jit
def go_by_part_in_memory(
    y, input_ptr, chains, first_col, share, MAP: tl.constexpr, TILE: tl.constexpr, OWN_CELLS: tl.constexpr
):
    """Columns first_col .. of the state after a step of a flow with output y; it takes the place of the step's input.

    OWN_CELLS: each value is one thread's, which loads and stores it as y lies. A plain load would have a layout of its
    own, from which values go through shared memory: 33 KB of it, and at width 256 3 KB of spilled registers.
    """
    cells, mask = columns_at(input_ptr, chains, first_col, MAP.dim, TILE)
    # Rows without a chain have memory too; to leave them out costs registers.
    mask = tl.broadcast_to((first_col + tl.arange(0, TILE) < MAP.dim)[None, :], cells.shape)
    if OWN_CELLS:
        places, ok = cells.to(tl.int64), mask.to(tl.int32)
        before = tl.inline_asm_elementwise(
            "{ .reg .pred %ok; setp.ne.s32 %ok, $2, 0; mov.b32 $0, 0; @%ok ld.global.b32 $0, [$1]; }", "=f,l,r",
            [places, ok], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
        x = go_by_part(y, y - before, share, MAP)
        tl.inline_asm_elementwise(
            "{ .reg .pred %ok; setp.ne.s32 %ok, $3, 0; @%ok st.global.b32 [$1], $2; mov.b32 $0, 0; }", "=r,l,f,r",
            [places, x, ok], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        before = tl.load(cells, mask=mask, other=0.0)
        tl.debug_barrier()  # several threads may load a value
        x = go_by_part(y, y - before, share, MAP)
        tl.store(cells, x, mask=mask)
    return x
