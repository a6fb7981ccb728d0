"""Errors that take a device from the process that made them."""

from __future__ import annotations

import torch

from kaleido_fast.benchmarking.contest import one_line
from kaleido_fast.errors import InputError


class DeviceLostError(InputError):
    """A device that takes no more work from this process: after an illegal access every call of CUDA fails.

    Args:
        what: was at work.
        problem: what it raised.
    """

    def __init__(self, what: str, problem: BaseException) -> None:
        super().__init__(f"{what}: {one_line(problem)}; the GPU takes no more work from this process")


def device_answers(device: torch.device) -> bool:
    """Whether this process can still use a device; asked after something failed on it."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
