"""Torch's number of threads, of which the last bits of products and sums on a CPU depend.

MKL splits a sum among threads where it is longer than the product is wide (measured: 1024 x 256 by 256 x 64 in fp64,
64 x 784 by 784 x 512 in fp32), and torch the sums of whole tensors. No shape avoids it: batches of few rows differ
elsewhere. So a run that goes on from a file goes on with the number of threads that it was begun with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from kaleido_fast.errors import InputError


def deciding_threads(device: torch.device) -> int | None:
    """The number of threads, where torch's products on a device depend on it; else None."""
    return torch.get_num_threads() if device.type == "cpu" else None


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Let torch compute with a number of threads, and put the program's own back; None changes nothing.

    Products in other threads of the program meanwhile have it too.

    Raises:
        InputError: this machine does not allow as many.
    """
    before = torch.get_num_threads()
    if number is None or number == before:
        yield
        return
    try:
        torch.set_num_threads(number)
        allowed = torch.get_num_threads()
        if allowed != number:
            raise InputError(f"{number} threads are needed for the same bits, only {allowed} are allowed here")
        yield
    finally:
        torch.set_num_threads(before)
