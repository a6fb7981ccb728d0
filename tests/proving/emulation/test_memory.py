"""Memory of the emulator: where a tensor begins, and accesses that are refused."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_programs import HEAD, STORE, THREADS, run

from kaleido_kernels.proving.emulation.block import Block, Conditions
from kaleido_kernels.proving.emulation.errors import AccessError
from kaleido_kernels.proving.emulation.memory import GlobalMemory
from kaleido_kernels.proving.emulation.ptx import parse_kernel


def test_a_tensor_may_begin_between_two_aligned_addresses():
    kernel = parse_kernel(HEAD % 32 + "ld.global.b64 %rd5, [%rd0+4];\nst.global.b64 [%rd1], %rd5;\nret;\n}\n")
    memory, source, out = GlobalMemory(), np.arange(5, dtype=np.int32), np.zeros(1, np.int64)
    first = memory.add("source", source.view(np.uint8), 4).start
    second = memory.add("result", out.view(np.uint8), 0).start
    values = dict(zip(kernel.parameters, [first, second, 0], strict=True))
    Block(kernel, memory, values, {}, 64, Conditions()).run(0, 1)
    assert out.view(np.int32).tolist() == [1, 2]


@pytest.mark.parametrize("offset, message", [(4, "result, which has 256"), (-4, "result, which has 256")])
def test_an_access_past_a_tensor_is_refused_by_its_name(offset, message):
    for access in (f"st.global.b32 [%rd3+{offset}], %r0;", f"ld.global.b32 %r5, [%rd3+{offset}];"):
        with pytest.raises(AccessError, match=message):
            run(STORE + access, np.zeros(THREADS, np.int32), np.zeros(THREADS, np.int32))


def test_other_wrong_addresses_are_refused():
    source, out = np.zeros(THREADS, np.int32), np.zeros(THREADS, np.int32)
    with pytest.raises(AccessError, match="not aligned"):
        run(STORE + "setp.lt.u32 %p1, %r0, 8;\n@%p1 st.global.b32 [%rd3+2], %r0;", source, out)
    with pytest.raises(AccessError, match="in no tensor"):
        run("st.global.b32 [%rd7], %r0;", source, out)
    with pytest.raises(AccessError, match="of shared memory, which has 128"):
        run("shl.b32 %r5, %r0, 2;\nst.shared.b32 [%r5], %r0;", source, out, shared=128)
