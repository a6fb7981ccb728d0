"""What a plan needs to know of a device: plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kaleido_kernels.tile import GpuFacts

INTERPRETED = GpuFacts(has_tma=False, graph_block=64, n_sm=2)
"""What kernels take Triton's interpreter for: a small H200 without its copy engine."""


@dataclass(frozen=True)
class DeviceFacts:
    """What a plan needs to know of a device; made by `kaleido_fast.system.devices`, or by hand in tests.

    Args:
        kind: "cpu" or "cuda".
        name: as the driver or the system calls it.
        memory: bytes free for the run.
        has_triton, has_numba: whether these libraries are installed.
        numba_problem: why numba cannot be used although it is; empty if it can, as far as is known.
        slow_bf16: how a CPU's loops compute bf16 where that is no faster than fp32; empty where it is, or is not known.
        gpu: what the kernels need to know of it; of a CPU, of what Triton's interpreter stands for.
        tuned: tiles measured best on this GPU (`kaleido_kernels.tuned.read_tuned`).
        interpreter: whether Triton's interpreter was asked for (TRITON_INTERPRET=1), so that kernels run on a CPU.
    """

    kind: str
    name: str = ""
    memory: int = 2**34
    has_triton: bool = False
    has_numba: bool = False
    numba_problem: str = ""
    slow_bf16: str = ""
    gpu: GpuFacts = INTERPRETED
    tuned: dict[str, Any] = field(default_factory=dict)
    interpreter: bool = False


H200 = DeviceFacts("cuda", "an H200", memory=140 * 2**30, has_triton=True, gpu=GpuFacts())
"""The GPU that the kernels were designed for, to show a plan where there is none."""
