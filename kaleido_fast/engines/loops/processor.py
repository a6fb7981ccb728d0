"""What numba compiles for: the width of vectors, and the registers of a block."""

from __future__ import annotations

from llvmlite import binding
from numba.core.registry import cpu_target

from kaleido_fast.engines.code_cache import config

_WIDEST = 16
_ADDS = f"""
define void @adds(ptr %x) {{
  %a = load <{_WIDEST} x float>, ptr %x
  %b = fadd <{_WIDEST} x float> %a, %a
  store <{_WIDEST} x float> %b, ptr %x
  ret void
}}
"""


def vector_values(triple: str, cpu: str, features: str) -> int:
    """fp32 values in one vector register of a processor: what LLVM makes of a wide addition for it says so.

    Its list of features would not: it is empty for a processor that is named (NUMBA_CPU_NAME).
    """
    module = binding.parse_assembly(f'target triple = "{triple}"\n{_ADDS}')
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=2)
    assembly = machine.emit_assembly(module)
    return 16 if "%zmm" in assembly else 8 if "%ymm" in assembly else 4


def register_block(values: int, arm: bool) -> tuple[int, int]:
    """(vectors of chains, most outputs) of a register block of vectors of ``values``.

    outputs x vectors are accumulators and stay in registers, beside one vector of inputs each and a broadcast weight:
    2 x 14 + 2 + 1 of the 32 registers of AVX-512, 4 x 5 + 4 + 1 of the 32 of NEON, 2 x 6 + 2 + 1 of 16.
    """
    return (2, 14) if values == 16 else (4, 5) if arm else (2, 6)


_TARGET = cpu_target.target_context.codegen().magic_tuple()
_IS_ARM = _TARGET[0].startswith(("aarch64", "arm64"))
VECTOR = vector_values(*_TARGET)
VECTORS, MAX_OUTPUTS = register_block(VECTOR, _IS_ARM)
LANES = VECTOR * VECTORS
ROW_BYTES = 4 * LANES
CACHE_LINE = 64
# If numba compiles for a processor without bf16 (NUMBA_CPU_NAME), LLVM ends the process at the first such instruction.
_FOR_THIS_PROCESSOR = config.CPU_NAME is None and config.CPU_FEATURES is None and bool(config.ENABLE_AVX)
HAS_BF16 = VECTOR == 16 and _FOR_THIS_PROCESSOR and bool(binding.get_host_cpu_features().get("avx512bf16"))
