"""From the work of a step to a range of times."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from kaleido_kernels.proving.roofline.gpu import (
    ALU_LANES,
    FAST,
    FMA_LANES,
    MUFU_LANES,
    NOTE,
    PEAK_FLOPS,
    SCHEDULERS,
    SLOW,
    Gpu,
)
from kaleido_kernels.proving.roofline.loops import Loop, Overlap, Reuse


@dataclass(frozen=True)
class TileWork:
    """What one tile of chains costs in one step.

    Args:
        chains: rows of the tile.
        exact_fma: multiply-adds of the network without padding, for one chain.
        tensor_fma: multiply-adds issued for the tile, padded, each counted at the fp16 rate (tf32 counts twice).
        scalar_fma: multiply-adds on the ordinary units (IEEE fp32 products).
        l2_bytes: bytes between L2 and the SM.
        instructions, alu, mufu: warp instructions issued, those of the half-rate units, those of the special units.
        loops: what a program does in loops, one after the other.
        serial: cycles of instructions outside of the loops.
        waits: how often outside of the loops a program waits for memory.
        drained: bytes outside of the loops that it waits for.
        reuses: what it needs again, and after how much else.
        programs: tiles that a multiprocessor works on at once.
    """

    chains: int
    exact_fma: int
    tensor_fma: float
    scalar_fma: float = 0.0
    l2_bytes: float = 0.0
    instructions: float = 0.0
    alu: float = 0.0
    mufu: float = 0.0
    loops: tuple[Loop, ...] = ()
    serial: float = 0.0
    waits: float = 0.0
    drained: float = 0.0
    reuses: tuple[Reuse, ...] = ()
    programs: int = 1


@dataclass(frozen=True)
class Bound:
    """One end of an estimate: cycles of one tile-step by unit under the assumptions ``gpu``, the longest, the time.

    ``milliseconds`` has the launches in it, ``launch_milliseconds`` says how much they are.
    """

    gpu: Gpu
    cycles: dict[str, float]
    limit: str
    milliseconds: float
    launch_milliseconds: float
    peak_share: float

    def to_json(self) -> dict[str, object]:
        return {
            "milliseconds": round(self.milliseconds, 4),
            "launch_milliseconds": round(self.launch_milliseconds, 4),
            "limit": self.limit,
            "share_of_tensor_peak": round(self.peak_share, 4),
            "cycles_per_tile_step": {unit: round(value, 1) for unit, value in self.cycles.items()},
            "assumed": asdict(self.gpu),
        }


@dataclass(frozen=True)
class Estimate:
    """A range of times: ``low`` under the assumptions `FAST`, ``high`` under `SLOW`.

    ``overlap`` is what hides the loads of the products; None for a kernel that loads none.
    """

    low: Bound
    high: Bound
    l2_bytes: float
    tile_rounds: int
    overlap: Overlap | None

    @property
    def milliseconds(self) -> float:
        """The middle of the range: for order and for arithmetic, no likelier than the rest."""
        return (self.low.milliseconds + self.high.milliseconds) / 2

    @property
    def limit(self) -> str:
        """The longest unit, at both ends where they differ."""
        return self.low.limit if self.low.limit == self.high.limit else f"{self.low.limit}/{self.high.limit}"

    def to_json(self) -> dict[str, object]:
        return {
            "note": NOTE,
            "milliseconds": round(self.milliseconds, 4),
            "low": self.low.to_json(),
            "high": self.high.to_json(),
            "overlap": asdict(self.overlap) if self.overlap else None,
            "l2_bytes_per_tile_step": round(self.l2_bytes),
            "tile_rounds": self.tile_rounds,
        }


def estimate(
    work: TileWork, n_chains: int, n_steps: int, n_launches: int = 1, fast: Gpu = FAST, slow: Gpu = SLOW
) -> Estimate:
    """Predicted time of ``n_chains`` x ``n_steps`` in ``n_launches`` launches, as a range, in whole rounds of tiles."""
    low, high = (_bound(work, n_chains, n_steps, n_launches, gpu) for gpu in (fast, slow))
    overlap = next((loop.overlap for loop in work.loops if loop.loaded), None)
    return Estimate(low, high, work.l2_bytes, _rounds(work, n_chains, fast), overlap)


def _rounds(work: TileWork, n_chains: int, gpu: Gpu) -> int:
    return -(-n_chains // (work.chains * gpu.n_sm))


def _bound(work: TileWork, n_chains: int, n_steps: int, n_launches: int, gpu: Gpu) -> Bound:
    rounds = _rounds(work, n_chains, gpu)
    cycles = unit_cycles(replace(work, programs=max(1, min(work.programs, rounds))), gpu)
    limit = max(cycles, key=cycles.__getitem__)
    launch = n_launches * gpu.launch_seconds
    seconds = cycles[limit] * rounds * n_steps / gpu.clock + launch
    ideal = 2.0 * work.exact_fma * n_chains * n_steps / PEAK_FLOPS
    return Bound(gpu, cycles, limit, 1e3 * seconds, 1e3 * launch, ideal / seconds if seconds else 0.0)


def unit_cycles(work: TileWork, gpu: Gpu) -> dict[str, float]:
    """Cycles that each unit of one SM is busy with one tile-step, and "chain": those between two tile-steps' ends.

    ``programs`` chains run side by side. One after the other they would take their sum; a unit that they share makes
    them wait for it, at most (``collisions``) once for each other program.
    """
    units = {
        "tensor": work.tensor_fma / gpu.fma_per_cycle,
        "fma": work.scalar_fma / FMA_LANES,
        "l2": work.l2_bytes / gpu.l2_per_cycle,
        "hbm": sum(reuse.missed(gpu) for reuse in work.reuses) / gpu.hbm_per_cycle,
        "issue": work.instructions / SCHEDULERS,
        "alu": work.alu * 32 / ALU_LANES,
        "mufu": work.mufu * 32 / MUFU_LANES,
    }
    others = (work.programs - 1) * gpu.collisions * max(units.values())
    return units | {"chain": (chain_cycles(work, gpu) + others) / work.programs}


def chain_cycles(work: TileWork, gpu: Gpu) -> float:
    """Cycles of a tile-step for a program that has a multiprocessor to itself."""
    outside = work.serial + work.waits * gpu.latency + work.drained / gpu.l2_per_cycle
    return sum(loop.cycles(gpu) for loop in work.loops) + outside
