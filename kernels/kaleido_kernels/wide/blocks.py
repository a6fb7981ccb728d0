"""Blocks of operands in memory for the wide kernel: loaded, multiplied, stored, and made visible to the copy engine."""

from __future__ import annotations

import triton
import triton.language as tl

from kaleido_kernels.steps import dense_layer


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
    ptr, first_block, high, low, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """A (ROWS, COLS) operand pair into the blocks from ``first_block`` on, its parts side by side.

    ``n_cols``: only so many of its columns; None for all.
    """
    col = tl.arange(0, COLS)
    block = (first_block + col // INNER).to(tl.int64) * (PARTS * ROWS * INNER)
    target = ptr + block[None, :] + (tl.arange(0, ROWS)[:, None] * INNER + (col % INNER)[None, :])
    mask = None if n_cols is None else tl.broadcast_to((col < n_cols)[None, :], (ROWS, COLS))
    tl.store(target, high, mask=mask)
    if PARTS == 2:
        tl.store(target + ROWS * INNER, low, mask=mask)


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
    COLS: tl.constexpr, LAYOUT: tl.constexpr, MAP: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Input blocks times weight blocks plus bias: (rows, COLS) fp32. Weight blocks are (COLS, inner)."""
    ROWS: tl.constexpr = LAYOUT.rows
    INNER: tl.constexpr = LAYOUT.inner
    PARTS: tl.constexpr = LAYOUT.parts
    bias = tl.load(bias_ptr + bias_tile * COLS + tl.arange(0, COLS))
    acc = tl.broadcast_to(bias[None, :], (ROWS, COLS))
    for k in tl.range(0, inner_blocks, num_stages=LAYOUT.stages):
        h = (in_block + k) * PARTS
        w = (weight_block + k) * PARTS
        h_high = load_block(act_desc, act_ptr, h, ROWS, INNER, USE_TMA)
        w_high = load_block(weight_desc, weight_ptr, w, COLS, INNER, USE_TMA)
        h_low, w_low = h_high, w_high
        if PARTS == 2:
            h_low = load_block(act_desc, act_ptr, h + 1, ROWS, INNER, USE_TMA)
            w_low = load_block(weight_desc, weight_ptr, w + 1, COLS, INNER, USE_TMA)
        acc = dense_layer(h_high, h_low, w_high.T, w_low.T, acc, MAP)
    return acc
