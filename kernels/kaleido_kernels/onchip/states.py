"""States of the onchip kernel: noise, where chains start, and inputs of steps, a chunk of 64 columns at a time.

``MAP`` is what `kaleido_kernels.steps` says of it, ``LAYOUT`` an `kaleido_kernels.onchip.plan.OnchipLayout`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kaleido_kernels.noise import flow_start_from, moved_by, start_from
from kaleido_kernels.onchip import layouts
from kaleido_kernels.philox import normal_pair, philox_words, unit
from kaleido_kernels.steps import to_operand

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name until Triton 3.7
CHUNK = gl.constexpr(64)


class Rows(NamedTuple):
    """Chains of a group: the launch's row of the first (int64), and what ids are made from."""

    first: Any
    n_chains: Any
    first_chain: Any
    chain_ids_ptr: Any


class Places(NamedTuple):
    """Where a group keeps states: chunks in shared memory, its first one there, and its own memory.

    ``scratch_ptr``: inputs of steps as operands, where they go through memory; ``state_ptr``: the same in fp32.
    """

    act: Any
    own: Any
    scratch_ptr: Any
    state_ptr: Any
    ready: Any


@gluon.jit
def local_rows(LAYOUT: gl.constexpr):
    """0 .. group - 1, as rows of a chunk lie."""
    X: gl.constexpr = layouts.accumulator(64)
    return gl.arange(0, LAYOUT.group, layout=gl.SliceLayout(1, X))


@gluon.jit
def chunk_columns(c):
    """Columns of chunk ``c``."""
    X: gl.constexpr = layouts.accumulator(64)
    return c * CHUNK + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, X))


@gluon.jit
def place_chunk(rows, c, MAP: gl.constexpr, LAYOUT: gl.constexpr):
    """(offsets, mask) of chunk ``c`` of a group's chains in (n_chains, D) row-major."""
    row = rows.first + local_rows(LAYOUT).to(gl.int64)
    cols = chunk_columns(c)
    return row[:, None] * MAP.dim + cols[None, :], (row < rows.n_chains)[:, None] & (cols < MAP.dim)[None, :]


@gluon.jit
def noise_chunk(seed, rows, c, step, KIND: gl.constexpr, LAYOUT: gl.constexpr):
    """Noise of chunk ``c`` and counter ``step``. KIND: "uniform" on [0, 1), or "normal".

    A thread's pair of columns is half of a Philox block, so that each block is made twice.
    """
    GROUP: gl.constexpr = LAYOUT.group
    PAIRS: gl.constexpr = layouts.pairs(GROUP)
    X: gl.constexpr = layouts.accumulator(64)
    row = rows.first + gl.arange(0, GROUP, layout=gl.SliceLayout(1, gl.SliceLayout(2, PAIRS))).to(gl.int64)
    pair = gl.arange(0, CHUNK // 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, PAIRS)))
    if rows.chain_ids_ptr is not None:
        ids = gl.load(rows.chain_ids_ptr + row, mask=row < rows.n_chains, other=0)
    else:
        ids = rows.first_chain + row
    w0, w1, w2, w3 = philox_words(seed, ids[:, None], ((c * CHUNK + 2 * pair) >> 2)[None, :], step)
    second = ((pair & 1) != 0)[None, :]
    left, right = gl.where(second, w2, w0), gl.where(second, w3, w1)
    if KIND == "normal":
        u, v = normal_pair(left, right)
    else:
        u, v = unit(left), unit(right)
    value = gl.reshape(gl.join(u, v), [GROUP, CHUNK])
    return gl.convert_layout(value, X, assert_trivial=True)


@gluon.jit
def start_chunk(start_ptr, noise, rows, c, MAP: gl.constexpr, LAYOUT: gl.constexpr):
    """Chunk ``c`` of the states that a launch begins with: those in memory, or start noise where there are none."""
    if start_ptr is not None:
        offsets, mask = place_chunk(rows, c, MAP, LAYOUT)
        return gl.load(start_ptr + offsets, mask=mask, other=0.0)
    else:
        KIND: gl.constexpr = "normal" if MAP.jitter == "restart" else MAP.init
        step = gl.full([], 0, gl.int32)
        return start_from(noise_chunk(noise.seed, rows, c, step, KIND, LAYOUT), noise, MAP)


@gluon.jit
def jitter_chunk(x, step, jittered, noise, rows, c, MAP: gl.constexpr, LAYOUT: gl.constexpr):
    """The input of ``step`` from the state before it: see `kaleido_kernels.noise.jitter_input`."""
    if MAP.jitter == "normal" or MAP.jitter == "uniform":
        if jittered:
            KIND: gl.constexpr = MAP.jitter
            x = moved_by(x, noise_chunk(noise.seed, rows, c, step, KIND, LAYOUT), noise, MAP)
    elif MAP.jitter == "restart":
        if jittered:
            x = flow_start_from(noise_chunk(noise.seed, rows, c, step, "normal", LAYOUT), noise, MAP)
    return x


@gluon.jit
def jitter_output_chunk(x, done, noise, rows, c, MAP: gl.constexpr, LAYOUT: gl.constexpr):
    """The state after ``done`` steps from the last one's output: see `kaleido_kernels.noise.jitter_output`."""
    if MAP.jitter == "upstream":
        x = moved_by(x, noise_chunk(noise.seed, rows, c, done, "uniform", LAYOUT), noise, MAP)
    return x


@gluon.jit
def own_cells(c, places, LAYOUT: gl.constexpr):
    """Pointers to the group's own memory of chunk ``c`` as `layouts.by_thread` lies: a warp's values side by side."""
    GROUP: gl.constexpr = LAYOUT.group
    T: gl.constexpr = layouts.by_thread(GROUP)
    number = gl.arange(0, GROUP // 8, layout=gl.SliceLayout(1, gl.SliceLayout(2, T)))
    thread = gl.arange(0, 128, layout=gl.SliceLayout(0, gl.SliceLayout(2, T)))
    value = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, T)))
    offsets = (number * 512)[:, None, None] + (thread * 4)[None, :, None] + value[None, None, :]
    return places.state_ptr + c * (GROUP * CHUNK) + offsets


@gluon.jit
def keep_chunk(x, c, places, LAYOUT: gl.constexpr):
    """Chunk ``c`` of a step's input into the group's own memory, in fp32: the thread that stores it loads it.

    In the order of its threads, not of rows and columns: so four times fewer lines of the cache are touched at a time.
    """
    GROUP: gl.constexpr = LAYOUT.group
    T: gl.constexpr = layouts.by_thread(GROUP)
    # Rows are (64s, 16s, 8s, 1s), columns (8s, 2s, 1s).
    cells = gl.reshape(x, [GROUP // 64, 4, 2, 8, 8, 4, 2])
    cells = gl.reshape(gl.permute(cells, (0, 4, 1, 3, 5, 2, 6)), [GROUP // 8, 128, 4])
    gl.store(own_cells(c, places, LAYOUT), gl.convert_layout(cells, T, assert_trivial=True))


@gluon.jit
def kept_chunk(c, places, LAYOUT: gl.constexpr):
    """What `keep_chunk` stored."""
    GROUP: gl.constexpr = LAYOUT.group
    X: gl.constexpr = layouts.accumulator(64)
    cells = gl.reshape(gl.load(own_cells(c, places, LAYOUT)), [GROUP // 64, 8, 4, 8, 4, 2, 2])
    return gl.convert_layout(
        gl.reshape(gl.permute(cells, (0, 2, 5, 3, 1, 4, 6)), [GROUP, CHUNK]), X, assert_trivial=True
    )


@gluon.jit
def held_chunk(x, c, MAP: gl.constexpr):
    """Chunk ``c`` of the next input as operands that stay in registers."""
    high, _ = to_operand(gl.where((chunk_columns(c) < MAP.dim)[None, :], x, 0.0), MAP)
    return high


@gluon.jit
def put_chunk(x, c, places, MAP: gl.constexpr, LAYOUT: gl.constexpr):
    """Chunk ``c`` of the next input as operands: to its place in shared memory, or to memory."""
    x = gl.where((chunk_columns(c) < MAP.dim)[None, :], x, 0.0)
    high, low = to_operand(x, MAP)
    if LAYOUT.through_memory:
        # Columns in the order of a thread's registers: it stores 32 bytes in one piece, where pairs would be 4 bytes.
        P: gl.constexpr = layouts.in_pieces()
        high = gl.reshape(gl.permute(gl.reshape(high, [64, 8, 4, 2]), (0, 2, 1, 3)), [64, CHUNK])
        high = gl.convert_layout(high, P, assert_trivial=True)
        row = gl.arange(0, 64, layout=gl.SliceLayout(1, P))
        col = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, P))
        gl.store(places.scratch_ptr + c * (64 * CHUNK) + row[:, None] * CHUNK + col[None, :], high)
    else:
        places.act.index(places.own + c).store(high)
        if LAYOUT.parts == 2:
            places.act.index(places.own + LAYOUT.chunks + c).store(low)


@gluon.jit
def publish_input(places, goes_on, LAYOUT: gl.constexpr):
    """The group's whole input becomes visible to products, and to the copy engine if that shall fetch it."""
    fence_async_shared()
    if LAYOUT.through_memory:
        gl.inline_asm_elementwise(
            "fence.proxy.async.global; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
        barrier()
        mbarrier.arrive(places.ready, count=1, pred=goes_on)
    else:
        barrier()
