"""What a step should cost: cycles by unit from tile sizes and instruction counts. A model, not a measurement.

No number here was timed by this package. The rates are published or derived figures of one GPU class; the pieces are

- tensor: padded products over the measured dense fp16 rate (tf32 at half of it, three products for split fp32);
- l2: bytes between L2 and one SM over its share of the nominal bandwidth (the least certain figure: 5.5 to 8 TB/s);
- issue, alu, mufu: instructions over four warp schedulers, half-rate integer and conversion units, and 16 special
  function lanes a clock;
- hbm: the part of the working set that does not fit L2, once in and once out a step;
- serial: pipeline fill and drain that nothing hides, added to the longest of the units above.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from kaleido_kernels.shapes import NetShape, next_power_of_two
from kaleido_kernels.wide_plan import (
    STATE_COLS,
    WideTile,
    padded_products,
    scratch_bytes,
    state_width,
    step_bytes,
    wide_layers,
)

NOTE = "model, not a measurement"
FILL_CYCLES = 800
"""Assumed latency from the first load of a tile to its first product."""
ALU_KINDS = ("FMNMX", "F2FP", "PRMT", "LOP3", "ISETP", "FSETP", "SHF", "SEL", "FSEL", "IADD3", "LEA")
PRECISION_BYTES = {"fp32": 4, "ieee": 4, "fp16x3": 4, "tf32": 4, "fp16": 2, "bf16": 2}
"""Bytes of one operand value: split fp32 holds two fp16 values."""


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU. Bandwidths in bytes/s, ``tensor_flops`` in dense fp16 FLOP/s as measured on large products."""

    name: str = "H200"
    n_sm: int = 132
    clock: float = 1.755e9
    tensor_flops: float = 790e12
    l2_bandwidth: float = 7.5e12
    l2_capacity: float = 60e6
    hbm_bandwidth: float = 4.8e12
    mufu_lanes: int = 16
    alu_lanes: int = 64
    fma_lanes: int = 128
    schedulers: int = 4

    @property
    def fma_per_cycle(self) -> float:
        """fp16 tensor multiply-adds a clock and SM at the measured rate."""
        return self.tensor_flops / 2 / self.n_sm / self.clock

    @property
    def l2_per_cycle(self) -> float:
        """Bytes a clock and SM from L2."""
        return self.l2_bandwidth / self.n_sm / self.clock


@dataclass(frozen=True)
class TileWork:
    """What one tile of chains costs in one step.

    Args:
        chains: rows of the tile.
        exact_fma: multiply-adds of the network without padding, for one chain.
        tensor_fma: multiply-adds issued for the tile, padded, each counted at the fp16 rate (tf32 counts twice).
        scalar_fma: multiply-adds on the ordinary units (IEEE fp32 products).
        l2_bytes: bytes between L2 and the SM.
        resident_bytes: bytes a program keeps in global memory between steps (wide's scratch); 0 for the others.
        instructions, alu, mufu: warp instructions issued, those of the half-rate units, those of the special units.
        serial: cycles of fill and drain that are not hidden.
    """

    chains: int
    exact_fma: int
    tensor_fma: float
    scalar_fma: float = 0.0
    l2_bytes: float = 0.0
    resident_bytes: float = 0.0
    instructions: float = 0.0
    alu: float = 0.0
    mufu: float = 0.0
    serial: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """Cycles of one tile-step by unit, the longest of them, and the time that follows."""

    cycles: dict[str, float]
    limit: str
    milliseconds: float
    peak_share: float
    l2_bytes: float
    tile_rounds: int

    def to_json(self) -> dict[str, object]:
        return {
            "note": NOTE,
            "cycles_per_tile_step": {unit: round(value, 1) for unit, value in self.cycles.items()},
            "limit": self.limit,
            "milliseconds": round(self.milliseconds, 4),
            "share_of_tensor_peak": round(self.peak_share, 4),
            "l2_bytes_per_tile_step": round(self.l2_bytes),
            "tile_rounds": self.tile_rounds,
        }


def estimate(work: TileWork, n_chains: int, n_steps: int, gpu: Gpu | None = None) -> Estimate:
    """Predicted time of ``n_chains`` x ``n_steps``: the longest unit plus the serial part, in whole rounds of tiles."""
    gpu = gpu or Gpu()
    cycles = unit_cycles(work, gpu)
    limit = max((unit for unit in cycles if unit != "serial"), key=cycles.__getitem__)
    rounds = -(-n_chains // (work.chains * gpu.n_sm))
    seconds = (cycles[limit] + cycles["serial"]) * rounds * n_steps / gpu.clock
    ideal = 2.0 * work.exact_fma * n_chains * n_steps / gpu.tensor_flops
    return Estimate(cycles, limit, 1e3 * seconds, ideal / seconds if seconds else 0.0, work.l2_bytes, rounds)


def unit_cycles(work: TileWork, gpu: Gpu) -> dict[str, float]:
    """Cycles that each unit of one SM is busy with one tile-step."""
    overflow = max(0.0, work.resident_bytes * gpu.n_sm - gpu.l2_capacity) / gpu.n_sm
    return {
        "tensor": work.tensor_fma / gpu.fma_per_cycle,
        "fma": work.scalar_fma / gpu.fma_lanes,
        "l2": work.l2_bytes / gpu.l2_per_cycle,
        "hbm": 2 * overflow / (gpu.hbm_bandwidth / gpu.n_sm / gpu.clock),
        "issue": work.instructions / gpu.schedulers,
        "alu": work.alu * 32 / gpu.alu_lanes,
        "mufu": work.mufu * 32 / gpu.mufu_lanes,
        "serial": work.serial,
    }


def exact_fma(widths: tuple[int, ...]) -> int:
    """Multiply-adds of one step of one chain, without padding."""
    return sum(a * b for a, b in pairwise(widths))


def tensor_factor(precision: str) -> float:
    """fp16-rate multiply-adds spent for one product: 3 for split fp32, 2 for tf32 (half rate)."""
    return {"fp32": 3.0, "fp16x3": 3.0, "tf32": 2.0, "ieee": 0.0}.get(precision, 1.0)


def counted_work(counts: Mapping[str, float], n_warps: int) -> dict[str, float]:
    """``instructions``, ``alu`` and ``mufu`` of a tile-step from the instructions that one warp issues in a step.

    ``counts`` holds instructions by kind, with their sum under "all".
    """
    return {
        "instructions": counts.get("all", 0) * n_warps,
        "alu": sum(counts.get(kind, 0) for kind in ALU_KINDS) * n_warps,
        "mufu": counts.get("MUFU", 0) * n_warps,
    }


def step_counts(common: Mapping[str, float], rare: Mapping[str, float], rounds: int, rare_rounds: int) -> Counter[str]:
    """Instructions of a step that takes ``rounds`` rounds of a loop, ``rare_rounds`` of them the rare way."""
    total: Counter[str] = Counter()
    for kind in {*common, *rare}:
        total[kind] = int(common.get(kind, 0) * (rounds - rare_rounds) + rare.get(kind, 0) * rare_rounds)
    return total


def narrow_work(
    shape: NetShape, rows: int, n_warps: int, precision: str, counts: Mapping[str, float], *, bias_rows: int = 0
) -> TileWork:
    """A step of the narrow kernel. ``bias_rows``: extra inner rows a layer of a bias added by a product of its own."""
    width, edge = next_power_of_two(max(shape.hidden, 1)), next_power_of_two(shape.dim)
    sides = [edge, *[width] * (shape.n_layers - 1), edge]
    products = sum(a * b * tensor_factor(precision) + bias_rows * b for a, b in pairwise(sides))
    scalar = rows * exact_fma(shape.widths) if precision == "ieee" else 0.0
    tensor = 0.0 if precision == "ieee" else rows * products
    return TileWork(rows, exact_fma(shape.widths), tensor, scalar, **counted_work(counts, n_warps))


def stream_work(
    shape: NetShape, rows: int, n_warps: int, precision: str, counts: Mapping[str, float], *, n_tiles: int,
    programs: int,
) -> TileWork:  # fmt: skip
    """A step of the stream kernel: ``n_tiles`` rounds of its loop; ``programs`` fit one multiprocessor.

    With one program nothing covers the instructions between two products; with two each covers the other's.
    """
    width = next_power_of_two(max(shape.widths))
    tile = min(width, 128)
    issued = counted_work(counts, n_warps)
    serial = 0.0 if programs > 1 else issued["instructions"] / Gpu().schedulers
    weights = n_tiles * width * tile
    products = rows * weights * tensor_factor(precision)
    l2_bytes = weights * PRECISION_BYTES[precision]
    return TileWork(rows, exact_fma(shape.widths), products, 0.0, l2_bytes, **issued, serial=serial)


def wide_work(
    shape: NetShape, tile: WideTile, precision: str, *, epilogue: float = 520.0, state_block: float = 500.0
) -> TileWork:
    """A step of the wide kernel.

    Args:
        epilogue: instructions a warp issues for each finished tile of outputs.
        state_block: instructions a warp issues for each block of the pass over the state.
    """
    layers = wide_layers(shape, tile)
    col_tiles = sum(layer.col_tiles for layer in layers)
    blocks = state_width(shape, tile) // STATE_COLS
    drain = col_tiles * epilogue + blocks * state_block
    cycles = drain * tile.warps / Gpu().schedulers + (col_tiles + blocks) * FILL_CYCLES
    products = tile.rows * padded_products(shape, tile)
    scalar = products if precision == "ieee" else 0.0
    return TileWork(
        tile.rows,
        exact_fma(shape.widths),
        products * tensor_factor(precision),
        scalar,
        step_bytes(shape, tile, precision),
        scratch_bytes(shape, tile, precision),
        instructions=drain * tile.warps,
        serial=cycles,
    )
