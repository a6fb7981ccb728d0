"""Products of 16 x 16 tiles by AMX, written in assembler: numba and LLVM's older releases have no name for them.

A tile register holds 16 rows of 64 bytes. ``tdpbf16ps`` adds to a tile of sums [16 outputs][16 chains] in fp32 the
products of a tile of weights [16 outputs][32 inputs] and one of activations [16 pairs of inputs][16 chains], which is
how activations lie in memory anyway: [pair of inputs][lane], two bf16 in 32 bits. Four tiles of sums make a block of 32
outputs x 32 chains, so that each tile of weights and of activations that is loaded is used twice.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from kaleido_fast.engines.loops.arrays import LEAKY_RELU, NONE, RELU
from kaleido_fast.engines.loops.compiling import intrinsic
from kaleido_fast.engines.loops.processor import ROW_BYTES
from kaleido_fast.engines.loops.vectors import Emitter

TILE = 16  # rows of a tile register, and fp32 values in a row
BLOCK = 2 * TILE  # outputs, and chains, of a block of sums; inputs of one step of its products
STEP_BYTES = 2 * BLOCK * BLOCK  # weights, or activations, of one step
_LINES_AHEAD = 4  # cache lines of weights asked for by a step; eight sub-tiles together ask for all of the next part


def _assembler(e: Emitter, text: str, arguments: list[Any]) -> None:
    """Instructions on tile registers."""
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    constraints = ",".join([*["r"] * len(arguments), "~{memory}"])
    e.assembler(kind, text.strip().replace("\n", "\n\t"), constraints, arguments, effects=True)


@intrinsic
def configure_tiles(typingctx: Any) -> Any:
    """Make all eight tile registers 16 rows of 64 bytes; to be called before any other use in a thread."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        palette, row_bytes, rows = 1, b"\x40\x00" * 8, b"\x10" * 8
        content = bytes([palette]).ljust(16, b"\0") + row_bytes.ljust(32, b"\0") + rows.ljust(16, b"\0")
        kind = ir.ArrayType(ir.IntType(8), len(content))
        place = builder.alloca(kind)
        builder.store(ir.Constant(kind, bytearray(content)), place)
        _assembler(Emitter(builder, paired=False), "ldtilecfg ($0)", [place])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def release_tiles(typingctx: Any) -> Any:
    """Give the tile registers back: a thread that holds them has 8 KB more to be saved at each switch."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _assembler(Emitter(builder, paired=False), "tilerelease", [])
        return context.get_dummy_value()

    return types.void(), codegen


# Tiles 0 and 1 hold sums of the first 16 chains, 2 and 3 of the others; 4 and 5 weights; 6 and 7 activations.
_FROM_BIAS = """
tileloadd ($0,$1,1), %tmm0
tileloadd 1024($0,$1,1), %tmm1
tileloadd ($0,$1,1), %tmm2
tileloadd 1024($0,$1,1), %tmm3
"""
_FROM_SUMS = """
tileloadd ($0,$1,2), %tmm0
tileloadd 2048($0,$1,2), %tmm1
tileloadd 64($0,$1,2), %tmm2
tileloadd 2112($0,$1,2), %tmm3
"""
_STEP = """
tileloadd ($0,$2,1), %tmm4
tileloadd ($1,$2,2), %tmm6
tdpbf16ps %tmm6, %tmm4, %tmm0
tileloadd 1024($0,$2,1), %tmm5
tdpbf16ps %tmm6, %tmm5, %tmm1
tileloadd 64($1,$2,2), %tmm7
tdpbf16ps %tmm7, %tmm4, %tmm2
tdpbf16ps %tmm7, %tmm5, %tmm3
"""
_TO_SUMS = """
tilestored %tmm0, ($0,$1,2)
tilestored %tmm1, 2048($0,$1,2)
tilestored %tmm2, 64($0,$1,2)
tilestored %tmm3, 2112($0,$1,2)
"""


def _of_one_tile(text: str) -> str:
    """The same for 16 outputs: without the second tile of weights and its sums."""
    return "\n".join(line for line in text.splitlines() if not any(tile in line for tile in ("tmm1", "tmm3", "tmm5")))


def _emit_pair(e: Emitter, sums: Any, pairs: Any, activation: int, slope: Any) -> None:
    """Two rows of sums -> one row of pairs of bf16, after an activation."""
    halves = ir.VectorType(ir.IntType(16), 2 * TILE)
    zero = ir.Constant(e.vector, None)
    alternate = [lane // 2 + TILE * (lane % 2) for lane in range(2 * TILE)]
    for half in range(2):
        values = [e.load(e.shift(sums, ROW_BYTES * row + 64 * half), e.vector) for row in range(2)]
        if activation != NONE:
            below = [zero if activation == RELU else e.builder.fmul(value, slope) for value in values]
            values = [
                e.builder.select(e.builder.fcmp_ordered("<", value, zero), low, value)
                for value, low in zip(values, below, strict=True)
            ]
        kind = ir.FunctionType(halves, [e.vector, e.vector])
        rounded = e.assembler(kind, "vcvtne2ps2bf16 $2, $1, $0", "=v,v,v", values[::-1])
        order = ir.Constant(ir.VectorType(ir.IntType(32), 2 * TILE), alternate)
        paired = e.builder.shuffle_vector(rounded, ir.Constant(halves, ir.Undefined), order)
        e.store(e.builder.bitcast(paired, e.vector), e.shift(pairs, 64 * half))


def _emit_pairs(e: Emitter, sums: Any, pairs: Any, n: Any, activation: int, slope: Any) -> tuple[Any, Any]:
    """``n`` pairs of rows, perhaps none; returns where sums and pairs came to."""
    builder, int64 = e.builder, ir.IntType(64)
    entry, loop, done = builder.block, builder.append_basic_block("pair"), builder.append_basic_block("paired")
    builder.cbranch(builder.icmp_signed(">", n, ir.Constant(int64, 0)), loop, done)
    builder.position_at_end(loop)
    left, sums_at, pairs_at = (e.phi(int64, first, entry) for first in (n, sums, pairs))
    _emit_pair(e, sums_at, pairs_at, activation, slope)
    following = (
        builder.sub(left, ir.Constant(int64, 1)),
        e.shift(sums_at, 2 * ROW_BYTES),
        e.shift(pairs_at, ROW_BYTES),
    )
    for phi, value in zip((left, sums_at, pairs_at), following, strict=True):
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed(">", following[0], ir.Constant(int64, 0)), loop, done)
    builder.position_at_end(done)
    ends = []
    for first, last in ((sums, following[1]), (pairs, following[2])):
        end = e.phi(int64, first, entry)
        end.add_incoming(last, loop)
        ends.append(end)
    return ends[0], ends[1]


def _emit_by_activation(e: Emitter, activation: Any, codes: tuple[int, ...], slope: Any, emit: Any) -> None:
    """``emit(code, slope in all lanes)`` for each code, one of which is chosen at run time; the first for any other."""
    builder = e.builder
    done = builder.append_basic_block("activated")
    blocks = {code: builder.append_basic_block(f"activation{code}") for code in codes}
    switch = builder.switch(activation, blocks[codes[0]])
    for code, block in blocks.items():
        if code != codes[0]:
            switch.add_case(ir.Constant(ir.IntType(64), code), block)
        builder.position_at_end(block)
        emit(code, e.spread(slope) if code == LEAKY_RELU else None)
        builder.branch(done)
    builder.position_at_end(done)


@intrinsic
def round_pairs(typingctx: Any, sums: Any, pairs: Any, n: Any, activation: Any, slope: Any) -> Any:
    """``n`` pairs of rows of fp32 at ``sums`` -> rows of pairs of bf16 at ``pairs``, after NONE, RELU or LEAKY_RELU."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder, paired=False)
        sums, pairs, n, activation, slope = args
        _emit_by_activation(
            e,
            activation,
            (NONE, RELU, LEAKY_RELU),
            slope,
            lambda code, lanes: _emit_pairs(e, sums, pairs, n, code, lanes),
        )
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, types.float32), codegen


def _emit_steps(e: Emitter, args: Any, activation: int, slope: Any) -> None:
    """The steps of a block of 32 outputs; each rounds some pairs of an earlier block: vector units have the time."""
    builder, int64 = e.builder, ir.IntType(64)
    w, x, steps, ahead, _, _, _, waiting, pairs, each, _, _ = args
    stride = ir.Constant(int64, 64)
    entry, loop, after = builder.block, builder.append_basic_block("step"), builder.append_basic_block("multiplied")
    builder.branch(loop)
    builder.position_at_end(loop)
    left, w_at, x_at, ahead_at, waiting_at, pairs_at = (
        e.phi(int64, first, entry) for first in (steps, w, x, ahead, waiting, pairs)
    )
    asked = "".join(f"prefetcht1 {64 * line}($3)\n" for line in range(_LINES_AHEAD))
    _assembler(e, _STEP + asked, [w_at, x_at, stride, ahead_at])
    waiting_next, pairs_next = _emit_pairs(e, waiting_at, pairs_at, each, activation, slope)
    following = (
        builder.sub(left, ir.Constant(int64, 1)),
        e.shift(w_at, STEP_BYTES),
        e.shift(x_at, STEP_BYTES),
        e.shift(ahead_at, 64 * _LINES_AHEAD),
        waiting_next,
        pairs_next,
    )
    for phi, value in zip((left, w_at, x_at, ahead_at, waiting_at, pairs_at), following, strict=True):
        phi.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed(">", following[0], ir.Constant(int64, 0)), loop, after)
    builder.position_at_end(after)


@intrinsic
def multiply_block(
    typingctx: Any,
    w: Any,
    x: Any,
    steps: Any,
    ahead: Any,
    sums: Any,
    biases: Any,
    goes_on: Any,
    waiting: Any,
    pairs: Any,
    each: Any,
    activation: Any,
    slope: Any,
) -> Any:
    """Sums of 32 outputs of 32 chains over ``steps`` steps of 32 inputs, at least one.

    Args:
        w, x: addresses of weights [step][2][16 outputs][32 inputs] and activations [step][16 pairs][32 chains].
        steps: number of them.
        ahead: address of weights that will be read next.
        sums: address of [32 outputs][32 chains] fp32, the result.
        biases: address of [32 outputs][16 times the same] fp32, from which sums start.
        goes_on: not 0 where they start from ``sums`` instead.
        waiting, pairs, each: sums of an earlier block of which each step rounds ``each`` pairs of rows: `round_pairs`.
        activation, slope: RELU or LEAKY_RELU, of the earlier block.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder, paired=False)
        _emit_start(e, args[4], args[5], args[6])
        _emit_by_activation(
            e, args[10], (RELU, LEAKY_RELU), args[11], lambda code, lanes: _emit_steps(e, args, code, lanes)
        )
        _assembler(e, _TO_SUMS, [args[4], ir.Constant(ir.IntType(64), 64)])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11, types.float32), codegen


def _emit_start(e: Emitter, sums: Any, biases: Any, goes_on: Any) -> None:
    """Load the tiles of sums: biases, or sums of the inputs before."""
    builder, stride = e.builder, ir.Constant(ir.IntType(64), 64)
    first, later, started = (builder.append_basic_block(name) for name in ("first", "later", "started"))
    builder.cbranch(builder.icmp_signed("==", goes_on, ir.Constant(ir.IntType(64), 0)), first, later)
    for block, text, place in ((first, _FROM_BIAS, biases), (later, _FROM_SUMS, sums)):
        builder.position_at_end(block)
        _assembler(e, text, [place, stride])
        builder.branch(started)
    builder.position_at_end(started)


@intrinsic
def multiply_narrow(typingctx: Any, w: Any, x: Any, steps: Any, sums: Any, biases: Any) -> Any:
    """`multiply_block` of 16 outputs, of which each step has one tile of weights, all steps at once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, int64 = Emitter(builder, paired=False), ir.IntType(64)
        w, x, steps, sums, biases = args
        stride = ir.Constant(int64, 64)
        _assembler(e, _of_one_tile(_FROM_BIAS), [biases, stride])
        entry, loop, after = builder.block, builder.append_basic_block("step"), builder.append_basic_block("multiplied")
        builder.branch(loop)
        builder.position_at_end(loop)
        left, w_at, x_at = (e.phi(int64, first, entry) for first in (steps, w, x))
        _assembler(e, _of_one_tile(_STEP), [w_at, x_at, stride])
        following = (
            builder.sub(left, ir.Constant(int64, 1)),
            e.shift(w_at, STEP_BYTES // 2),
            e.shift(x_at, STEP_BYTES),
        )
        for phi, value in zip((left, w_at, x_at), following, strict=True):
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed(">", following[0], ir.Constant(int64, 0)), loop, after)
        builder.position_at_end(after)
        _assembler(e, _of_one_tile(_TO_SUMS), [sums, stride])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen
