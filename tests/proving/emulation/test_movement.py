"""Values that the emulator moves."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_programs import THREADS, per_thread, run


def test_a_narrow_parameter_keeps_its_sign_in_a_wide_register():
    out = np.zeros(THREADS, np.int64)
    body = "ld.param.s32 %rd5, [program_param_2];\nmul.wide.u32 %rd3, %r0, 8;\nadd.s64 %rd3, %rd3, %rd1;\n"
    assert (run(body + "st.global.b64 [%rd3], %rd5;", np.zeros(1, np.int32), out, number=-5) == -5).all()


@pytest.mark.parametrize(
    "name, function",
    [
        ("add.s32", lambda lanes: lanes.sum(1, dtype=np.uint32)),
        ("max.s32", lambda lanes: lanes.view(np.int32).max(1)),
        ("min.u32", lambda lanes: lanes.min(1)),
        ("or.b32", lambda lanes: np.bitwise_or.reduce(lanes, 1)),
    ],
)
def test_a_reduction_is_over_the_lanes_of_each_warp(name, function):
    values = np.random.default_rng(0).integers(0, 2**32, (THREADS, 1), dtype=np.uint32)
    out = run(per_thread(f"redux.sync.{name} %{{o}}, %{{x}}, -1;", 1, "u32", "u32"), values, np.zeros(THREADS, "u4"))
    want = np.repeat(function(values.reshape(-1, 32)), 32)
    assert (out == want.view(np.uint32)).all()
