"""Which loops run a precision on this processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kaleido_fast.engines.loops.arrays import Layers, Tile
from kaleido_fast.engines.loops.compiling import IS_COMPILED
from kaleido_fast.engines.loops.packing import make_tile, pack_layers
from kaleido_fast.engines.loops.processor import HAS_BF16, LANES
from kaleido_fast.engines.loops.steps import advance_rows, fuses
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP, ModelSpec
from kaleido_fast.planning.plan import NOT_COMPILED

__all__ = ["HAS_BF16", "IS_COMPILED", "Loops", "fuses", "loops_for"]


@dataclass(frozen=True)
class Loops:
    """One way to compute a network.

    Args:
        pack: a model's weights as its loops read them.
        make_tile: one thread's buffers for tiles of so many chains.
        advance: the entry, see `kaleido_fast.engines.loops.steps.advance_rows`.
    """

    pack: Callable[[KaleidoMLP], Layers]
    make_tile: Callable[[ModelSpec, int], Tile]
    advance: Callable[..., None]
    lanes: int = LANES  # tiles are multiples of it


def _dense(precision: str) -> Loops:
    def pack(model: KaleidoMLP) -> Layers:
        return pack_layers(model, precision)

    def buffers(spec: ModelSpec, chains: int) -> Tile:
        return make_tile(spec, chains, precision)

    return Loops(pack, buffers, advance_rows)


def loops_for(precision: str) -> Loops:
    """The loops that compute a precision here.

    Raises:
        InputError: there are none, or numba compiles nothing in this process (NUMBA_DISABLE_JIT).
    """
    if not IS_COMPILED:
        raise InputError(f"engine 'cpu' cannot run: {NOT_COMPILED}")
    if precision not in ("fp32", "bf16") or (precision == "bf16" and not HAS_BF16):
        raise InputError(
            f"engine 'cpu' has no {precision} on this processor: use precision='fp32' or engine='reference'"
        )
    return _dense(precision)
