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


def ceiling_run(precision: str, device: torch.device, side: int | None = None, products: int | None = None) -> Timed:
    """A product of two square matrices in the operands' type of ``precision``, several times.

    Args:
        precision, device: of the product.
        side: of the matrices; None for 2048.
        products: None for `repeats`.
    """
    side, products = side or SIDE, products or repeats(device)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(_DTYPES[precision]) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> float:
        with torch.inference_mode(), _matmul_precision("high" if precision == "tf32" else "highest"):
            for _ in range(products):
                torch.mm(a, b, out=out)
        return 0.0

    return run


def copy_run(n_bytes: int, device: torch.device, copies: int = 1) -> Timed:
    """A copy of ``n_bytes`` in the device's own memory, ``copies`` times: each reads and writes that much."""
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)

    def run() -> float:
        for _ in range(copies):
            target.copy_(source)
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
