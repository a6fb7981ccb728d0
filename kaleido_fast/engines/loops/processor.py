"""What numba compiles for: the width of vectors, and the registers of a block."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from pathlib import Path

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
_FEATURES = binding.get_host_cpu_features()
# Instructions that LLVM has no name for are written in assembler, and it ends the process where the processor that it
# was told of has them not: a person's own choice of processor (NUMBA_CPU_NAME, ...) is followed without them.
_IS_HOST = config.CPU_NAME is None and config.CPU_FEATURES is None and bool(config.ENABLE_AVX) and VECTOR == 16
HAS_TILES = _IS_HOST and bool(_FEATURES.get("amx-tile") and _FEATURES.get("amx-bf16") and _FEATURES.get("avx512bf16"))
HAS_PAIRS = _IS_HOST and bool(_FEATURES.get("avx512bf16"))
_ARCH_PRCTL, _ASK_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64


@functools.cache
def tiles_are_permitted() -> bool:
    """Whether this process may use AMX's tile registers; asks once a process."""
    return ask_for_tiles()


def ask_for_tiles() -> bool:
    """Ask for AMX's tile registers, which Linux gives to processes that do."""
    if not HAS_TILES or sys.platform != "linux":
        return False
    return ctypes.CDLL(None, use_errno=True).syscall(_ARCH_PRCTL, _ASK_PERMISSION, _TILE_DATA) == 0


@functools.cache
def multiplies_pairs_fast() -> bool:
    """Whether products of pairs of bf16 (AVX512-BF16) are faster than fp32.

    They are on AMD's processors by its manuals; an Intel Xeon does half as many operations by them as by fp32.
    """
    return HAS_PAIRS and "AuthenticAMD" in _vendor()


def _vendor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace")[:1000]
    except OSError:
        return platform.processor()


def instruction_set() -> str:
    """The widest instructions that the loops use here."""
    if tiles_are_permitted():
        return "AMX"
    return {16: "AVX-512", 8: "AVX2"}.get(VECTOR, "NEON" if _IS_ARM else "SSE2")
