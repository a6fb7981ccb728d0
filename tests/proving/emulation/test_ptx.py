"""The text of PTX: names, targets, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_programs import HEAD, STORE, THREADS, run

from kaleido_kernels.proving.emulation.errors import UnknownInstructionError
from kaleido_kernels.proving.emulation.ptx import parse_kernel


def test_other_targets_and_texts_are_refused():
    with pytest.raises(UnknownInstructionError, match="PTX for sm_80: the emulator knows sm_90 only"):
        parse_kernel((HEAD % 32).replace("sm_90a", "sm_80") + "ret;\n}\n")
    with pytest.raises(UnknownInstructionError, match="without an entry"):
        parse_kernel(".target sm_90a\n")
    for old, new in (("sm_90a", "sm_900"), (".reqntid 32", ".reqntid 16, 2"), (".reqntid 32", ".reqntid 48")):
        with pytest.raises(UnknownInstructionError):
            parse_kernel((HEAD % 32).replace(old, new) + "ret;\n}\n")
    for body in ("", "$a:\n$a:\nret;", "mov.b32 %r1, 1.5;\nret;", "elect.sync %r1|%p1|%p2, -1;\nret;"):
        with pytest.raises(UnknownInstructionError):
            parse_kernel(HEAD % 32 + body + "\n}\n")
    with pytest.raises(UnknownInstructionError, match="a branch to %r1"):
        run("bra %r1;", np.zeros(1, np.int32), np.zeros(1, np.int32))


def test_names_between_braces_hide_those_outside():
    body = """
	mov.b32 %r5, 7;
	{
	.reg .b32 x;
	.reg .pred done;
	mov.b32 x, 3;
loop:
	add.s32 x, x, 1;
	setp.ge.s32 done, x, 5;
	@!done bra.uni loop;
	add.s32 %r5, %r5, x;
	}
	{
	.reg .b32 x;
	mov.b32 x, 100;
	add.s32 %r5, %r5, x;
	}
"""
    out = run(body + STORE + "st.global.b32 [%rd3], %r5;", np.zeros(1, np.int32), np.zeros(THREADS, np.int32))
    assert (out == 112).all()
