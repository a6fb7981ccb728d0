"""Which loops run a precision on this processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kaleido_fast.engines.loops import packing
from kaleido_fast.engines.loops.arrays import Layers, Tile
from kaleido_fast.engines.loops.compiling import IS_COMPILED
from kaleido_fast.engines.loops.few import MOST_CHAINS
from kaleido_fast.engines.loops.processor import LANES, instruction_set, multiplies_pairs_fast, tiles_are_permitted
from kaleido_fast.engines.loops.steps import advance_by_tiles, advance_rows, fuses
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP, ModelSpec
from kaleido_fast.planning.cpu_tiles import EXTRA_CHAINS
from kaleido_fast.planning.plan import NOT_COMPILED

__all__ = ["IS_COMPILED", "LOOPS", "Loops", "arithmetic", "bf16_loops", "fuses", "instruction_set", "loops_for"]


@dataclass(frozen=True)
class Loops:
    """One way to compute a network.

    Args:
        about: it in a few words.
        pack: a model's weights as its loops read them.
        make_tile: one thread's buffers for tiles of so many chains.
        advance: the entry, see `kaleido_fast.engines.loops.steps.advance_rows`.
        speed: about how many times as fast as fp32 it is.
        lanes: chains of a tile are a multiple of it.
        extra: chains that take as long as what a tile costs besides its chains.
        few: up to so many chains are computed in less time than ``lanes``; 0 where they are not.
        shares: whether threads can share the layers of a tile.
    """

    about: str
    pack: Callable[[KaleidoMLP], Layers]
    make_tile: Callable[[ModelSpec, int], Tile]
    advance: Callable[..., None]
    speed: int = 1
    lanes: int = LANES
    few: int = MOST_CHAINS
    extra: int = EXTRA_CHAINS
    shares: bool = True


LOOPS = {
    "fp32": Loops("fp32", packing.pack_fp32, packing.make_fp32_tile, advance_rows),
    "tiles": Loops(
        "bf16 by AMX",
        packing.pack_tiles,
        packing.make_tiles_tile,
        advance_by_tiles,
        speed=8,
        few=0,
        extra=50,
        shares=False,
    ),
    "pairs": Loops("bf16 by AVX512-BF16", packing.pack_pairs, packing.make_pairs_tile, advance_rows, speed=2),
    "rounded": Loops("fp32 of operands in bf16", packing.pack_rounded, packing.make_rounded_tile, advance_rows),
}
"""By name. Of those in bf16 each sums in its own way: their last bits differ."""


def bf16_loops() -> str:
    """The name of the loops that compute bf16 here: the fastest that the processor has."""
    return "tiles" if tiles_are_permitted() else "pairs" if multiplies_pairs_fast() else "rounded"


def loops_for(precision: str) -> Loops:
    """The loops that compute a precision here.

    Raises:
        InputError: there are none, or numba compiles nothing in this process (NUMBA_DISABLE_JIT).
    """
    if not IS_COMPILED:
        raise InputError(f"engine 'cpu' cannot run: {NOT_COMPILED}")
    if precision not in ("fp32", "bf16"):
        raise InputError(f"engine 'cpu' has no {precision}: use precision='fp32' or engine='reference'")
    return LOOPS[bf16_loops() if precision == "bf16" else "fp32"]


def arithmetic(precision: str) -> str:
    """How sums of a precision differ from those of other processors; empty where they do not."""
    plain = "" if fuses() else "products are rounded before they are added (no fused multiply-add)"
    if precision != "bf16":
        return plain
    return ", ".join(filter(None, [loops_for(precision).about, plain]))
