"""Which tiles are worth timing on a GPU: plain Python, no torch, no Triton.

Where `choice.candidates` lists what the plan takes without a measurement, this lists what a measurement may find
better, without what the plan's own estimate says is far behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kaleido_kernels.choice import candidates, refusal
from kaleido_kernels.graph.plan import GraphTile
from kaleido_kernels.kernels import plan
from kaleido_kernels.narrow import plan as narrow
from kaleido_kernels.onchip.plan import OnchipTile
from kaleido_kernels.proving.roofline.gpu import PEAK_FLOPS, resident_programs
from kaleido_kernels.proving.roofline.model import estimate
from kaleido_kernels.proving.roofline.onchip import onchip_estimate
from kaleido_kernels.proving.roofline.work import narrow_work, stream_overlap, stream_work, wide_work
from kaleido_kernels.shapes import KERNELS, NetShape
from kaleido_kernels.stream import plan as stream
from kaleido_kernels.tile import AnyTile, GpuFacts, Tile
from kaleido_kernels.wide.plan import WideTile

N_CHAINS, N_STEPS = 100_000, 300
"""Size of the run that is estimated where no other is given."""
SLOWER_THAN_KIN = 1.6
"""A tile is left out if the estimate puts it this far behind the best of its kernel, where the model compares well."""
SLOWER_THAN_ALL = 2.0
"""... or this far behind the best of all kernels: what an H200 measured was 0.9 to 1.4 times the estimate."""
LIBRARY_SHARE = 0.6
"""Assumed share of the matrix peak that the library's products reach."""
LAUNCH_SECONDS = 2.5e-6
"""Assumed time from one kernel of a CUDA graph to the next: what a chain of small products waits for."""
PLAIN_FLOPS = 60e12
"""Assumed rate of fp32 products on the ordinary units of a data-centre GPU."""
STREAM_INSTRUCTIONS = {1: 180, 2: 380}
"""What a warp issues for a weight tile in 16 bits, by halves of a layer: compiled deep128, digits, 16 chains a warp."""


def trial_tiles(shape: NetShape, precision: str, facts: GpuFacts) -> list[AnyTile]:
    """Tiles to time for ``shape``; the plan's own choice comes first. ``precision`` is a device precision."""
    others = [tile for kernel in KERNELS for tile in plan(kernel).trials(shape, precision, facts)]
    plausible = dict.fromkeys([*candidates(shape, precision, facts), *others])
    tiles = [tile for tile in plausible if refusal(shape, precision, tile, facts) is None]
    expected = {tile: expected_milliseconds(shape, precision, tile, facts) for tile in tiles if tile.kernel in EXPECTED}
    best = min(expected.values(), default=0.0)
    kin: dict[str, float] = {}
    for tile, time in expected.items():
        kin[tile.kernel] = min(time, kin.get(tile.kernel, time))
    return [
        tile
        for place, tile in enumerate(tiles)
        if place == 0
        or tile not in expected
        or (expected[tile] <= SLOWER_THAN_KIN * kin[tile.kernel] and expected[tile] <= SLOWER_THAN_ALL * best)
    ]


def expected_milliseconds(
    shape: NetShape,
    precision: str,
    tile: AnyTile,
    facts: GpuFacts,
    *,
    n_chains: int = N_CHAINS,
    n_steps: int = N_STEPS,
) -> float:
    """The middle of the estimate from sizes alone, not compiled: good for order, not for truth (see `roofline`).

    It is for one launch of ``n_chains`` and ``n_steps``, and knows the kernels of `EXPECTED` alone.
    """
    return EXPECTED[tile.kernel](shape, precision, tile, facts, n_chains, n_steps)


def _narrow(shape: NetShape, precision: str, tile: Tile, facts: GpuFacts, n_chains: int, n_steps: int) -> float:
    registers = narrow.register_estimate(shape, precision, tile)
    bias_rows = 16 if narrow.narrow_layout(shape).bias == "mma" else 0
    shared = narrow.narrow_shared(shape, precision, tile)
    programs = resident_programs(shared, registers, tile.num_warps, facts.shared_memory)
    sizes = (tile.block_chains, tile.num_warps)
    work = narrow_work(shape, *sizes, precision, {}, bias_rows=bias_rows, programs=programs)
    return estimate(work, n_chains, n_steps).milliseconds


def _stream(shape: NetShape, precision: str, tile: Tile, facts: GpuFacts, n_chains: int, n_steps: int) -> float:
    layout, registers = stream.stream_layout(shape), stream.register_estimate(shape, precision, tile)
    a_tile = STREAM_INSTRUCTIONS[layout.width // layout.tile] * tile.block_chains / tile.num_warps / 16
    shared = stream.stream_shared(shape, precision, tile)
    work = stream_work(
        shape,
        tile.block_chains,
        tile.num_warps,
        precision,
        {"all": layout.n_tiles * a_tile * (2 if precision == "fp16x3" else 1)},
        n_tiles=layout.n_tiles,
        programs=resident_programs(shared, registers, tile.num_warps, facts.shared_memory),
        overlap=stream_overlap(tile.num_stages),
    )
    return estimate(work, n_chains, n_steps).milliseconds


def _onchip(shape: NetShape, precision: str, tile: OnchipTile, facts: GpuFacts, n_chains: int, n_steps: int) -> float:
    return onchip_estimate(shape, tile, precision, n_chains, n_steps).milliseconds


def _wide(shape: NetShape, precision: str, tile: WideTile, facts: GpuFacts, n_chains: int, n_steps: int) -> float:
    return estimate(wide_work(shape, tile, precision), n_chains, n_steps).milliseconds


def _graph(shape: NetShape, precision: str, tile: GraphTile, facts: GpuFacts, n_chains: int, n_steps: int) -> float:
    rate = PLAIN_FLOPS if precision in ("ieee", "fp16x3") else LIBRARY_SHARE * PEAK_FLOPS
    chains = min(n_chains, tile.block_chains)
    blocks = -(-n_chains // tile.block_chains)
    step = shape.flops_per_step * chains / rate + (shape.n_layers + 1) * LAUNCH_SECONDS
    return 1e3 * step * blocks * n_steps


EXPECTED: dict[str, Callable[[NetShape, str, Any, GpuFacts, int, int], float]] = {
    "narrow": _narrow,
    "onchip": _onchip,
    "stream": _stream,
    "wide": _wide,
    "graph": _graph,
}
"""Milliseconds by kernel. All fitting tiles of a kernel that is not here are worth timing."""
