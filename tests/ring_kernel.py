"""A small warp-specialised kernel in Gluon: a producer warp streams weights through a ring to one or two groups of
warps, which multiply. It meets every rule that such kernels depend on, and is quick to compile and to emulate."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kaleido_kernels.proving.emulation.driver import Emulator, emulated
from kaleido_kernels.variant import Variant

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name until Triton 3.7
WIDTH, ROWS, CHUNK = 128, 64, 64
"""Outputs and inputs of a layer; rows of a group; inputs of a tile of weights."""
LAYOUT = gl.NVMMASharedLayout(128, 16, rank=2)
SLOTS = 3


@gluon.jit
def consume(
    GROUP: gl.constexpr, out_ptr, scratch_ptr, act, big_act, ring, full, empty, ready, n_steps,
    LAYERS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """One group's rows through all layers of all steps; between steps they wait in global memory."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
    cols = gl.arange(0, 128, layout=gl.SliceLayout(0, MMA))
    place = gl.program_id(0) * 2 + GROUP
    acc = gl.zeros([64, 128], gl.float32, layout=MMA)
    it = 0
    for step in range(n_steps):
        for layer in range(LAYERS):
            acc = gl.zeros([64, 128], gl.float32, layout=MMA)
            for k in range(2):
                slot = it % SLOTS
                mbarrier.wait(full.index(slot), (it // SLOTS) & 1)
                acc = warpgroup_mma(act.index(GROUP * 2 + k), ring.index(slot).permute((1, 0)), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))
                mbarrier.arrive(empty.index((it + SLOTS - 1) % SLOTS), count=1, pred=k > 0)
                it += 1
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((it + SLOTS - 1) % SLOTS), count=1)
            acc = gl.maximum(acc, 0.0)
            if layer + 1 < LAYERS:
                big_act.index(GROUP).store(acc.to(gl.float16))
                fence_async_shared()
                barrier()
        if step + 1 < n_steps:
            spot = place * 8192 + (cols[None, :] // 64) * 4096 + rows[:, None] * 64 + cols[None, :] % 64
            gl.store(scratch_ptr + spot, acc.to(gl.float16))
            gl.inline_asm_elementwise(
                "fence.proxy.async.global; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
            )
            barrier()
            mbarrier.arrive(ready.index(GROUP), count=1)
        else:
            gl.store(out_ptr + (place * 64 + rows)[:, None] * 128 + cols[None, :], acc)


@gluon.jit
def produce(
    w_desc, x_desc, act, ring, full, empty, ready, n_steps,
    GROUPS: gl.constexpr, LAYERS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The tiles of all layers in the order of their use, and with the first two of a step the rows of all groups."""
    W_BYTES: gl.constexpr = w_desc.block_type.nbytes
    X_BYTES: gl.constexpr = GROUPS * x_desc.block_type.nbytes
    it = 0
    for step in range(n_steps):
        for t in range(2):  # weights are under way before the rows are there
            slot = (it + t) % SLOTS
            mbarrier.wait(empty.index(slot), (((it + t) // SLOTS) & 1) ^ 1)
            mbarrier.expect(full.index(slot), W_BYTES + X_BYTES)
            tma.async_copy_global_to_shared(w_desc, [t * 128, 0], full.index(slot), ring.index(slot))
        for group in gl.static_range(GROUPS):
            mbarrier.wait(ready.index(group), (step & 1) ^ 1)
        for t in range(2):
            slot = it % SLOTS
            for group in gl.static_range(GROUPS):
                row = ((gl.program_id(0) * 2 + group) * 2 + t) * 64
                tma.async_copy_global_to_shared(x_desc, [row, 0], full.index(slot), act.index(group * 2 + t))
            it += 1
        for t in range(2, 2 * LAYERS):
            slot = it % SLOTS
            mbarrier.wait(empty.index(slot), ((it // SLOTS) & 1) ^ 1)
            mbarrier.expect(full.index(slot), W_BYTES)
            tma.async_copy_global_to_shared(w_desc, [t * 128, 0], full.index(slot), ring.index(slot))
            it += 1


@gluon.jit(do_not_specialize=("n_steps",))
def ring_kernel(
    out_ptr,  # (programs * 128, 128) fp32, row-major
    w_desc,  # (layers * 2 * 128, 64) fp16: tiles of 128 outputs x 64 inputs
    x_desc,  # (programs * 2 groups * 2 chunks * 64 rows, 64) fp16
    scratch_ptr,  # what x_desc describes
    n_steps: tl.int32,
    GROUPS: gl.constexpr,
    LAYERS: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """Grid: programs, each of ``GROUPS`` times 64 rows."""
    act = gl.allocate_shared_memory(gl.float16, [2 * GROUPS, 64, 64], x_desc.layout)
    big_act = act._reinterpret(gl.float16, [GROUPS, 64, 128], x_desc.layout)
    ring = gl.allocate_shared_memory(gl.float16, [SLOTS, 128, 64], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    for i in gl.static_range(GROUPS):
        mbarrier.init(ready.index(i), count=1)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (consume, (gl.constexpr(0), out_ptr, scratch_ptr, act, big_act, ring, full, empty, ready, n_steps,
                           LAYERS, SLOTS)),
                (consume, (gl.constexpr(1), out_ptr, scratch_ptr, act, big_act, ring, full, empty, ready, n_steps,
                           LAYERS, SLOTS)),
                (produce, (w_desc, x_desc, act, ring, full, empty, ready, n_steps, GROUPS, LAYERS, SLOTS)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (gl.constexpr(0), out_ptr, scratch_ptr, act, big_act, ring, full, empty, ready, n_steps,
                           LAYERS, SLOTS)),
                (produce, (w_desc, x_desc, act, ring, full, empty, ready, n_steps, GROUPS, LAYERS, SLOTS)),
            ],
            [1],
            [24],
        )  # fmt: skip


def ring_variant(groups: int = 2, layers: int = 2) -> Variant:
    """The kernel with what is compiled in."""
    kinds = {
        "out_ptr": "*fp32",
        "w_desc": f"tensordesc<fp16[{WIDTH},{CHUNK}],{LAYOUT!r}>",
        "x_desc": f"tensordesc<fp16[{ROWS},{CHUNK}],{LAYOUT!r}>",
        "scratch_ptr": "*fp16",
        "n_steps": "i32",
    }
    return Variant(ring_kernel, kinds, {"GROUPS": groups, "LAYERS": layers, "SLOTS": SLOTS}, 4, 1)


def chunks_of(matrix: Tensor, rows: int) -> Tensor:
    """Pieces of (rows, 64) of a matrix with rows of 128 values, one below the other."""
    return matrix.view(-1, rows, 2, CHUNK).transpose(1, 2).reshape(-1, CHUNK).contiguous()


def run_ring(emulator: Emulator, groups: int = 2, layers: int = 2, n_steps: int = 3, programs: int = 1) -> float:
    """Largest error of the results, in the emulator, from rows and weights by chance."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(layers, WIDTH, WIDTH, generator=generator).mul_((2 / WIDTH) ** 0.5).half()
    rows = torch.randn(programs * 2 * ROWS, WIDTH, generator=generator).half()
    tiles, scratch = chunks_of(weights, WIDTH), chunks_of(rows, ROWS)
    out = torch.full((programs * 2 * ROWS, WIDTH), float("nan"))
    descriptors = [
        TensorDescriptor.from_tensor(tensor, [n, CHUNK], LAYOUT) for tensor, n in ((tiles, WIDTH), (scratch, ROWS))
    ]
    with emulated(emulator):
        ring_variant(groups, layers).launch(programs, [out, *descriptors, scratch, n_steps])
    want = rows.float()
    for _ in range(n_steps):
        for weight in weights:
            want = (want.half().float() @ weight.float().t()).relu()
    error = (out - want).abs().nan_to_num(float("inf")).view(programs, 2, ROWS, WIDTH)[:, :groups]
    return float(error.max())
