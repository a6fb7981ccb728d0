"""What the compiler makes of the CPU engine's loops: full vectors, and sums that stay in registers.

For instruction sets that this machine has; those of AVX2 also where it has more.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("numba", reason="the CPU engine needs numba")
from kaleido_fast.engines.loops import processor

COMPILE = """
import json, sys
from conftest import random_mlp
from kaleido_fast.engines.cpu import CpuEngine
from kaleido_fast.engines.loops import processor, steps
from kaleido_fast.planning.request import SampleRequest

entry, precision = getattr(steps, sys.argv[1]), sys.argv[2]
CpuEngine(random_mlp(3, 5, 3), SampleRequest(n_chains=1, precision=precision))
(assembly,) = entry.inspect_asm().values()
print(json.dumps({"vector": processor.VECTOR, "most": processor.MAX_OUTPUTS, "assembly": assembly}))
"""
AVX2 = {"NUMBA_CPU_NAME": "znver3", "NUMBA_CPU_FEATURES": "-avx512f"}
NAMES = {16: "%zmm", 8: "%ymm"}
on_x86 = pytest.mark.skipif(processor.VECTOR < 8, reason="this processor has neither AVX2 nor AVX-512")


def compiled(tmp_path, entry: str, precision: str, environment: dict[str, str]) -> dict[str, Any]:
    """Width of vectors, most outputs of a block, and assembler of an entry, compiled in a process of its own."""
    environment = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    } | environment
    command = [sys.executable, "-c", COMPILE, entry, precision]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def innermost_loops(assembly: str) -> list[list[str]]:
    """Bodies of loops without another loop in them: from a label to the jump back to it."""
    lines = [line.strip() for line in assembly.splitlines()]
    places = {line[:-1]: place for place, line in enumerate(lines) if re.fullmatch(r"\.LBB\w+:", line)}
    loops = []
    for end, line in enumerate(lines):
        jump = re.fullmatch(r"j\w+\s+(\.LBB\w+)", line)
        if jump and places.get(jump[1], end) < end:
            loops.append((places[jump[1]], end))
    return [
        lines[first : end + 1]
        for first, end in loops
        if not any((first, end) != other and first <= other[0] and other[1] <= end for other in loops)
    ]


@on_x86
@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, AVX2], ids=["this processor", "AVX2"])
def test_sums_of_products_stay_in_registers_of_the_full_width(tmp_path, environment):
    found = compiled(tmp_path, "advance_rows", "fp32", environment)
    assert not environment or found["vector"] == 8
    sizes = {}
    for body in innermost_loops(found["assembly"]):
        fused = [line for line in body if line.startswith("vfmadd") and NAMES[found["vector"]] in line]
        other = [line for line in body if line.startswith(("vmul", "vadd", "vsub", "vcvt", "vdiv", "vsqrt"))]
        if fused and not other and len(fused) % 2 == 0:  # products, two vectors of chains an output
            assert not any("%rsp" in line for line in body), f"of {len(fused)} sums one is on the stack: {body}"
            sizes[len(fused) // 2] = body
    for outputs in (found["most"] - 1, found["most"]):  # the blocks of wide layers; LLVM may do two inputs at a time
        body = sizes.get(outputs) or sizes.get(2 * outputs)
        assert body, f"{outputs} outputs have no loop of their own, only {sorted(sizes)}"
        assert sum("prefetch" in line for line in body) >= 2, "a full block asks for nothing ahead"


@pytest.mark.slow
@pytest.mark.skipif(not processor.tiles_are_permitted(), reason="this processor has no AMX")
def test_products_of_tiles_are_the_processor_s(tmp_path):
    found = compiled(tmp_path, "advance_by_tiles", "bf16", {})
    lines = [line.strip() for line in found["assembly"].splitlines()]
    # Blocks of 32 outputs, one loop for each of two activations of the block before; and of 16 outputs.
    products = [place for place, line in enumerate(lines) if line.startswith("tdpbf16ps")]
    assert len(products) == 2 * 4 + 2
    for place in products:
        around = lines[place - 4 : place + 4]
        assert not any("%rsp" in line for line in around if not line.startswith("mov")), around
    assert sum(line.startswith("vcvtne2ps2bf16") for line in lines) >= 4
