"""Warps that are specialised: every partition its own stream of instructions, in every order; rules they may break."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("triton")

from ptx_programs import run
from ring_kernel import ring_variant, run_ring

from kaleido_kernels.proving.emulation.block import ORDERS, Conditions
from kaleido_kernels.proving.emulation.driver import Emulator
from kaleido_kernels.proving.emulation.errors import DeadlockError, EmulatorError, RaceError
from kaleido_kernels.proving.emulation.faults import left_out_singly, planted
from kaleido_kernels.proving.fake_driver import compile_variant

ALLOWED = 1e-2
"""Of values around 1: an fp16 rounding that falls the other way, through the layers."""
DISPATCH = """
	shr.u32 %r5, %r0, 5;
	setp.lt.u32 %p1, %r5, 4;
	@%p1 bra $default;
	sub.s32 %r6, %r5, 4;
	min.u32 %r6, %r6, 2;
$table: .branchtargets $work, $help, $idle;
	brx.idx %r6, $table;
$default:
	DEFAULT
	bra.uni $end;
$work:
	WORK
	bra.uni $end;
$help:
	HELP
	bra.uni $end;
$idle:
$end:
"""
"""Four warps, then a partition of one warp, one of another, and two idle warps."""


def run_parts(default: str = "", work: str = "", help: str = "", **conditions) -> np.ndarray:
    """What the three partitions stored, a number a thread."""
    body = DISPATCH.replace("DEFAULT", default).replace("WORK", work).replace("HELP", help)
    out = np.zeros(256, np.int32)
    return run(body, np.zeros(1, np.int32), out, threads=256, **conditions)


def stored(number: int) -> str:
    """A partition stores a number for each of its threads, and the order in which it did."""
    place = "mul.wide.u32 %rd3, %r0, 4;\nadd.s64 %rd3, %rd3, %rd1;\n"
    took = "ld.shared.b32 %r7, [%r9+64];\nadd.s32 %r7, %r7, 1;\nst.shared.b32 [%r9+64], %r7;\n"
    return f"mov.b32 %r9, 0;\n{took}mad.lo.s32 %r7, %r7, 16, {number};\n{place}st.global.b32 [%rd3], %r7;\n"


FIRST = "mov.b32 %r9, 0;\nst.shared.b32 [%r9+64], %r9;\nbarrier.sync 1;\n"


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_partitions_run_in_the_order_that_is_asked_for(order):
    begin = FIRST.replace("barrier.sync 1", "barrier.sync 1, 192")
    wait = "barrier.sync 1, 192;\n"
    out = run_parts(begin + stored(1), wait + stored(2), wait + stored(3), order=order)
    assert [set(out[first : first + n].tolist()) for first, n in ((0, 128), (128, 32), (160, 32), (192, 64))] == [
        {16 * (1 + order.index(0)) + 1},
        {16 * (1 + order.index(1)) + 2},
        {16 * (1 + order.index(2)) + 3},
        {0},
    ]
