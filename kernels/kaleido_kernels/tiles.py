"""Which kernel with which tile: plain Python, no torch, no Triton."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    kernel: str
    block_chains: int
    num_warps: int = 4
    num_stages: int = 1
    block_n: int = 0
    block_k: int = 0
