"""Blocks and memory of the graph path: plain Python, no torch, no Triton."""

from __future__ import annotations

from dataclasses import dataclass

from kaleido_kernels.precision import OPERAND_BYTES
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.tile import LARGEST_BLOCK, GpuFacts

BY_DEFAULT = False
"""It is taken where a tuned table says so or where it is asked for."""
TAKES_CHECKS = False
"""Its launches hold one step each."""
VERDICTS = ("no stack",)

GRAPH_FORMS = {"fp32": "ieee", "fp16x3": "ieee", "ieee": "ieee", "fp16": "fp16", "bf16": "bf16"}
"""How the graph path computes a precision: fp32 by plain fp32 products. tf32 is not offered: no test covers it."""
GRAPH_BLOCKS = (LARGEST_BLOCK, 8_448, 4_096, 2_048, 1_024)
"""Chains of a block, the largest first: whole tiles of 128 rows; of the two largest as many as an H100 or H200 has
multiprocessors, or half as many."""
WIDTH_MULTIPLE = 16
"""Widths are padded to whole 32-byte lines of 16-bit values, which every product of the library takes."""
CACHED_BYTES = {8: 40 * 2**20, 9: 72 * 2**20}
"""Activations of a block, by the GPU's generation: what an A100's second-level cache holds, and what was fastest on an
H200 (60 MB): cifar in fp16 took 4.53 s with blocks of 8,448 chains (68 MB), 4.83 with 4,096, 4.84 with 16,896."""


@dataclass(frozen=True)
class GraphTile:
    """How the graph path works: products of the library over blocks of chains, one fused kernel for the rest.

    Args:
        block_chains: chains of a block; every product has exactly this many rows, the last block is padded.
        rows: chains of one program of the fused kernel.
        cols: values of a chain that it handles at once.
        warps: warps of such a program.
    """

    block_chains: int = LARGEST_BLOCK
    rows: int = 16
    cols: int = 64
    warps: int = 4

    def __post_init__(self) -> None:
        for name in ("rows", "cols"):
            value = getattr(self, name)
            if not 4 <= value <= 256 or value & (value - 1):
                raise ValueError(f"{name} is {value}: it must be a power of two from 4 to 256")
        if self.block_chains < 1 or self.block_chains % self.rows:
            raise ValueError(f"block_chains is {self.block_chains}: it must be a multiple of rows, {self.rows}")
        if self.warps not in (1, 2, 4, 8):
            raise ValueError(f"warps is {self.warps}: choose 1, 2, 4 or 8")

    @property
    def kernel(self) -> str:
        """See `kaleido_kernels.tile.AnyTile`."""
        return "graph"

    @property
    def chains(self) -> int:
        """See `kaleido_kernels.tile.AnyTile`; of the fused kernel."""
        return self.rows

    @property
    def name(self) -> str:
        """See `kaleido_kernels.tile.AnyTile`."""
        return f"graph of products over blocks of {self.block_chains:,} chains"

    @property
    def short_name(self) -> str:
        """See `kaleido_kernels.tile.AnyTile`."""
        return f"{self.rows}x{self.cols} w{self.warps}, blocks of {self.block_chains}"

    @property
    def use_tma(self) -> bool:
        """See `kaleido_kernels.tile.AnyTile`."""
        return False


tile_of = GraphTile


def padded_width(width: int) -> int:
    """Width of a layer as stored."""
    return -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def hidden_bytes(shape: NetShape, precision: str, block_chains: int) -> int:
    """Bytes of the activations that a layer reads and writes: what the second-level cache should help."""
    width = padded_width(max(shape.hidden, 1))
    return 2 * width * OPERAND_BYTES[GRAPH_FORMS[precision]] * block_chains


def graph_bytes(shape: NetShape, precision: str, tile: GraphTile) -> int:
    """Bytes of all buffers of a block: activations, operand and fp32 state, raw outputs, results, chain ids."""
    item = OPERAND_BYTES[GRAPH_FORMS[precision]]
    per_chain = padded_width(shape.dim) * (item + 4) + 4 * 2 * shape.dim + 4 + 8
    return hidden_bytes(shape, precision, tile.block_chains) + per_chain * tile.block_chains


def graph_candidates(
    shape: NetShape, precision: str, most: int = GRAPH_BLOCKS[0], cached: int = CACHED_BYTES[9]
) -> list[GraphTile]:
    """Tiles worth trying, best first: the largest block whose activations the cache helps, then smaller, then larger.

    ``most``: chains of a block; ``cached``: bytes of its activations that the cache helps.
    """
    if precision not in GRAPH_FORMS:
        return []
    if most < GRAPH_BLOCKS[-1]:
        return [GraphTile(most)]
    fitting = [n for n in GRAPH_BLOCKS if hidden_bytes(shape, precision, n) <= cached] or [GRAPH_BLOCKS[-1]]
    others = [n for n in GRAPH_BLOCKS if n not in fitting]
    return [GraphTile(n) for n in (*fitting, *reversed(others))]


def candidates(shape: NetShape, precision: str, facts: GpuFacts) -> list[GraphTile]:
    """Tiles to choose from, best first."""
    return graph_candidates(shape, precision, facts.graph_block, CACHED_BYTES[min(max(facts.capability[0], 8), 9)])


trials = candidates
"""Tiles that are worth timing."""


def yields(shape: NetShape, precision: str) -> str | None:
    """Why another kernel shall run a network unless this one is asked for by name: never."""
    return None


def refusal(shape: NetShape, precision: str, tile: GraphTile, facts: GpuFacts) -> str | None:
    """Why a tile cannot run ``shape`` on a GPU; None if it can."""
    if precision in GRAPH_FORMS:
        return None
    return f"graph: precision {precision!r} is not offered there: use fp32, fp16 or bf16, or another kernel"


def scratch_bytes(shape: NetShape, precision: str, tile: GraphTile, n_programs: int) -> int:
    """Bytes of memory besides weights and states: all buffers of a block."""
    return graph_bytes(shape, precision, tile)
