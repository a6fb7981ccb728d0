"""Operands of the stream kernel's products: activations in registers, weights through shared memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

FENCES = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7))
"""Whether Triton leaves a fence to the kernel: see `fence_copies`."""


class Weights(NamedTuple):
    """The network in memory; see the kernel's arguments of these names."""

    high_ptr: Any
    low_ptr: Any
    bias_ptr: Any


@triton.jit
def to_words(high, low, LAYOUT: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr):
    """An operand pair (BLOCK, tile) as the loop of tiles carries it: two 16-bit values of a row in a 32-bit word.

    16-bit values that meet where branches join cost ptxas an instruction each to take apart and put together.
    """
    if WORDS:
        left, right = tl.split(tl.reshape(high.to(tl.int16, bitcast=True), (BLOCK, LAYOUT.tile // 2, 2)))
        words = tl.inline_asm_elementwise(
            "mov.b32 $0, {$1, $2};", "=r,h,h", [left, right], dtype=tl.int32, is_pure=True, pack=1
        )
        return words, words
    else:
        return high, low


@triton.jit
def from_words(
    high, low, MAP: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, USE_ASM: tl.constexpr
):
    """The inverse of `to_words`; without words by an instruction that does nothing.

    For what comes of an instruction stays in registers as an operand of Hopper's products, while Triton takes what a
    loop carries to shared memory for them: up to 64 KB, and then no third weight tile fits.
    """
    if WORDS:
        left, right = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [high], dtype=(tl.int16, tl.int16), is_pure=True, pack=1
        )
        both = tl.reshape(tl.join(left, right), (BLOCK, LAYOUT.tile))
        both = both.to(tl.bfloat16 if MAP.precision == "bf16" else tl.float16, bitcast=True)
        return both, both
    elif USE_ASM:
        PACK: tl.constexpr = 32 // high.dtype.primitive_bitwidth
        kept = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [high], dtype=high.dtype, is_pure=True, pack=PACK)
        if MAP.precision == "fp16x3":
            return kept, tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [low], dtype=low.dtype, is_pure=True, pack=PACK
            )
        else:
            return kept, kept
    else:
        return high, low


@triton.jit
def load_piece(first_row, weights, MAP: tl.constexpr, TILE: tl.constexpr):
    """(TILE, TILE) weights as an operand pair: those from row ``first_row`` on, of the rows of all weight tiles."""
    offsets = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    w_high = tl.load(weights.high_ptr + first_row * TILE + offsets)
    w_low = tl.load(weights.low_ptr + first_row * TILE + offsets) if MAP.precision == "fp16x3" else w_high
    return w_high, w_low


@triton.jit
def fence_copies(USE_ASM: tl.constexpr):
    """Lets Hopper's products see the weights that asynchronous copies brought: after `load_piece`, before the product.

    Triton 3.6 leaves that out where the other operand lies in registers.
    """
    if USE_ASM and FENCES:
        if tl.target_info.cuda_capability_geq(9, 0) and not tl.target_info.cuda_capability_geq(10, 0):
            # Every thread must run it. No operand: Triton's development has let one thread alone run assembly with one.
            tl.inline_asm_elementwise(
                "fence.proxy.async.shared::cta; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
            )
