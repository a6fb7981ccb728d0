"""Layers of few chains by multiply-adds: a vector's lanes are the outputs of a block, not chains.

With chains in its lanes a layer costs as much for one chain as for `LANES`. Here each weight is loaded once, in
vectors, and multiplied with one value of each chain. Sums take the same products in the same order: the bits are the
same. A layer of 2,016 x 2,016 for 1, 8 and 32 chains, one core of a Xeon with AVX-512: 0.78, 0.85 and 1.5 ms; of 504 x
504: 39, 40 and 86 us.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from kaleido_fast.engines.loops.arrays import LEAKY_RELU, RELU
from kaleido_fast.engines.loops.compiling import inner, intrinsic
from kaleido_fast.engines.loops.processor import MAX_OUTPUTS, VECTOR
from kaleido_fast.engines.loops.scalars import ZERO, activate
from kaleido_fast.engines.loops.team import share_of
from kaleido_fast.engines.loops.vectors import Emitter

MOST_CHAINS = 8 if VECTOR >= MAX_OUTPUTS else 0
"""None where a block has more outputs than a vector has lanes."""
LEAST_INPUTS = 32  # for fewer, moving the sums costs more than is won
_SUMS = 16 if VECTOR == 16 else 8  # registers for them
_MOST_BLOCKS = 8
SUMS_VALUES = _SUMS * VECTOR
_BYTES_AHEAD = 4096


def _blocks_of(chains: int) -> int:
    """Blocks whose sums for so many chains are in registers at the same time."""
    return max(1, min(_MOST_BLOCKS, _SUMS // chains))


def _emit_group(e: Emitter, chains: int, args: Any, end: Any) -> None:
    """Sums of up to `_blocks_of` blocks for ``chains`` chains; for fewer blocks the last one is computed repeatedly."""
    builder, int64 = e.builder, ir.IntType(64)
    _, have, n, sums, w, b, x, x_bytes, n_in, _ = args
    row = builder.mul(n, ir.Constant(int64, 4))
    block_bytes, last = builder.mul(row, n_in), builder.sub(have, ir.Constant(int64, 1))
    places, starts = [], []
    for i in range(_blocks_of(chains)):
        index = ir.Constant(int64, i)
        block = builder.select(builder.icmp_signed("<", index, last), index, last)
        places.append(builder.add(w, builder.mul(block, block_bytes)))
        starts.append(e.load(builder.add(b, builder.mul(block, row)), e.vector))
    entry, loop, after = builder.block, builder.append_basic_block("inputs"), builder.append_basic_block("summed")
    builder.branch(loop)
    builder.position_at_end(loop)
    left, x_at, *w_at = (e.phi(int64, first, entry) for first in (n_in, x, *places))
    totals = [[e.phi(e.vector, start, entry) for _ in range(chains)] for start in starts]
    inputs = [e.spread(e.load(e.shift(x_at, 4 * chain), e.operand.element)) for chain in range(chains)]
    results = []
    for place, of_block in zip(w_at, totals, strict=True):
        e.prefetch(e.shift(place, _BYTES_AHEAD), 1)
        weights = e.load(place, e.operand)
        results.append([e.add_product(value, weights, total) for value, total in zip(inputs, of_block, strict=True)])
    left_next = builder.sub(left, ir.Constant(int64, 1))
    carried = [(left, left_next), (x_at, builder.add(x_at, x_bytes)), *((p, builder.add(p, row)) for p in w_at)]
    for phi, value in carried:
        phi.add_incoming(value, loop)
    for of_block, new in zip(totals, results, strict=True):
        for phi, value in zip(of_block, new, strict=True):
            phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed(">", left_next, ir.Constant(int64, 0)), loop, after)
    builder.position_at_end(after)
    for i, of_block in enumerate(results):
        for chain, value in enumerate(of_block):
            e.store(value, e.shift(sums, 4 * VECTOR * (i * chains + chain)))
    builder.branch(end)


@intrinsic
def _few_products(
    typingctx: Any,
    chains: Any,
    have: Any,
    n: Any,
    sums: Any,
    w: Any,
    b: Any,
    x: Any,
    x_bytes: Any,
    n_in: Any,
    weights: Any,
) -> Any:
    """Sums of a group of blocks of ``n`` outputs: ``sums`` [block][chain][VECTOR], of which ``n`` lanes count.

    Args:
        chains: 1, 2, 4 or 8.
        have: blocks, 1 .. `_blocks_of`; ``sums`` has room for as many as that.
        n: outputs of each.
        sums, w, b: addresses of the result, of [block][input][output] and of [block][output].
        x: address of inputs, ``x_bytes`` apart, each of ``chains`` chains or more.
        n_in: inputs, or pairs of them, at least 1.
        weights: the array, for its type.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder, paired=isinstance(weights.dtype, types.Integer))
        end = builder.append_basic_block("stored")
        cases = {chains: builder.append_basic_block(f"chains{chains}") for chains in (1, 2, 4, 8)}
        switch = builder.switch(args[0], cases[8])
        for chains, case in cases.items():
            if chains != 8:
                switch.add_case(ir.Constant(ir.IntType(64), chains), case)
            builder.position_at_end(case)
            _emit_group(e, chains, args, end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9, weights), codegen


@inner
def padded_chains(n_chains):
    """Chains that are computed for ``n_chains``, up to `MOST_CHAINS`."""
    return 1 if n_chains == 1 else 2 if n_chains == 2 else 4 if n_chains <= 4 else 8


@inner
def few_layer(layers, index, n_chains, x, x_row, n_in, target, y_row, sums, place, activation):
    """This thread's share of one layer of the first ``n_chains`` lanes of a sub-tile.

    ``x`` is the address of its ``n_in`` rows of inputs, of ``x_row`` values each; ``target`` has rows of ``y_row``.
    """
    _, n_out, n_blocks, first_weight, first_bias = layers.table[index]
    w = np.int64(layers.weights.ctypes.data) + 4 * first_weight
    b = np.int64(layers.biases.ctypes.data) + 4 * first_bias
    chains = padded_chains(n_chains)
    together = max(1, min(_MOST_BLOCKS, _SUMS // chains))
    least, n_larger = n_out // n_blocks, n_out % n_blocks
    block, end = share_of(n_blocks, place)
    output = block * least + min(block, n_larger)
    w += 4 * output * n_in
    b += 4 * output
    sums_at = np.int64(sums.ctypes.data)
    while block < end:
        n, equal = (least + 1, min(n_larger, end)) if block < n_larger else (least, end)
        have = min(together, equal - block)
        _few_products(chains, have, n, sums_at, w, b, x, 4 * x_row, n_in, layers.weights)
        if activation > LEAKY_RELU:
            activate(sums, have * chains * VECTOR, activation)
        for i in range(have):
            for chain in range(chains):
                at = (i * chains + chain) * VECTOR
                for lane in range(n):
                    value = sums[at + lane]
                    if value < ZERO and activation == RELU:
                        value = ZERO
                    elif value < ZERO and activation == LEAKY_RELU:
                        value = value * layers.slope
                    target[(output + i * n + lane) * y_row + chain] = value
        w += 4 * have * n * n_in
        b += 4 * have * n
        output += have * n
        block += have
