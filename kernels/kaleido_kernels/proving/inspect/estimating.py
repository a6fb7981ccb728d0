"""From machine code to the cost model: what a step issues, what hides its copies. Plain Python, no Triton."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

from kaleido_kernels.narrow.plan import narrow_layout
from kaleido_kernels.onchip.plan import OnchipTile
from kaleido_kernels.proving.architectures import FACTS
from kaleido_kernels.proving.evidence import Evidence
from kaleido_kernels.proving.inspect.jobs import Job
from kaleido_kernels.proving.roofline.gpu import resident_programs
from kaleido_kernels.proving.roofline.loops import Overlap
from kaleido_kernels.proving.roofline.model import Estimate, TileWork, estimate
from kaleido_kernels.proving.roofline.onchip import onchip_estimate
from kaleido_kernels.proving.roofline.work import (
    narrow_work,
    step_counts,
    stream_overlap,
    stream_work,
    wide_overlap,
    wide_work,
)
from kaleido_kernels.proving.sass.program import Program
from kaleido_kernels.proving.sass.rounds import copy_order, count_kinds, path_counts
from kaleido_kernels.proving.verdicts import largest_loop
from kaleido_kernels.shapes import RESTART
from kaleido_kernels.stream.plan import StreamLayout, stream_layout
from kaleido_kernels.tile import Tile
from kaleido_kernels.wide.plan import WideTile

N_CHAINS, N_STEPS = 100_000, 300


def estimate_job(job: Job, evidence: Evidence, loop: dict[str, int]) -> Estimate:
    """The cost model's time for 100,000 chains x 300 steps in one launch, from what the machine code shows.

    That is instruction counts, resources, and the order of copies and products (`read_overlap`).
    """
    if job.kernel == "onchip":  # played step by step, from its sizes alone
        return onchip_estimate(job.shape, cast("OnchipTile", job.tile), job.precision, N_CHAINS, N_STEPS)
    if job.kernel not in WORK:
        raise ValueError(f"kernel {job.kernel!r}: of its time the machine code shows too little for an estimate")
    return estimate(WORK[job.kernel](job, job.tile, evidence, loop), N_CHAINS, N_STEPS)


def programs(evidence: Evidence) -> int:
    """How many programs of a kernel a multiprocessor holds at once."""
    return resident_programs(evidence.shared, evidence.registers, evidence.warps, FACTS["sm_90"].shared_memory)


def read_overlap(program: Program, planned: Overlap) -> Overlap:
    """What hides the copies of the largest loop of products, from machine code.

    ``planned`` fills in what is not there to be read: how far the copy engine runs ahead, or all of it.
    """
    loop = largest_loop(program)
    order = copy_order(program, loop) if loop else None
    if order is None:
        return planned
    return Overlap(planned.ahead if order.ahead is None else order.ahead, order.products, order.other)


def narrow_estimate(job: Job, tile: Tile, evidence: Evidence, loop: dict[str, int]) -> TileWork:
    """Narrow's work: its loop is a step."""
    bias_rows = 16 if narrow_layout(job.shape).bias == "mma" else 0
    sizes = (tile.block_chains, tile.num_warps)
    return narrow_work(job.shape, *sizes, job.precision, loop, bias_rows=bias_rows, programs=programs(evidence))


def wide_estimate(job: Job, tile: WideTile, evidence: Evidence, loop: dict[str, int]) -> TileWork:
    """Wide's work: products, and what is around them."""
    overlap = read_overlap(evidence.program, wide_overlap(job.precision, tile.stages))
    return wide_work(job.shape, tile, job.precision, overlap=overlap, **wide_counts(evidence.program))


def stream_estimate(job: Job, tile: Tile, evidence: Evidence, loop: dict[str, int]) -> TileWork:
    """Stream's work: the loop's rounds of a step, and with jitter what a step does around the loop as well."""
    layout, program = stream_layout(job.shape), evidence.program
    jittered = job.jitter not in ("none", RESTART)  # of a flow the draws alone leave the loop, too
    return stream_work(
        job.shape,
        tile.block_chains,
        tile.num_warps,
        job.precision,
        stream_counts(program, layout, job.shape.dim, jittered),
        n_tiles=layout.n_tiles,
        programs=programs(evidence),
        overlap=read_overlap(program, stream_overlap(tile.num_stages)),
        starts=int(jittered),  # with jitter the loop begins anew in every step
    )


def stream_counts(program: Program, layout: StreamLayout, dim: int, jittered: bool) -> Counter[str]:
    """Instructions that a warp issues in a step. Without jitter the flat loop does all of a step but at draws.

    With it the loop ends with every step, and loops over the states' columns, ``layout.edge`` at once, follow.
    """
    loop = largest_loop(program)
    if loop is None:
        return Counter()
    step = step_counts(*path_counts(program, loop), layout.n_tiles, layout.last_tiles)
    if not jittered:
        return step
    around = [other for other in program.loops if loop.blocks < other.blocks]
    outer = min(around, key=lambda other: len(other.blocks), default=loop)
    rest = count_kinds(program.inside(outer)) - count_kinds(program.inside(loop))
    for columns in program.loops:
        if columns.blocks < outer.blocks and not columns.blocks & loop.blocks:
            for kind, number in count_kinds(program.inside(columns)).items():
                rest[kind] += number * (-(-dim // layout.edge) - 1)
    return step + rest


def wide_counts(program: Program) -> dict[str, float]:
    """Instructions around the products of a tile of outputs, and in a block of the pass over the state."""
    counts: dict[str, float] = {}
    tensor = program.tensor_loops
    around = [loop for loop in program.loops if any(inner.blocks < loop.blocks for inner in tensor)]
    if tensor and around:
        smallest = min(around, key=lambda loop: len(loop.blocks))
        held = next(inner for inner in tensor if inner.blocks < smallest.blocks)
        counts["epilogue"] = sum(1 for _ in program.inside(smallest)) - sum(1 for _ in program.inside(held))
    bound_loops = [
        sum(1 for _ in program.inside(loop))
        for loop in program.loops
        if not any(loop.blocks & inner.blocks for inner in tensor)
        and any(item.kind == "MUFU" for item in program.inside(loop))
        and any(item.kind == "LDG" for item in program.inside(loop))
    ]
    if bound_loops:
        counts["state_block"] = max(bound_loops)
    return counts


WORK: dict[str, Callable[[Job, Any, Evidence, dict[str, int]], TileWork]] = {
    "narrow": narrow_estimate,
    "stream": stream_estimate,
    "wide": wide_estimate,
}
"""Work by kernel. The graph path's is the library's: its fused kernel alone has no estimate."""
