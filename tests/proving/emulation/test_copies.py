"""Copies of the emulator that run beside the program, and their barriers."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_programs import THREADS, run

from kaleido_kernels.proving.emulation.errors import AccessError, EmulatorError, RaceError

COPY = """
	shl.b32 %r5, %r0, 2;
	cvt.u64.u32 %rd2, %r5;
	add.s64 %rd3, %rd0, %rd2;
	cp.async.ca.shared.global [%r5+0], [%rd3+0], 4;
	cp.async.commit_group;
	cp.async.wait_group 0;
	ld.shared.b32 %r7, [%r5];
	add.s64 %rd3, %rd1, %rd2;
	st.global.b32 [%rd3], %r7;
"""


@pytest.mark.parametrize("early", [False, True])
def test_copies_are_there_after_the_wait(early):
    source = np.arange(THREADS, dtype=np.int32)
    assert (run(COPY, source, np.zeros(THREADS, np.int32), early_copies=early) == source).all()


def test_a_missing_wait_shows():
    source = np.arange(THREADS, dtype=np.int32)
    all_of_them = COPY.replace("cp.async.commit_group;", "").replace("cp.async.wait_group 0;", "cp.async.wait_all;")
    assert (run(all_of_them, source, np.zeros(THREADS, np.int32)) == source).all()
    for wait in ("", "cp.async.wait_group 1;"):
        with pytest.raises(RaceError, match="copy in flight"):
            run(COPY.replace("cp.async.wait_group 0;", wait), source, np.zeros(THREADS, np.int32))


def test_arrivals_and_bytes_that_do_not_add_up_are_told():
    out = np.zeros(THREADS, np.int32)
    begin = "mov.b32 %r5, 0;\nmbarrier.init.shared::cta.b64 [%r5], 1;\nsetp.lt.u32 %p1, %r0, 2;\n"
    with pytest.raises(RaceError, match=r"bytes more|more arrivals"):
        run(begin + "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 128;", out, out)
    with pytest.raises(AccessError, match="an mbarrier in"):
        run(begin.replace("mov.b32 %r5, 0", "mov.b32 %r5, 9999"), out, out)
    with pytest.raises(EmulatorError, match="no mbarrier at byte 8"):
        run(begin + "mbarrier.arrive.shared::cta.b64 _, [%r5+8];", out, out)
