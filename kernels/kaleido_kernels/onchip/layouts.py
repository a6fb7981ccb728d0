"""How values lie in the registers of a group of four warps, and a chunk in shared memory.

All are views of one order, that of a product's accumulator: a thread holds pairs of neighbouring columns, eight columns
apart, of rows eight apart. So values go from one view to another without leaving their registers, which
``assert_trivial`` makes sure of.
"""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl


@constexpr_function
def accumulator(cols: int) -> Any:
    """A product of ``cols`` columns; with 64 also a chunk of states."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, cols, 16])


@constexpr_function
def held(cols: int) -> Any:
    """Operands in registers for a product of ``cols`` columns: a chunk of 16-bit values, in an accumulator's order."""
    return gl.DotOperandLayout(operand_index=0, parent=accumulator(cols), k_width=2)


@constexpr_function
def pairs(group: int) -> Any:
    """A chunk of states (group, 64) as (group, 32, 2): both of a pair are one thread's."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [8, 0, 0], [0, 4, 0], [0, 8, 0], [0, 16, 0], *([[64, 0, 0]] if group == 128 else [])],
        lane_bases=[[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[group, 32, 2],
    )


@constexpr_function
def by_thread(group: int) -> Any:
    """A chunk of states (group, 64) as (fours, 128 threads, 4): see `kaleido_kernels.onchip.states.keep_chunk`."""
    rounds = group // 8
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], *([1 << bit, 0, 0] for bit in range(rounds.bit_length() - 1))],
        lane_bases=[[0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0], [0, 16, 0]],
        warp_bases=[[0, 32, 0], [0, 64, 0]],
        block_bases=[],
        shape=[rounds, 128, 4],
    )


@constexpr_function
def in_pieces() -> Any:
    """A chunk of states (64, 64) in the order of `kaleido_kernels.onchip.pack.SCRATCH_ORDER`: 16 columns a thread."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]],
        lane_bases=[[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )


@constexpr_function
def one_value(warps: int) -> Any:
    """One value, which all threads hold."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@constexpr_function
def operands() -> Any:
    """Operands of 16 bits in shared memory, as the copy engine and products want them: rows of 128 bytes, swizzled."""
    return gl.NVMMASharedLayout(128, 16, rank=2)


@constexpr_function
def flags() -> Any:
    """Single numbers in shared memory."""
    return gl.SwizzledSharedLayout(1, 1, 1, order=[0])


@constexpr_function
def operand_type(precision: str) -> Any:
    """Type of a product's operands."""
    return gl.bfloat16 if precision == "bf16" else gl.float16
