"""Compiles a small Gluon kernel of two partitions that multiply and one that copies, sound and with faults; run alone.

``python tests/proving/judged_ring.py`` compiles for sm_90 and needs no GPU.
"""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kaleido_kernels.proving.evidence import Evidence, Verdict
from kaleido_kernels.proving.inspect.compiling import disassemble, resources
from kaleido_kernels.proving.sass.program import is_tensor
from kaleido_kernels.proving.specialised import (
    fenced_layers,
    fenced_scratch,
    loads_ahead,
    paired_barriers,
    register_shares,
)
from kaleido_kernels.proving.ttgir.ahead import copies_ahead
from kaleido_kernels.proving.verdicts import carried_values, hazards, input_precision, offsets, reached_code

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name until Triton 3.7
SIDE = gl.constexpr(64)
SLOTS = gl.constexpr(3)


@gluon.jit
def multiply(
    GROUP: gl.constexpr, scratch_ptr, final_ptr, act, ring, full, empty, ready, rounds, steps, FAULT: gl.constexpr
):  # fmt: skip
    """Stores its input for the copies, multiplies it by ``rounds`` tiles, and stores the sum as the next input."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    RUNNING: gl.constexpr = 2 if FAULT == "early" else 1
    rows = gl.arange(0, SIDE, layout=gl.SliceLayout(1, MMA))
    cols = gl.arange(0, SIDE, layout=gl.SliceLayout(0, MMA))
    place = rows[:, None] * SIDE + cols[None, :]
    acc = gl.zeros([SIDE, SIDE], gl.float32, layout=MMA)
    it = 0
    for _ in range(steps):
        gl.store(scratch_ptr + GROUP * SIDE * SIDE + place, acc.to(gl.float16))
        fence_async_shared()
        if FAULT != "scratch":
            gl.inline_asm_elementwise(
                "fence.proxy.async.global; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
            )
        barrier()
        mbarrier.arrive(ready.index(GROUP), count=1)
        for k in range(rounds):
            slot = it % SLOTS
            mbarrier.wait(full.index(slot), (it // SLOTS) & 1)
            weights = ring.index(slot).permute((1, 0))
            acc = warpgroup_mma(act.index(2 * slot + GROUP), weights, acc, is_async=True)
            acc = warpgroup_mma_wait(RUNNING, deps=(acc,))
            mbarrier.arrive(empty.index((it + SLOTS - 1) % SLOTS), count=1, pred=k > 0)
            it += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((it + SLOTS - 1) % SLOTS), count=1)
    chains = gl.program_id(0).to(gl.int64) * SIDE + rows.to(gl.int64)
    if FAULT == "narrow":
        gl.store(final_ptr + place, acc)
    else:
        gl.store(final_ptr + chains[:, None] * SIDE + cols[None, :], acc)


@gluon.jit
def copy(w_desc, x_desc, act, ring, full, empty, ready, rounds, steps, FAULT: gl.constexpr):
    """Fills the ring with weights, and the inputs of both groups beside each tile."""
    BYTES: gl.constexpr = w_desc.block_type.nbytes
    it = 0
    first = 0
    for step in range(steps):
        mbarrier.wait(ready.index(0), step & 1)
        mbarrier.wait(ready.index(1), step & 1)
        for k in range(first, (step + 1) * rounds):
            slot = it % SLOTS
            mbarrier.wait(empty.index(slot), ((it // SLOTS) & 1) ^ 1)
            mbarrier.expect(full.index(slot), BYTES + (2 * x_desc.block_type.nbytes if FAULT != "bytes" else 0))
            tma.async_copy_global_to_shared(w_desc, [k * SIDE, 0], full.index(slot), ring.index(slot))
            tma.async_copy_global_to_shared(x_desc, [0, 0], full.index(slot), act.index(2 * slot))
            tma.async_copy_global_to_shared(x_desc, [SIDE, 0], full.index(slot), act.index(2 * slot + 1))
            it += 1
        if FAULT == "carried":  # Triton 3.6 and 3.7 put the first value of what is only a bound in its place
            first = (step + 1) * rounds


@gluon.jit(do_not_specialize=("rounds", "steps"))
def ring_kernel(scratch_ptr, final_ptr, w_desc, x_desc, rounds, steps, FAULT: gl.constexpr):
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    act = gl.allocate_shared_memory(gl.float16, [2 * SLOTS, SIDE, SIDE], shared)
    ring = gl.allocate_shared_memory(gl.float16, [SLOTS, SIDE, SIDE], shared)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1 if FAULT == "count" else 2)
    for group in gl.static_range(2):
        mbarrier.init(ready.index(group), count=1)
    gl.warp_specialize(
        [
            (multiply, (gl.constexpr(0), scratch_ptr, final_ptr, act, ring, full, empty, ready, rounds, steps, FAULT)),
            (multiply, (gl.constexpr(1), scratch_ptr, final_ptr, act, ring, full, empty, ready, rounds, steps, FAULT)),
            (copy, (w_desc, x_desc, act, ring, full, empty, ready, rounds, steps, FAULT)),
        ],
        [4, 1],
        [240, 24],
    )


def compiled(fault: str) -> Evidence:
    """What the compiler makes of the kernel with a fault."""
    kind = f"tensordesc<fp16[64, 64],{gl.NVMMASharedLayout(128, 16, rank=2)!r}>"
    types = {"scratch_ptr": "*fp16", "final_ptr": "*fp32", "w_desc": kind, "x_desc": kind, "rounds": "i32"}
    signature = types | {"steps": "i32", "FAULT": "constexpr"}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(2)}
    source = GluonASTSource(ring_kernel, signature, {"FAULT": fault}, aligned)
    made = triton.compile(source, GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    registers, stack = resources(made.asm["cubin"])
    return Evidence(
        "onchip",
        "fp16",
        "none",
        "sm_90",
        made.metadata.num_warps,
        registers,
        stack,
        made.metadata.shared,
        True,
        made.asm["source"],
        made.asm["ttgir"],
        disassemble(made.asm["cubin"]),
    )


def judged(evidence: Evidence) -> list[Verdict]:
    plain = (hazards, reached_code, offsets, input_precision, carried_values)
    own = (paired_barriers, fenced_layers, fenced_scratch, register_shares)
    return [*(verdict(evidence) for verdict in (*plain, *own)), loads_ahead(*copies_ahead(evidence.module), 2)]


SEEN = {
    "": set(),
    "scratch": {"fenced scratch"},
    "early": {"loads ahead"},
    "bytes": {"paired barriers"},
    "count": {"paired barriers"},
    "narrow": {"64-bit offsets"},
    "carried": {"carried values"} if triton.__version__ < "3.8" else set(),
}

if __name__ == "__main__":
    for fault, expected in SEEN.items():
        found = compiled(fault)
        failed = {verdict.name: verdict.detail for verdict in judged(found) if not verdict.passed}
        assert set(failed) == expected, (fault, failed)
        program = found.program
        products = [number for number in range(len(program.blocks)) if any(map(is_tensor, program.of_block(number)))]
        assert len(products) >= 2 and program.reached >= set(products), "the code of both groups"
        assert found.specialised and found.warps == 12, found.warps
    print(f"Triton {triton.__version__}: {len(SEEN)} kernels", file=sys.stderr)
