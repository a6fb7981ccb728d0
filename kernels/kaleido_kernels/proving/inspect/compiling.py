"""From a job to machine code: Triton's compiler, and the CUDA tools that come with it."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaleido_kernels.arguments import CHECKED, QUIET
from kaleido_kernels.kernels import device_code
from kaleido_kernels.proving.inspect.jobs import Job
from kaleido_kernels.proving.sass.program import Program, parse_program


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a job. ``binary`` is a cubin for NVIDIA devices, else empty.

    ``warps`` are those of a launch, all partitions' and idle ones included; ``ttir`` is as in
    `kaleido_kernels.proving.evidence.Evidence`.
    """

    registers: int
    stack: int
    shared: int
    warps: int
    ttir: str
    ttgir: str
    seconds: float
    binary: bytes


def compile_job(job: Job, arch: str) -> Compiled:
    """Compiles one configuration for ``arch``, as a launch there would.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, which replaces the compiler.
    """
    refuse_interpreter()
    from kaleido_kernels.proving.fake_driver import compile_variant

    variant = variant_of(job, use_asm=not arch.startswith("gfx"))
    started = time.perf_counter()
    compiled = compile_variant(variant, arch)
    seconds = time.perf_counter() - started
    binary = compiled.asm.get("cubin", b"")
    registers, stack = resources(binary) if binary else (0, 0)
    ttir, ttgir = (compiled.asm[kind] for kind in ("ttir" if "ttir" in compiled.asm else "source", "ttgir"))
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    return Compiled(registers, stack, shared, warps, ttir, ttgir, seconds, binary)


def variant_of(job: Job, use_asm: bool = True) -> Any:
    """The `kaleido_kernels.variant.Variant` that an engine launches for a job."""
    kind = CHECKED if job.variant == "checks" else QUIET._replace(jitter=job.jitter)
    return device_code(job.kernel).variant(job.shape, job.precision, job.tile, kind, use_asm)


def refuse_interpreter() -> None:
    """Raises RuntimeError where TRITON_INTERPRET would put the interpreter in the compiler's place."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        raise RuntimeError("TRITON_INTERPRET is set, so nothing would be compiled: unset it and run again")


def resources(binary: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack, from ``cuobjdump -res-usage``."""
    text = _run_tool("cuobjdump", ["-res-usage"], binary)
    registers = [int(value) for value in re.findall(r"\bREG:(\d+)", text)]
    stacks = [int(value) for value in re.findall(r"\bSTACK:(\d+)", text)]
    return max(registers), max(stacks)  # helper functions are listed beside the kernel


def disassemble(binary: bytes) -> Program:
    """The machine code of a cubin."""
    return parse_program(_run_tool("nvdisasm", ["-c"], binary))


def _run_tool(name: str, options: list[str], binary: bytes) -> str:
    """Output of one of the CUDA tools that come with Triton."""
    from triton import knobs

    path = getattr(knobs.nvidia, name).path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        return subprocess.run([path, *options, str(file)], check=True, capture_output=True, text=True).stdout
