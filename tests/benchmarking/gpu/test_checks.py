"""Kernels against themselves."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kaleido_fast import InputError
from kaleido_fast.benchmarking.gpu import checks


def test_different_bits_of_the_same_work_are_found():
    count = iter(range(100))

    def unstable(z0, steps):
        return z0 + (next(count) == 2)

    with pytest.raises(InputError, match="run 3 of the same work differs from the first in 4 of 4 chains"):
        checks.repeated(unstable, torch.zeros(4, 2), 1, 5)
