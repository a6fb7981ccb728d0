"""The kernels by name: what each answers for itself. Device code is imported here alone, and when it is asked for.

A kernel is a folder of this package named in `kaleido_kernels.shapes.KERNELS`. Its ``plan.py`` is a `Plan`, plain
Python; its ``kernel.py`` is `DeviceCode`, which imports torch and Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from kaleido_kernels.shapes import NetShape
from kaleido_kernels.tile import AnyTile, GpuFacts

if TYPE_CHECKING:
    import torch

    from kaleido_kernels.arguments import LaunchKind
    from kaleido_kernels.launch import LaunchRequest, Outputs
    from kaleido_kernels.packing import Layers
    from kaleido_kernels.variant import Variant

    Launcher = Callable[[LaunchRequest, Outputs], None]


class Plan(Protocol):
    """What is known of a kernel without compiling it. ``precision`` is a device precision throughout.

    Attributes:
        BY_DEFAULT: whether it is chosen where none is asked for by name and none was measured.
        TAKES_CHECKS: whether its launches look at chains themselves.
        VERDICTS: what its machine code must satisfy besides what all must: see `kaleido_kernels.proving.verdicts`. Of
            "loads ahead", how many are promised is told by an attribute ``loads_ahead`` of its tiles.
    """

    BY_DEFAULT: bool
    TAKES_CHECKS: bool
    VERDICTS: tuple[str, ...]

    def tile_of(self, **fields: Any) -> AnyTile:
        """The tile of a tuned table's values; raises TypeError or ValueError for what no tile has."""

    def candidates(self, shape: NetShape, precision: str, facts: GpuFacts) -> Sequence[AnyTile]:
        """Tiles to choose from, best first; empty where the kernel does not compute this."""

    def yields(self, shape: NetShape, precision: str) -> str | None:
        """Why another kernel shall run ``shape`` unless this one is asked for by name; None if it may come first."""

    def trials(self, shape: NetShape, precision: str, facts: GpuFacts) -> Sequence[AnyTile]:
        """Other tiles that a measurement may find better."""

    def refusal(self, shape: NetShape, precision: str, tile: Any, facts: GpuFacts) -> str | None:
        """Why one of its tiles cannot run ``shape`` on a GPU: limit and need; None if it can."""

    def scratch_bytes(self, shape: NetShape, precision: str, tile: Any, n_programs: int) -> int:
        """Bytes of memory besides weights and states; ``n_programs`` as in `make_launcher`."""


class DeviceCode(Protocol):
    """What compiles and launches a kernel."""

    def launcher(
        self,
        layers: Layers,
        shape: NetShape,
        tile: Any,
        precision: str,
        device: torch.device,
        *,
        n_programs: int,
        capture: bool,
    ) -> Launcher:
        """See `make_launcher`."""

    def variant(
        self, shape: NetShape, precision: str, tile: Any, kind: LaunchKind = ..., use_asm: bool = True
    ) -> Variant:
        """What a launch of this kind compiles; ``precision`` is a device precision, or one asked for."""


@functools.cache
def plan(kernel: str) -> Plan:
    """The plan of a kernel, by a name of `kaleido_kernels.shapes.KERNELS`."""
    return cast("Plan", import_module(f"kaleido_kernels.{kernel}.plan"))


@functools.cache
def device_code(kernel: str) -> DeviceCode:
    """The device code of a kernel: imports Triton."""
    return cast("DeviceCode", import_module(f"kaleido_kernels.{kernel}.kernel"))


def make_launcher(
    tile: AnyTile,
    layers: Layers,
    shape: NetShape,
    precision: str,
    device: torch.device,
    *,
    n_programs: int,
    capture: bool = False,
) -> Launcher:
    """Pack a network for the tile's kernel. Two launches at a time need two launchers: they may share scratch memory.

    Args:
        tile: decides the kernel.
        layers, shape: the network.
        precision: a device precision, or one asked for.
        device: where the weights go and launches run.
        n_programs: programs of the kernels that stay on their multiprocessors, onchip and wide.
        capture: whether the graph path captures its step in a CUDA graph.

    Raises:
        ValueError: weights that do not fit the shape, the precision or the kernel.
    """
    code = device_code(tile.kernel)
    return code.launcher(layers, shape, tile, precision, device, n_programs=n_programs, capture=capture)
