"""What tiles of several kernels share, and what a choice knows of a GPU. Plain Python: no torch, no Triton."""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = 65_536
"""32-bit registers of a multiprocessor."""
MAX_REGISTERS = 255
"""Registers of a thread."""
LARGEST_BLOCK = 16_384
"""Most chains of a block of the graph path."""


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
            raise ValueError(f"kernel is {self.kernel!r}: a Tile is for 'narrow' or 'stream', a WideTile for 'wide'")
        if self.block_chains not in (16, 32, 64, 128, 256):
            raise ValueError(f"block_chains is {self.block_chains}: choose 16, 32, 64, 128 or 256")
        if self.num_warps not in (1, 2, 4, 8) or not 1 <= self.num_stages <= 8:
            raise ValueError(
                f"{self.num_warps} warps and {self.num_stages} stages: choose 1, 2, 4 or 8 warps and 1 to 8 stages"
            )


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
        """Whether the wide kernel may load by the copy engine."""
        return self.capability[0] >= 9 if self.has_tma is None else self.has_tma
