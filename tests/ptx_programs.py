"""PTX programs written by hand, run in the emulator."""

from __future__ import annotations

import re

import numpy as np

from kaleido_kernels.proving.emulation.block import Block, Conditions
from kaleido_kernels.proving.emulation.memory import GlobalMemory
from kaleido_kernels.proving.emulation.ptx import parse_kernel

THREADS = 64
HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry program(
	.param .u64 .ptr .global .align 1 program_param_0,
	.param .u64 .ptr .global .align 1 program_param_1,
	.param .s32 program_param_2
)
.reqntid %d
{
	.reg .pred %%p<9>;
	.reg .b16 %%rs<9>;
	.reg .b32 %%r<20>;
	.reg .b64 %%rd<20>;
	ld.param.b64 %%rd0, [program_param_0];
	ld.param.b64 %%rd1, [program_param_1];
	mov.u32 %%r0, %%tid.x;
"""
"""Parameters 0 and 1 are tensors, 2 a number; %r0 is the thread."""
STORE = "mul.wide.u32 %rd3, %r0, 4;\nadd.s64 %rd3, %rd3, %rd1;\n"
"""The place of a thread's 32 bits in the result, in %rd3."""


def run(
    body: str,
    source: np.ndarray,
    result: np.ndarray,
    number: int = 0,
    threads: int = THREADS,
    shared: int = 4096,
    registers: int = 0,
    **conditions,
) -> np.ndarray:
    """Run a program; returns ``result``, which it may have changed. ``registers`` are those of a thread that starts."""
    text = HEAD % threads + body + "\n\tret;\n}\n"
    kernel = parse_kernel(text.replace("\n{", f"\n.maxnreg {registers}\n{{", 1) if registers else text)
    memory = GlobalMemory()
    pointers = [
        memory.add(name, data.reshape(-1).view(np.uint8), 0).start
        for name, data in (("source", source), ("result", result))
    ]
    values = dict(zip(kernel.parameters, [*pointers, number], strict=True))
    with np.errstate(all="ignore"):
        Block(kernel, memory, values, {}, shared, Conditions(**conditions)).run(0, 1)
    return result


def per_thread(text: str, n: int, kind: str, result: str) -> str:
    """A program that loads ``n`` values a thread into %{x,y,z}, computes, and stores %{o} of the type ``result``."""
    registers = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}
    size, out = int(kind[1:]) // 8, int(result[1:]) // 8
    name = registers[size]
    lines = [f"mul.wide.u32 %rd2, %r0, {n * size};", "add.s64 %rd2, %rd2, %rd0;"]
    lines += [f"ld.global.{kind} {name}{5 + i}, [%rd2+{i * size}];" for i in range(n)]
    places = {letter: f"{name}{5 + i}" for i, letter in enumerate("xyz"[:n])} | {"o": f"{registers[out]}8"}
    lines += [re.sub(r"%\{(\w)\}", lambda found: places[found[1]], text)]
    lines += [f"mul.wide.u32 %rd3, %r0, {out};", "add.s64 %rd3, %rd3, %rd1;", f"st.global.{result} [%rd3], %{{o}};"]
    return "\n".join(lines).replace("%{o}", places["o"])
