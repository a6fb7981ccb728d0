"""Layers by multiply-adds: one register block of outputs after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from kaleido_fast.engines.loops.arrays import LEAKY_RELU, NONE, RELU
from kaleido_fast.engines.loops.bf16 import round_to_bf16, round_to_pairs
from kaleido_fast.engines.loops.compiling import inner, intrinsic, pasted
from kaleido_fast.engines.loops.few import LEAST_INPUTS, MOST_CHAINS, few_layer, padded_chains
from kaleido_fast.engines.loops.processor import CACHE_LINE, LANES, MAX_OUTPUTS, ROW_BYTES, VECTOR, VECTORS
from kaleido_fast.engines.loops.scalars import activate
from kaleido_fast.engines.loops.team import meet, share_of
from kaleido_fast.engines.loops.vectors import Emitter

# Wide layers wait for memory: each block begins with weights that nobody has read before, and the inputs of a tile of
# cifar are more than the second cache holds (GFLOP/s of one Xeon core with AVX-512: 145, 185 with prefetching). Narrow
# layers would lose 5 % by it (points1d 152, 144); their blocks are hardly ever full.
_WIDE_OUTPUTS = MAX_OUTPUTS - 1
_ROWS_AHEAD = 16


def _emit_products(
    e: Emitter, n_outputs: int, x: Any, w: Any, b: Any, n_in: Any, ahead: Any, ahead_step: Any
) -> tuple[list[Any], Any]:
    """Sums of one block, outputs x vectors: bias plus a loop over the inputs; and where ``ahead`` came to.

    In wide layers each input asks for one line of weights to come, at ``ahead``, and for inputs some rows on.
    """
    builder, int64 = e.builder, ir.IntType(64)
    starts = [e.spread(e.load(e.shift(b, 4 * m), e.vector.element)) for m in range(n_outputs)]
    entry, loop, after = builder.block, builder.append_basic_block("inputs"), builder.append_basic_block("summed")
    builder.branch(loop)
    builder.position_at_end(loop)
    k = e.phi(int64, ir.Constant(int64, 0), entry)
    x_at, w_at, ahead_at = (e.phi(int64, first, entry) for first in (x, w, ahead))
    sums = [e.phi(e.vector, starts[m], entry) for m in range(n_outputs) for _ in range(VECTORS)]
    if n_outputs >= _WIDE_OUTPUTS:
        e.prefetch(ahead_at, 2)
        for line in range(0, ROW_BYTES, CACHE_LINE):
            e.prefetch(e.shift(x_at, _ROWS_AHEAD * ROW_BYTES + line), 1)
    inputs = [e.load(e.shift(x_at, 4 * VECTOR * v), e.operand) for v in range(VECTORS)]
    results = []
    for m in range(n_outputs):
        weight = e.spread(e.load(e.shift(w_at, 4 * m), e.operand.element))
        results += [e.add_product(inputs[v], weight, sums[m * VECTORS + v]) for v in range(VECTORS)]
    k_next = builder.add(k, ir.Constant(int64, 1))
    ahead_next = builder.add(ahead_at, ahead_step)
    carried = [(k, k_next), (x_at, e.shift(x_at, ROW_BYTES)), (w_at, e.shift(w_at, 4 * n_outputs))]
    for phi, value in [*carried, (ahead_at, ahead_next), *zip(sums, results, strict=True)]:
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", k_next, n_in), loop, after)
    builder.position_at_end(after)
    return results, ahead_next


def _emit_store(e: Emitter, sums: list[Any], y: Any, activation: int, slope: Any) -> None:
    zero = ir.Constant(e.vector, None)
    for i, value in enumerate(sums):
        if activation != NONE:
            below = zero if activation == RELU else e.builder.fmul(value, slope)
            value = e.builder.select(e.builder.fcmp_ordered("<", value, zero), below, value)
        m, v = divmod(i, VECTORS)
        e.store(value, e.shift(y, ROW_BYTES * m + 4 * VECTOR * v))


def _emit_block(e: Emitter, n_outputs: int, args: Any, end: Any) -> None:
    """Sub-tile after sub-tile: products, then the activation that can be done in registers, chosen at run time."""
    builder, int64 = e.builder, ir.IntType(64)
    _, subs, y, y_bytes, x, x_bytes, w, b, n_in, activation, ahead, slope, _ = args
    ahead_step = builder.sdiv(ir.Constant(int64, 4 * MAX_OUTPUTS), subs)  # all sub-tiles together: the next block
    entry, loop, stored = builder.block, builder.append_basic_block("sub"), builder.append_basic_block("sub_stored")
    builder.branch(loop)
    builder.position_at_end(loop)
    left, y_at, x_at, ahead_at = (e.phi(int64, first, entry) for first in (subs, y, x, ahead))
    sums, ahead_next = _emit_products(e, n_outputs, x_at, w, b, n_in, ahead_at, ahead_step)
    blocks = {code: builder.append_basic_block(f"activation{code}") for code in (NONE, RELU, LEAKY_RELU)}
    switch = builder.switch(activation, blocks[NONE])
    for code, block in blocks.items():
        if code != NONE:
            switch.add_case(ir.Constant(int64, code), block)
        builder.position_at_end(block)
        _emit_store(e, sums, y_at, code, e.spread(slope) if code == LEAKY_RELU else None)
        builder.branch(stored)
    builder.position_at_end(stored)
    left_next = builder.sub(left, ir.Constant(int64, 1))
    moved = (left_next, builder.add(y_at, y_bytes), builder.add(x_at, x_bytes), ahead_next)
    for phi, value in zip((left, y_at, x_at, ahead_at), moved, strict=True):
        phi.add_incoming(value, stored)
    builder.cbranch(builder.icmp_signed(">", left_next, ir.Constant(int64, 0)), loop, end)


@intrinsic
def _dense_block(
    typingctx: Any,
    n_outputs: Any,
    subs: Any,
    y: Any,
    y_bytes: Any,
    x: Any,
    x_bytes: Any,
    w: Any,
    b: Any,
    n_in: Any,
    activation: Any,
    ahead: Any,
    slope: Any,
    weights: Any,
) -> Any:
    """``n_outputs`` outputs (1 .. MAX_OUTPUTS) of ``subs`` sub-tiles (at least 1) of `LANES` chains.

    Args:
        n_outputs: picks one of MAX_OUTPUTS loops, each with its sums in registers.
        subs: sub-tiles, ``y_bytes`` and ``x_bytes`` apart.
        y, b: addresses of [output][lane] and [output] fp32.
        x, w: addresses of [input][lane] and [input][output], of the type of ``weights``.
        n_in: inputs, or pairs of them, at least 1.
        activation: code; those that cannot be done in registers are left to `activate`.
        ahead: address of weights that will be read next.
        slope: of leaky_relu.
        weights: the array, for its type: fp32, or int32 for pairs of bf16.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emitter(builder, paired=isinstance(weights.dtype, types.Integer))
        end = builder.append_basic_block("stored")
        cases = [builder.append_basic_block(f"outputs{m}") for m in range(1, MAX_OUTPUTS + 1)]
        switch = builder.switch(args[0], cases[0])
        for m, case in enumerate(cases, start=1):
            if m > 1:
                switch.add_case(ir.Constant(ir.IntType(64), m), case)
            builder.position_at_end(case)
            _emit_block(e, m, args, end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    word = types.int64
    return types.void(*[word] * 11, types.float32, weights), codegen


@inner
def _row(table, index, n_chains):
    """Values in a row of what a layer reads: no more than there are chains where that layer and the one before can.

    Threads of a team send each other fewer cache lines by it, and one alone keeps them in its first cache.
    """
    if index == 0 or index == table.shape[0]:
        return LANES
    few = table[index - 1, 0] >= LEAST_INPUTS and table[index, 0] >= LEAST_INPUTS
    return padded_chains(n_chains) if few else LANES


@pasted
def _layer(layers, index, n_chains, source, target, tile, activation):
    """This thread's share of one layer; a block of weights serves all sub-tiles before the next one is read."""
    n_in, n_out, n_blocks, first_weight, first_bias = layers.table[index]
    subs = (n_chains + LANES - 1) // LANES
    x, y = np.int64(source.ctypes.data), np.int64(target.ctypes.data)
    if len(tile.pairs) > 0:
        round_to_pairs(source, subs, n_in, tile.pairs)
        x, n_in = np.int64(tile.pairs.ctypes.data), (n_in + 1) // 2
    if n_chains <= MOST_CHAINS and n_in >= LEAST_INPUTS:
        x_row = y_row = LANES
        if len(tile.pairs) == 0:
            x_row, y_row = _row(layers.table, index, n_chains), _row(layers.table, index + 1, n_chains)
        few_layer(layers, index, n_chains, x, x_row, n_in, target, y_row, tile.sums, tile.place, activation)
        return
    w = np.int64(layers.weights.ctypes.data) + 4 * first_weight
    b = np.int64(layers.biases.ctypes.data) + 4 * first_bias
    least, n_larger = n_out // n_blocks, n_out % n_blocks
    first, end = share_of(n_blocks, tile.place)
    output = first * least + min(first, n_larger)
    w += 4 * output * n_in
    y += output * ROW_BYTES
    b += 4 * output
    for block in range(first, end):
        n = least + 1 if block < n_larger else least
        after = w + 4 * n * n_in
        _dense_block(
            n,
            subs,
            y,
            n_out * ROW_BYTES,
            x,
            n_in * ROW_BYTES,
            w,
            b,
            n_in,
            activation,
            after,
            layers.slope,
            layers.weights,
        )
        w = after
        y += n * ROW_BYTES
        b += 4 * n
    if activation > LEAKY_RELU:
        all_in_one = end - first == n_blocks
        n = subs * n_out if all_in_one else end * least + min(end, n_larger) - output
        for sub in range(1 if all_in_one else subs):
            activate(target[(sub * n_out + output) * LANES :], n * LANES, activation)


@inner
def _round_share(values, n, rounded, place):
    first, end = share_of(n, place)
    round_to_bf16(values[first:], end - first, rounded[first:])
    meet(place)


@pasted
def dense_network(layers, n_chains, source, target, tile):
    """target = bound(MLP(source)) of the first ``n_chains`` chains of a tile; what others hold is of no meaning."""
    subs = (n_chains + LANES - 1) // LANES
    n_layers = layers.table.shape[0]
    x, hidden, other = source, tile.hidden, tile.other
    if layers.rounds:
        x = tile.rounded
        _round_share(source, subs * layers.table[0, 0] * LANES, x, tile.place)
    for index in range(n_layers):
        hidden_layer = index < n_layers - 1
        y = hidden if hidden_layer else target
        _layer(layers, index, n_chains, x, y, tile, layers.activation if hidden_layer else layers.bound)
        meet(tile.place)
        if layers.rounds and hidden_layer:
            _round_share(y, subs * layers.table[index, 1] * LANES, y, tile.place)
        x, hidden, other = hidden, other, hidden
