"""Which kernel with which tile, and why not another: plain Python, no torch, no Triton.

A tile is refused before a launch if its shared memory or its registers do not fit; compilation would not complain. The
estimates were fitted to compiled kernels (sm_90); `kaleido_kernels.inspect` shows what a configuration really takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kaleido_kernels.kernels import Plan, plan
from kaleido_kernels.precision import in_words, usual_precision
from kaleido_kernels.shapes import KERNELS, NetShape
from kaleido_kernels.tile import AnyTile, GpuFacts
from kaleido_kernels.tuned import tile_from_json, tuned_key


def refusal(shape: NetShape, precision: str, tile: AnyTile, facts: GpuFacts) -> str | None:
    """Why a tile cannot run ``shape`` on a GPU: limit and need; None if it can. ``precision`` is a device precision."""
    return plan(tile.kernel).refusal(shape, precision, tile, facts)


def candidates(shape: NetShape, precision: str, facts: GpuFacts) -> Sequence[AnyTile]:
    """Tiles worth considering, best first; `refusal` says which of them cannot run."""
    ready = [kernel for kernel in _by_default() if kernel.yields(shape, precision) is None]
    return [tile for kernel in ready for tile in kernel.candidates(shape, precision, facts)]


def _by_default() -> list[Plan]:
    return [kernel for kernel in map(plan, KERNELS) if kernel.BY_DEFAULT]


@dataclass(frozen=True)
class Choice:
    """The tile for a launch, and for each better one before it why it was refused.

    Args:
        tile: kernel and sizes.
        refused: why better ones were not taken.
        tuned: whether it was measured best on this GPU.
        forced: whether its kernel was asked for by name.
        given: whether just this tile was asked for.
    """

    tile: AnyTile
    refused: tuple[str, ...] = ()
    tuned: bool = False
    forced: bool = False
    given: bool = False

    @property
    def kernel(self) -> str:
        """Name of the tile's kernel, one of `kaleido_kernels.shapes.KERNELS`."""
        return self.tile.kernel

    def explain(self) -> str:
        """The choice in one line."""
        if self.given:
            return f"{self.tile.name}, asked for"
        how = "measured best on this GPU" if self.tuned else "first that fits"
        how = f"asked for by name, {how}" if self.forced else how
        return f"{self.tile.name}, {how}" + "".join(f"; not {reason}" for reason in self.refused)

    def scratch_bytes(self, shape: NetShape, precision: str, n_programs: int) -> int:
        """Bytes that the kernel needs besides weights and states; ``n_programs`` as in `make_launcher`."""
        return plan(self.kernel).scratch_bytes(shape, usual_precision(precision), self.tile, n_programs)


def choose(
    shape: NetShape,
    precision: str,
    facts: GpuFacts,
    tuned: dict[str, Any] | None = None,
    kernel: str = "auto",
) -> Choice:
    """The kernel and tile for a launch: the tuned one if there is one and it fits, else the first candidate that fits.

    The number of chains does not matter: kernels round differently, and a chain's bits must not depend on its company.

    Args:
        shape: the network.
        precision: a device precision, or one asked for of weights of the usual range.
        facts: the GPU.
        tuned: what `kaleido_kernels.tuned.read_tuned` returned.
        kernel: one of `kaleido_kernels.shapes.KERNELS` by name, or "auto" for any.

    Raises:
        ValueError: a GPU too old for the precision, or no tile fits: the limit and the need.
    """
    form = usual_precision(precision)
    _check_capability(form, facts)
    measured = (tuned or {}).get(tuned_key(shape, form))
    if measured is not None:
        tile = tile_from_json(measured)
        if kernel in ("auto", tile.kernel) and refusal(shape, form, tile, facts) is None:
            return Choice(tile, tuned=True, forced=kernel != "auto")
    refused: list[str] = []
    if kernel != "auto" and not plan(kernel).candidates(shape, form, facts):
        raise ValueError(f"kernel {kernel!r} does not compute {in_words(form)}: leave kernel out")
    for possible in _by_default() if kernel == "auto" else [plan(kernel)]:
        yields = possible.yields(shape, form) if kernel == "auto" else None
        if yields is not None:
            refused.append(yields)
            continue
        for tile in possible.candidates(shape, form, facts):
            reason = refusal(shape, form, tile, facts)
            if reason is None:
                return Choice(tile, tuple(dict.fromkeys(refused)), forced=kernel != "auto")
            refused.append(reason)
    what = "no tile" if kernel == "auto" else f"no tile of kernel {kernel!r}"
    raise ValueError(
        f"{what} fits this GPU for {shape.widths} in {in_words(form)}: " + "; ".join(dict.fromkeys(refused))
    )


def force(shape: NetShape, precision: str, facts: GpuFacts, tile: AnyTile) -> Choice:
    """A choice of just this tile, whatever is tuned or comes first.

    Raises:
        ValueError: it cannot run there: the limit and the need.
    """
    form = usual_precision(precision)
    _check_capability(form, facts)
    reason = refusal(shape, form, tile, facts)
    if reason is not None:
        raise ValueError(reason)
    return Choice(tile, given=True)


def _check_capability(precision: str, facts: GpuFacts) -> None:
    """Refuse a device precision whose products the GPU does not have: `ValueError`."""
    if precision != "ieee" and facts.capability < (8, 0):
        raise ValueError(
            f"precision {in_words(precision)!r} needs compute capability 8.0, the GPU has {facts.capability[0]}."
            f"{facts.capability[1]}: use engine='cpu' or another GPU"
        )
