"""What an output written block by block holds, in every format: arrays, their shapes, and how chains are cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kaleido_fast.errors import InputError
from kaleido_fast.storing.encoding import Encoding

CHAIN_DTYPES = {"residual": "float32", "steps": "int32", "period": "int32", "outcome": "int8"}
ARRAYS = ("draws", *CHAIN_DTYPES)
MAX_CHUNK_BYTES = 2**31 - 1  # of codecs


@dataclass(frozen=True)
class Layout:
    """Shapes of an output.

    Args:
        n_chains, n_draws, dim: draws are (n_chains, n_draws, dim).
        chunk_chains: chains of one block, which is written, counted and read as one; the last block may be shorter.
        encoding: how draws are stored.
    """

    n_chains: int
    n_draws: int
    dim: int
    chunk_chains: int
    encoding: Encoding

    def __post_init__(self) -> None:
        per_chain = self.n_draws * self.dim * np.dtype(self.encoding.dtype).itemsize
        if min(self.chunk_chains, self.n_chains) * per_chain > MAX_CHUNK_BYTES:
            raise InputError(
                f"a chunk of {self.chunk_chains:,} chains x {self.n_draws:,} draws x {self.dim:,} values is "
                f"more than 2 GiB: {max(1, MAX_CHUNK_BYTES // per_chain):,} chains fit; or ask for fewer draws"
            )

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return -(-self.n_chains // self.chunk_chains)

    def rows(self, block: int) -> slice:
        """Places of a block's chains in the run."""
        first = block * self.chunk_chains
        return slice(first, min(first + self.chunk_chains, self.n_chains))

    def length(self, block: int) -> int:
        """Chains of a block."""
        return self.rows(block).stop - self.rows(block).start

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of each array."""
        arrays: dict[str, tuple[tuple[int, ...], str]] = {
            "draws": ((self.n_chains, self.n_draws, self.dim), self.encoding.dtype)
        }
        return arrays | {name: ((self.n_chains,), dtype) for name, dtype in CHAIN_DTYPES.items()}

    @property
    def n_bytes(self) -> int:
        """Bytes of all arrays, uncompressed."""
        return sum(
            int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize for shape, dtype in self.shapes().values()
        )


class BlockOutput(Protocol):
    """An output that takes blocks in any order, and knows which of them are durably whole."""

    path: Path
    layout: Layout
    record: dict[str, Any]

    def done(self) -> np.ndarray:
        """(n_blocks,) bool: which blocks are whole."""
        ...

    def write(self, block: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a block's arrays, draws as stored; on return it is durably whole.

        Raises:
            InputError: it cannot be written; blocks written before are untouched.
        """
        ...

    def read(self, name: str, block: int) -> np.ndarray:
        """One array of one block, as stored.

        Raises:
            InputError: it is missing or damaged; the chunk is named.
        """
        ...

    def finish(self) -> list[str]:
        """Publish an output whose blocks are all whole; returns the paths of its files."""
        ...
