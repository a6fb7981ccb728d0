"""The machine's own large matrix product: the ceiling that every speed is a share of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from kaleido_fast.benchmarking.timing import Timed

SIDE = 2048
FLOPS = 2 * SIDE**3
_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
_GPU_PRODUCTS = 100  # one takes 0.1 ms or less there


def repeats(device: torch.device) -> int:
    """Products in one timing."""
    return _GPU_PRODUCTS if device.type == "cuda" else 1


def ceiling_run(precision: str, device: torch.device) -> Timed:
    """A product of two 2048 x 2048 matrices in the operands' type of ``precision``, `repeats` times."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIDE, SIDE, generator=generator).to(device, _DTYPES[precision]) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> float:
        with torch.inference_mode(), _matmul_precision("high" if precision == "tf32" else "highest"):
            for _ in range(repeats(device)):
                torch.mm(a, b, out=out)
        return 0.0

    return run


@contextlib.contextmanager
def _matmul_precision(wanted: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
