"""Values that the emulator moves."""

from __future__ import annotations

import numpy as np
from ptx_programs import THREADS, run


def test_a_narrow_parameter_keeps_its_sign_in_a_wide_register():
    out = np.zeros(THREADS, np.int64)
    body = "ld.param.s32 %rd5, [program_param_2];\nmul.wide.u32 %rd3, %r0, 8;\nadd.s64 %rd3, %rd3, %rd1;\n"
    assert (run(body + "st.global.b64 [%rd3], %rd5;", np.zeros(1, np.int32), out, number=-5) == -5).all()
