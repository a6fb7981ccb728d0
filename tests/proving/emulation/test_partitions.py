"""Warps that are specialised: every partition its own stream of instructions, in every order; rules they may break."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from ring_kernel import run_ring

from kaleido_kernels.proving.emulation.block import ORDERS
from kaleido_kernels.proving.emulation.driver import Emulator

pytestmark = pytest.mark.emulated
ALLOWED = 1e-2
"""Of values around 1: an fp16 rounding that falls the other way, through the layers."""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_order_of_partitions_gives_the_right_results(groups, order):
    assert run_ring(Emulator(ORDERS[order]), groups, programs=2) < ALLOWED
