"""What tiles of all kernels have, and what a choice knows of a GPU. Plain Python: no torch, no Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kaleido_kernels.shapes import NetShape

REGISTERS = 65_536
"""32-bit registers of a multiprocessor."""
MAX_REGISTERS = 255
"""Registers of a thread."""
LARGEST_BLOCK = 16_896
"""Most chains of a block of the graph path."""


class AnyTile(Protocol):
    """How one program of a kernel works. Tiles are frozen dataclasses; their fields are what a tuned table holds."""

    @property
    def kernel(self) -> str:
        """The kernel's name."""

    @property
    def chains(self) -> int:
        """Chains of a program."""

    @property
    def name(self) -> str:
        """The tile in a few words, for explanations."""

    @property
    def short_name(self) -> str:
        """Its sizes, for tables."""

    @property
    def use_tma(self) -> bool:
        """Whether loads go through the copy engine."""


@dataclass(frozen=True)
class Tile:
    """How one program of the narrow or the stream kernel works.

    Args:
        kernel: "narrow" or "stream".
        block_chains: chains of a program, 16 to 256.
        num_warps: warps of a program.
        num_stages: buffers for weight tiles (stream, where two load no tile ahead; narrow has nothing to pipeline).
    """

    kernel: str
    block_chains: int
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        if self.kernel not in ("narrow", "stream"):
            raise ValueError(
                f"kernel is {self.kernel!r}: a Tile is for 'narrow' or 'stream', others have tiles of their own"
            )
        if self.block_chains not in (16, 32, 64, 128, 256):
            raise ValueError(f"block_chains is {self.block_chains}: choose 16, 32, 64, 128 or 256")
        if self.num_warps not in (1, 2, 4, 8) or not 1 <= self.num_stages <= 8:
            raise ValueError(
                f"{self.num_warps} warps and {self.num_stages} stages: choose 1, 2, 4 or 8 warps and 1 to 8 stages"
            )

    @property
    def chains(self) -> int:
        """See `AnyTile`."""
        return self.block_chains

    @property
    def name(self) -> str:
        """See `AnyTile`."""
        return f"{self.kernel} {self.block_chains} chains ({self.num_warps} warps, {self.num_stages} stages)"

    @property
    def short_name(self) -> str:
        """See `AnyTile`."""
        return f"{self.block_chains} w{self.num_warps} s{self.num_stages}"

    @property
    def use_tma(self) -> bool:
        """See `AnyTile`."""
        return False


@dataclass(frozen=True)
class GpuFacts:
    """What the choice needs to know of a GPU.

    Args:
        shared_memory: bytes one program may use (opt-in maximum).
        capability: CUDA compute capability such as (9, 0).
        has_tma: whether it has the bulk tensor copy engine; None for what the capability says.
        graph_block: most chains of a block of the graph path.
        n_sm: streaming multiprocessors.
    """

    shared_memory: int = 232_448
    capability: tuple[int, int] = (9, 0)
    has_tma: bool | None = None
    graph_block: int = LARGEST_BLOCK
    n_sm: int = 132

    @property
    def uses_tma(self) -> bool:
        """Whether kernels may load by the copy engine."""
        return self.capability[0] >= 9 if self.has_tma is None else self.has_tma


def too_much_shared(tile: AnyTile, need: int, facts: GpuFacts) -> str | None:
    """Why a GPU's shared memory cannot hold a program, if it cannot."""
    if need <= facts.shared_memory:
        return None
    return f"{tile.name}: needs {need:,} bytes of shared memory, the GPU has {facts.shared_memory:,}"


def too_many_registers(tile: AnyTile, need: int) -> str | None:
    """Why a GPU's registers cannot hold a program, if they cannot."""
    return (
        None
        if need <= MAX_REGISTERS
        else f"{tile.name}: needs about {need} registers a thread, the GPU has {MAX_REGISTERS}"
    )


def too_much_tensor_memory(tile: AnyTile, precision: str, fills: bool, facts: GpuFacts) -> str | None:
    """Why sm_100's tensor memory cannot hold a program in split fp32, which ``fills`` it."""
    if facts.capability[0] == 10 and precision == "fp16x3" and fills:
        return f"{tile.name}: split fp32 needs more than the 512 columns of this GPU's tensor memory"
    return None


def too_wide(kernel: str, shape: NetShape, most: int) -> str | None:
    """Why a kernel for widths up to ``most`` cannot run a network, if it cannot."""
    return f"{kernel}: a layer is {max(shape.widths)} wide, at most {most}" if max(shape.widths) > most else None
