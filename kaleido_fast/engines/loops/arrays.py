"""What the loops read and write: the packed network, the schedule, and the buffers of one tile."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NONE, RELU, LEAKY_RELU, GELU, GELU_TANH, SILU, TANH, SIGMOID = range(8)
NORMAL, UNIFORM, UPSTREAM, START_NORMAL, START_UNIFORM, RESTART = range(1, 7)


class Layers(NamedTuple):
    """A packed network.

    Args:
        weights: all layers one after the other; each is a sequence of blocks. Of multiply-adds: [input][output of the
            block], fp32; or [pair of inputs][output], int32 that hold two bf16, the even input in the low half. Of
            tiles: [step of 32 inputs][16 or 32 outputs][pair of inputs], int32.
        biases: all layers one after the other; of tiles, each 16 times, filled up to whole blocks.
        table: (n_layers, 5) int64: inputs, outputs, blocks, first weight, first bias.
        rounds: whether multiply-adds in fp32 take their operands rounded to bf16.
        activation, slope: code of the hidden activation, and the slope of leaky_relu.
        bound: code of the output bound.
        low, high, mid, half, span: data range, its middle, half its width, its width.
    """

    weights: np.ndarray
    biases: np.ndarray
    table: np.ndarray
    rounds: bool
    activation: int
    slope: np.float32
    bound: int
    low: np.float32
    high: np.float32
    mid: np.float32
    half: np.float32
    span: np.float32


class Steps(NamedTuple):
    """The schedule and the noise; see `kaleido_kernels.schedule.Schedule`.

    Args:
        kept: (thin,) fp32 of a flow, RESTART: share of the way to f(x) that each step of a draw leaves; () of others.
    """

    burn_in: int
    n_draws: int
    thin: int
    settle: int
    noise: int
    jitter: np.float32
    key_low: int
    key_high: int
    kept: np.ndarray


class Tile(NamedTuple):
    """Buffers of one tile, one set a thread, or a team of threads; nothing in them outlives a call.

    Args:
        chain_ids: (subs * LANES,) int64 absolute chain ids.
        state, moved: (subs * dim * LANES,) fp32.
        hidden, other: values between layers, (subs * widest layer * LANES,) fp32; of tiles, pairs of bf16 in int32.
        pairs: the inputs of a layer as pairs of bf16, (subs * half of the widest layer * LANES,) int32, or ().
        rounded: the state rounded to bf16, (subs * dim * LANES,) fp32, or ().
        sums: sums of blocks of outputs, fp32: of tiles (subs * BLOCK * LANES,), of few chains (SUMS_VALUES,).
        words, noise: (4 * LANES,) uint32 and fp32.
        residual: (subs * LANES,) fp32, of the last step run.
        place: None for a thread alone; of a team (3,) int64: this thread's rank, the team's size, or as many as its
            leader, 0, waits for, and the address of the board, (BOARD_VALUES,) int64, by which the team meets, or 0 of
            a leader without others.

    Threads of a team have ``pairs``, ``sums``, ``words``, ``noise`` and ``place`` of their own.
    """

    chain_ids: np.ndarray
    state: np.ndarray
    moved: np.ndarray
    hidden: np.ndarray
    other: np.ndarray
    pairs: np.ndarray
    rounded: np.ndarray
    sums: np.ndarray
    words: np.ndarray
    noise: np.ndarray
    residual: np.ndarray
    place: np.ndarray | None
