"""Which tiles are worth timing on a GPU: plain Python, no torch, no Triton.

Where `tiles.candidates` lists what the plan takes without a measurement, this lists what a measurement may find better,
without what the plan's own estimate says is far behind.
"""

from __future__ import annotations

from kaleido_kernels.choice import AnyTile, candidates, kernel_of, refusal, register_estimate
from kaleido_kernels.graph.plan import GraphTile, graph_candidates
from kaleido_kernels.narrow.plan import narrow_layout, narrow_shared
from kaleido_kernels.proving.roofline.gpu import PEAK_FLOPS, resident_programs
from kaleido_kernels.proving.roofline.model import TileWork, estimate
from kaleido_kernels.proving.roofline.work import narrow_work, stream_overlap, stream_work, wide_work
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.stream.plan import stream_layout, stream_shared
from kaleido_kernels.tile import GpuFacts, Tile
from kaleido_kernels.wide.plan import WideTile

SLOWER_THAN_KIN = 1.6
"""A tile is left out if the estimate puts it this far behind the best of its kernel, where the model compares well."""
SLOWER_THAN_ALL = 4.0
"""... or this far behind the best of all kernels, between which it compares badly."""
LIBRARY_SHARE = 0.6
"""Assumed share of the matrix peak that the library's products reach."""
LAUNCH_SECONDS = 2.5e-6
"""Assumed time from one kernel of a CUDA graph to the next: what a chain of small products waits for."""
PLAIN_FLOPS = 60e12
"""Assumed rate of fp32 products on the ordinary units of a data-centre GPU."""
STREAM_INSTRUCTIONS = {1: 200, 2: 490}
"""What a warp issues for a weight tile in 16 bits, by halves of a layer: compiled deep128, digits, 16 chains a warp."""


def trial_tiles(shape: NetShape, precision: str, facts: GpuFacts) -> list[AnyTile]:
    """Tiles to time for ``shape``; the plan's own choice comes first. ``precision`` is a device precision."""
    plausible = [*candidates(shape, precision, facts), *_variants(shape, precision, facts)]
    tiles = [tile for tile in dict.fromkeys(plausible) if refusal(shape, precision, tile, facts) is None]
    expected = {tile: expected_milliseconds(shape, precision, tile, facts) for tile in tiles}
    best = min(expected.values(), default=0.0)
    kin: dict[str, float] = {}
    for tile, time in expected.items():
        kin[kernel_of(tile)] = min(time, kin.get(kernel_of(tile), time))
    return [
        tile
        for place, tile in enumerate(tiles)
        if place == 0
        or (expected[tile] <= SLOWER_THAN_KIN * kin[kernel_of(tile)] and expected[tile] <= SLOWER_THAN_ALL * best)
    ]


def _variants(shape: NetShape, precision: str, facts: GpuFacts) -> list[AnyTile]:
    """Other splits of the same work: more or fewer chains, warps and loads in flight."""
    found: list[AnyTile] = []
    if precision != "ieee":
        found += [Tile("narrow", chains, warps) for chains, warps in ((128, 8), (128, 4), (32, 1))]
        found += [Tile("stream", *rest) for rest in ((128, 8, 3), (64, 4, 3), (128, 4, 2))]
        inner = 64 if precision in ("fp16", "bf16", "fp16x3") else 32
        if facts.uses_tma:
            # One load more in flight than the plan's tiles. In split fp32 only half as long a sum fits four times: its
            # two stages hide a load behind one of three products, these behind more than two rounds.
            short = 32 if precision == "fp16x3" else inner
            found += [WideTile(128, 256, last, short, 8, 4) for last in (256, 128, 64)]
            found += [WideTile(128, 128, last, inner, 8, 4) for last in (128, 64)]
            found += [WideTile(64, 256, 128, inner, 8, 4), WideTile(64, 128, 64, inner, 4, 4)]
        else:
            found += [WideTile(128, 128, 64, inner, 8, 3, use_tma=False)]
    return [*found, *graph_candidates(shape, precision, facts.graph_block)]


def expected_milliseconds(
    shape: NetShape, precision: str, tile: AnyTile, facts: GpuFacts, n_chains: int = 100_000, n_steps: int = 300
) -> float:
    """The middle of the estimate from sizes alone, not compiled: good for order, not for truth (see `roofline`)."""
    if isinstance(tile, GraphTile):
        rate = PLAIN_FLOPS if precision in ("ieee", "fp16x3") else LIBRARY_SHARE * PEAK_FLOPS
        blocks = -(-n_chains // tile.block_chains)
        step = shape.flops_per_step * tile.block_chains / rate + (shape.n_layers + 1) * LAUNCH_SECONDS
        return 1e3 * step * blocks * n_steps
    return estimate(_work(shape, precision, tile, facts), n_chains, n_steps).milliseconds


def _work(shape: NetShape, precision: str, tile: Tile | WideTile, facts: GpuFacts) -> TileWork:
    if isinstance(tile, WideTile):
        return wide_work(shape, tile, precision)
    registers = register_estimate(shape, precision, tile)
    if tile.kernel == "narrow":
        bias_rows = 16 if narrow_layout(shape).bias == "mma" else 0
        shared = narrow_shared(shape, precision, tile)
        programs = resident_programs(shared, registers, tile.num_warps, facts.shared_memory)
        return narrow_work(
            shape, tile.block_chains, tile.num_warps, precision, {}, bias_rows=bias_rows, programs=programs
        )
    layout = stream_layout(shape)
    a_tile = STREAM_INSTRUCTIONS[layout.width // layout.tile] * tile.block_chains / tile.num_warps / 16
    shared = stream_shared(shape, precision, tile)
    return stream_work(
        shape,
        tile.block_chains,
        tile.num_warps,
        precision,
        {"all": layout.n_tiles * a_tile * (2 if precision == "fp16x3" else 1)},
        n_tiles=layout.n_tiles,
        programs=resident_programs(shared, registers, tile.num_warps, facts.shared_memory),
        overlap=stream_overlap(tile.num_stages),
    )
