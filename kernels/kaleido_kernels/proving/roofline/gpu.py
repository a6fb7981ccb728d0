"""The assumed GPUs: rates, capacities and waits, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass

from kaleido_kernels.proving.architectures import REGISTERS

NOTE = "model, not a measurement"
PEAK_FLOPS = 790e12
"""fp16 FLOP/s that shares of the peak refer to: the best measured on large products of an H200."""
SCHEDULERS = 4
"""Warp instructions a clock and multiprocessor."""
ALU_LANES, MUFU_LANES, FMA_LANES = 64, 16, 128
"""Lanes a clock and multiprocessor: integer and conversion units, special functions, fp32 multiply-adds."""
WARPS, RESERVED_SHARED = 64, 1024
"""Warps that a multiprocessor holds at once; bytes of its shared memory that the system takes for each program."""


@dataclass(frozen=True)
class Gpu:
    """Assumed rates of one GPU of the H100 and H200 class.

    Args:
        name: which assumptions these are.
        n_sm: multiprocessors.
        clock: Hz.
        tensor_flops: dense fp16 FLOP/s that large products sustain; power holds the clock down there.
        tensor_fma: fp16 multiply-adds a clock and multiprocessor while tensor cores run: what waiting kernels get.
        l2_bandwidth: bytes/s between L2 and all multiprocessors.
        l2_capacity: bytes that come back from L2 for certain.
        hbm_bandwidth: bytes/s of main memory.
        latency: cycles from a copy's issue to its first byte where it is used, with the barrier behind it.
        launch_seconds: Python's time for a launch, on a warm model.
        collisions: 0 where programs of a multiprocessor never want the same unit at once, 1 where they meet by chance
            (the bounds of a balanced closed network of queues).
    """

    name: str = "fast"
    n_sm: int = 132
    clock: float = 1.755e9
    tensor_flops: float = 790e12
    tensor_fma: float = 2048.0
    l2_bandwidth: float = 8.6e12
    l2_capacity: float = 44e6
    hbm_bandwidth: float = 4.8e12
    latency: float = 500.0
    launch_seconds: float = 25e-6
    collisions: float = 0.0

    @property
    def fma_per_cycle(self) -> float:
        """fp16 tensor multiply-adds a clock and SM at the sustained rate."""
        return self.tensor_flops / 2 / self.n_sm / self.clock

    @property
    def l2_per_cycle(self) -> float:
        """Bytes a clock and SM from L2."""
        return self.l2_bandwidth / self.n_sm / self.clock

    @property
    def hbm_per_cycle(self) -> float:
        """Bytes a clock and SM from main memory."""
        return self.hbm_bandwidth / self.n_sm / self.clock


# Published readings, none of them ours; dates as given or, for files, as stored in November 2026.
# L2: 5.5 TB/s for an H100 PCIe (ascribed to Chips and Cheese, July 2023; the article's own figure was not seen); 6.65
# TB/s for an H100 (openxla/xla, gpu_dot_fusion_cost_model.cc, 2025); reads of 8 to 33 MB at 6.8 to 7.1 TB/s on an H100
# PCIe, and of 8 to 40 MB at 9.5 to 10.3 TB/s on a card listed as H200 (te42kyfo/gpu-benches, gpu-l2-cache): 37 bytes a
# clock and multiprocessor at its 1.98 GHz, 8.6 TB/s at the clock here. Products draw nearly that: 672 TFLOP/s on an
# H100 without multicast (facebookexperimental/triton, pull request 1065, March 2026) are 7.9 TB/s in 128 x 256 tiles.
# Capacity: in the curves of gpu-l2-cache the card listed as H200 begins to miss at 44 MB, the H100 at 37 MB; from about
# 1.5 times that on nearly all is missed.
FAST = Gpu()
# tensor: 672 to 687 TFLOP/s for products with 1,024 inner values (the same pull request). hbm: 3.0 TB/s for transfers
# of some hundred MB on an H100 (the same cost model); the 4.8 above are an H200's nominal rate. latency, an assumption:
# idle L2 answers in 265 cycles (gpu-benches, gpu-latency, H100 PCIe); the cost model adds 400 ns, 700 cycles, to each
# round of copies by threads. launch: 24 (narrow) to 38 (wide) microseconds of Python on a quiet Xeon, the driver's few
# not in them (benchmarks/launch_overhead.py).
SLOW = Gpu(
    name="slow",
    tensor_flops=680e12,
    l2_bandwidth=5.5e12,
    l2_capacity=37e6,
    hbm_bandwidth=3.0e12,
    latency=900.0,
    launch_seconds=50e-6,
    collisions=1.0,
)


def resident_programs(shared: int, registers: int, warps: int, shared_limit: int) -> int:
    """Programs that a multiprocessor holds at once, at least 1.

    Args:
        shared: bytes of shared memory of a program.
        registers: of a thread.
        warps: of a program.
        shared_limit: most bytes that one program may have; a multiprocessor has `RESERVED_SHARED` more.
    """
    of_warp = 32 * (-(-registers // 8) * 8)  # registers are given to a warp in pieces of 256
    fitting = (
        (shared_limit + RESERVED_SHARED) // (shared + RESERVED_SHARED),
        REGISTERS // (max(of_warp, 1) * warps),
        WARPS // warps,
    )
    return max(1, min(fitting))
