"""What is known of GPUs that are not here, by architecture. Plain Python, no Triton."""

from __future__ import annotations

from kaleido_kernels.tile import GpuFacts

FACTS = {
    "sm_80": GpuFacts(166_912, (8, 0)),
    "sm_89": GpuFacts(101_376, (8, 9)),
    "sm_90": GpuFacts(232_448, (9, 0)),
    "sm_100": GpuFacts(232_448, (10, 0)),
    "sm_120": GpuFacts(101_376, (12, 0)),
    "gfx942": GpuFacts(65_536, (9, 4), has_tma=False),
}
"""What a plan would know of a GPU of each architecture."""
REGISTERS = 65_536
"""Registers of a multiprocessor, on all of them."""
