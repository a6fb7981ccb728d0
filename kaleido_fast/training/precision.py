"""Whether products in bf16 make the steps of a training faster on this processor: measured, because few can tell."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import torch
from torch import nn

GAIN = 1.25  # less is not worth the rounding, and could turn out otherwise next time
ROUNDS = 5


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Products of a training in "fp32" or "bf16"; weights, sums of gradients and the loss stay fp32."""
    return contextlib.nullcontext() if precision == "fp32" else torch.autocast(device.type, torch.bfloat16)


def faster_precision(network: nn.Module, batch_size: int, dim: int, device: torch.device) -> str:
    """ "bf16" where a step's products are faster in it by a quarter or more, else "fp32".

    Forward and backward passes of one batch are timed in turns; no weight changes. On a GPU it is "fp32".
    """
    if device.type != "cpu":
        return "fp32"
    inputs = torch.rand((batch_size, dim), generator=torch.Generator().manual_seed(0))

    def seconds(precision: str) -> float:
        began = time.perf_counter()
        with autocast(precision, device):
            outputs = network(inputs)
        outputs.float().square().mean().backward()
        network.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    return compare(seconds)


def compare(seconds: Callable[[str], float]) -> str:
    """The precision to take, by the least time of some rounds; ``seconds`` makes one step in a precision."""
    for precision in ("fp32", "bf16"):
        seconds(precision)  # makes what is made once
    fp32, bf16 = seconds("fp32"), seconds("bf16")
    if bf16 > 2 * fp32:  # without instructions for it bf16 can be fifty times slower
        return "fp32"
    for _ in range(ROUNDS - 1):
        fp32, bf16 = min(fp32, seconds("fp32")), min(bf16, seconds("bf16"))
    return "bf16" if bf16 * GAIN <= fp32 else "fp32"
