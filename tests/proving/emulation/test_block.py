"""Blocks of the emulator: warps side by side, barriers, and what never ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ptx_programs import THREADS, run

from kaleido_kernels.proving.emulation.errors import DeadlockError

REVERSE = """
	shl.b32 %r5, %r0, 2;
	st.shared.b32 [%r5], %r0;
	bar.sync 0;
	sub.s32 %r6, 252, %r5;
	ld.shared.b32 %r7, [%r6];
	cvt.u64.u32 %rd3, %r5;
	add.s64 %rd3, %rd3, %rd1;
	st.global.b32 [%rd3], %r7;
"""
APART: list[dict[str, Any]] = [{}, {"groups": (32, 32), "order": (0, 1)}, {"groups": (32, 32), "order": (1, 0)}]
APART += [{"apart": True, "seed": seed} for seed in range(3)]


@pytest.mark.parametrize("conditions", APART)
def test_values_pass_from_warp_to_warp_over_a_barrier(conditions):
    out = run(REVERSE, np.zeros(1, np.int32), np.zeros(THREADS, np.int32), **conditions)
    assert out.tolist() == list(range(THREADS))[::-1]


def test_a_missing_barrier_shows_when_warps_run_apart():
    body = REVERSE.replace("bar.sync 0;", "")
    together = run(body, np.zeros(1, np.int32), np.zeros(THREADS, np.int32))
    assert together.tolist() == list(range(THREADS))[::-1]
    first = run(body, np.zeros(1, np.int32), np.zeros(THREADS, np.int32), groups=(32, 32), order=(0, 1))
    assert (first[:32] == -1).all(), "shared memory that nothing was written to is not what it was"


def test_warps_that_wait_for_nobody_are_told():
    out = np.zeros(THREADS, np.int32)
    body = "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $first;\nbar.sync 0;\nbra.uni $end;\n$first:\nbar.sync 0;\n$end:"
    with pytest.raises(DeadlockError, match="different barriers"):
        run(body, out, out)
    with pytest.raises(DeadlockError, match="no warps can go on"):
        run("setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $end;\nbar.sync 0;\n$end:", out, out, groups=(32, 32))
    waiting = "mov.b32 %r5, 0;\nmbarrier.init.shared::cta.b64 [%r5], 1;\n"
    waiting += "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r5], 0;"
    with pytest.raises(DeadlockError, match="try_wait"):
        run(waiting, out, out)


def test_a_loop_without_end_is_told():
    out = np.zeros(THREADS, np.int32)
    with pytest.raises(DeadlockError, match="no end after 1,"):
        run("$again:\nadd.s32 %r5, %r0, 1;\nbra.uni $again;", out, out, most_instructions=1000)
