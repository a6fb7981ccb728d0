"""The emulator of compiled kernels, by programs written by hand: what instructions compute, and what it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kaleido_kernels.proving.emulation.block import RULES, Block, Conditions
from kaleido_kernels.proving.emulation.errors import (
    AccessError,
    DeadlockError,
    EmulatorError,
    RaceError,
    UnknownInstructionError,
)
from kaleido_kernels.proving.emulation.memory import GlobalMemory
from kaleido_kernels.proving.emulation.ptx import parse_kernel
from kaleido_kernels.proving.emulation.warps import FLOW

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


def run(
    body: str,
    source: np.ndarray,
    result: np.ndarray,
    number: int = 0,
    threads: int = THREADS,
    shared: int = 4096,
    **conditions,
) -> np.ndarray:
    """Run a program; returns ``result``, which it may have changed."""
    kernel = parse_kernel(HEAD % threads + body + "\n\tret;\n}\n")
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


def integer(name: str, function: Callable[..., int], n: int = 2, kind: str = "u32", result: str = ""):
    """One integer instruction and what it must give, in Python's integers."""
    return pytest.param(name, function, n, kind, result or kind, id=name)


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def cut(a: int, b: int) -> int:
    """Division towards zero; by zero it is by one here."""
    b = b or 1
    return abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)


def permute(a: int, b: int, selector: int) -> int:
    pieces = [(a | b << 32) >> 8 * i & 255 for i in range(8)]
    picked = [selector >> 4 * i & 15 for i in range(4)]
    found = [(255 if pieces[p & 7] & 128 else 0) if p & 8 else pieces[p & 7] for p in picked]
    return sum(byte << 8 * i for i, byte in enumerate(found))


INTEGERS = [
    integer("add.s32", lambda a, b: a + b),
    integer("sub.s64", lambda a, b: a - b, kind="u64"),
    integer("mul.lo.s32", lambda a, b: a * b),
    integer("mul.hi.u32", lambda a, b: a * b >> 32),
    integer("mul.hi.s32", lambda a, b: signed(a, 32) * signed(b, 32) >> 32),
    integer("mul.wide.s32", lambda a, b: signed(a, 32) * signed(b, 32), result="u64"),
    integer("mul.wide.u32", lambda a, b: a * b, result="u64"),
    integer("mad.lo.s32", lambda a, b, c: a * b + c, n=3),
    integer("div.s32", lambda a, b: cut(signed(a, 32), signed(b, 32))),
    integer("rem.s32", lambda a, b: signed(a, 32) - cut(signed(a, 32), signed(b, 32)) * (signed(b, 32) or 1)),
    integer("div.u32", lambda a, b: a // (b or 1)),
    integer("min.s32", lambda a, b: min(signed(a, 32), signed(b, 32))),
    integer("max.u32", max),
    integer("shl.b32", lambda a, b: a << b if b < 32 else 0),
    integer("shr.u32", lambda a, b: a >> b if b < 32 else 0),
    integer("shr.s32", lambda a, b: signed(a, 32) >> min(b, 31)),
    integer("xor.b32", lambda a, b: a ^ b),
    integer("not.b32", lambda a: ~a, n=1),
    integer("neg.s32", lambda a: -a, n=1),
    integer("prmt.b32", permute, n=3),
    integer("shf.l.wrap.b32", lambda a, b, c: ((a | b << 32) << (c & 31)) >> 32, n=3),
    integer("shf.r.wrap.b32", lambda a, b, c: (a | b << 32) >> (c & 31), n=3),
    integer("bfe.u32", lambda a: a >> 3 & 31, n=1),
    integer("cvt.s64.s32", lambda a: signed(a, 32), n=1, result="u64"),
    integer("cvt.u64.u32", lambda a: a, n=1, result="u64"),
    integer("cvt.u32.u64", lambda a: a, n=1, kind="u64", result="u32"),
]


@pytest.mark.parametrize("name, function, n, kind, result", INTEGERS)
@settings(max_examples=8)
@given(data=st.data())
def test_integer_instructions_compute_what_python_does(name, function, n, kind, result, data):
    size = int(kind[1:])
    edges = st.sampled_from([0, 1, 2, 31, 32, 33, 2 ** (size - 1) - 1, 2 ** (size - 1), 2**size - 1])
    values = data.draw(arrays.arrays(f"u{size // 8}", (THREADS, n), elements=st.integers(0, 2**size - 1) | edges))
    operands = ", ".join("%{" + letter + "}" for letter in "xyz"[:n]) + (", 3, 5" if name == "bfe.u32" else "")
    out = np.zeros(THREADS, f"u{int(result[1:]) // 8}")
    run(per_thread(f"{name} %{{o}}, {operands};", n, kind, result), values, out)
    want = [function(*map(int, row)) & (2 ** int(result[1:]) - 1) for row in values]
    assert out.tolist() == want


def bits(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.view(np.float32).copy())


def floating(name: str, function: Callable[..., torch.Tensor], n: int = 1, result: str = "u32"):
    return pytest.param(name, function, n, result, id=name)


FLOATS = [
    floating("add.f32", torch.add, 2),
    floating("mul.f32", torch.mul, 2),
    floating("max.NaN.f32", torch.maximum, 2),
    floating("max.f32", torch.fmax, 2),
    floating("min.f32", torch.fmin, 2),
    floating("abs.f32", torch.abs),
    floating("neg.f32", torch.neg),
    floating("sqrt.rn.f32", lambda x: x.double().sqrt().float()),
    floating("div.rn.f32", torch.div, 2),
    floating("fma.rn.f32", lambda a, b, c: (a.double() * b.double() + c.double()).float(), 3),
    floating("copysign.f32", lambda a, b: torch.copysign(b, a), 2),
    floating("cvt.rn.f16.f32", lambda x: x.half(), result="u16"),
    floating("cvt.rn.bf16.f32", lambda x: x.bfloat16(), result="u16"),
    floating("cvt.rn.f16x2.f32", lambda a, b: torch.stack((b, a), 1).half().flatten(), 2),
    floating("cvt.rn.relu.bf16x2.f32", lambda a, b: torch.stack((b, a), 1).relu().bfloat16().flatten(), 2),
]


@pytest.mark.parametrize("name, function, n, result", FLOATS)
@settings(max_examples=8)
@given(data=st.data())
def test_floating_point_instructions_compute_what_torch_does(name, function, n, result, data):
    edges = st.sampled_from([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x477FE000, 0x477FF000, 0x3F808000])
    values = data.draw(arrays.arrays(np.uint32, (THREADS, n), elements=st.integers(0, 2**32 - 1) | edges))
    operands = ", ".join("%{" + letter + "}" for letter in "xyz"[:n])
    out = np.zeros(THREADS, f"u{int(result[1:]) // 8}")
    run(per_thread(f"{name} %{{o}}, {operands};", n, "u32", result), values, out)
    want = function(*(bits(values[:, i]) for i in range(n)))
    got = torch.from_numpy(out.copy()).view(want.dtype)
    same = (got == want) | (got.isnan() & want.isnan())
    assert same.all(), f"{values[int((~same).nonzero()[0]) % THREADS]}: {got[~same][0]} is not {want[~same][0]}"


@given(size=st.floats(1e-6, 9), sign=st.sampled_from([-1.0, 1.0]))
def test_the_fast_tanh_is_as_far_off_as_its_manual_allows(size, sign):
    values = np.full((THREADS, 1), sign * size, np.float32)
    out = run(per_thread("tanh.approx.f32 %{o}, %{x};", 1, "u32", "u32"), values, np.zeros(THREADS, np.uint32))
    exact = float(np.tanh(np.float64(values[0, 0])))
    assert abs(out.view(np.float32)[0] - exact) <= abs(exact) * 2.0**-11


@pytest.mark.parametrize(
    "comparison, a, b, want",
    [
        ("lt.f32", 1.0, 2.0, True),
        ("lt.f32", float("nan"), 2.0, False),
        ("ltu.f32", float("nan"), 2.0, True),
        ("ge.f32", 2.0, 2.0, True),
        ("ne.f32", float("nan"), 1.0, False),
        ("neu.f32", float("nan"), 1.0, True),
        ("nan.f32", float("nan"), 1.0, True),
        ("num.f32", float("nan"), 1.0, False),
        ("eq.f32", -0.0, 0.0, True),
    ],
)
def test_comparisons_with_nan(comparison, a, b, want):
    values = np.tile(np.array([[a, b]], np.float32), (THREADS, 1))
    body = per_thread(f"setp.{comparison} %p1, %{{x}}, %{{y}};\nselp.b32 %{{o}}, 1, 0, %p1;", 2, "u32", "u32")
    assert (run(body, values, np.zeros(THREADS, np.uint32)) == want).all()


@pytest.mark.parametrize(
    "line, a, b, want",
    [
        ("max.f32", 0.0, -0.0, 0.0),
        ("max.f32", -0.0, 0.0, 0.0),
        ("min.f32", 0.0, -0.0, -0.0),
        ("min.f32", -0.0, 0.0, -0.0),
        ("min.NaN.xorsign.abs.f32", -3.0, 2.0, -2.0),
        ("add.ftz.f32", 1e-40, 0.0, 0.0),
        ("max.ftz.f32", -1e-40, -1.0, -0.0),
    ],
)
def test_signs_of_zeros_and_flushed_values(line, a, b, want):
    values = np.tile(np.array([[a, b]], np.float32), (THREADS, 1))
    out = run(per_thread(f"{line} %{{o}}, %{{x}}, %{{y}};", 2, "u32", "u32"), values, np.zeros(THREADS, np.uint32))
    assert (out == np.array([want], np.float32).view(np.uint32)).all()


def test_a_comparison_reads_its_third_predicate_before_it_writes():
    body = "setp.ge.u32 %p2, %r0, 32;\nsetp.lt.and.u32 %p1|%p2, %r0, 48, %p2;\nselp.b32 %r5, 1, 0, %p1;\n"
    body += "selp.b32 %r6, 2, 0, %p2;\nadd.s32 %r5, %r5, %r6;\n"
    out = run(body + STORE + "st.global.b32 [%rd3], %r5;", np.zeros(1, np.int32), np.zeros(THREADS, np.int32))
    assert out.tolist() == [0] * 32 + [1] * 16 + [2] * 16


def test_comparisons_flush_where_they_are_asked_to():
    values = np.tile(np.array([[1e-45, 0.0]], np.float32), (THREADS, 1))
    for modifier, want in (("", 1), ("ftz.", 0)):
        body = per_thread(f"setp.gt.{modifier}f32 %p1, %{{x}}, %{{y}};\nselp.b32 %{{o}}, 1, 0, %p1;", 2, "u32", "u32")
        assert (run(body, values, np.zeros(THREADS, np.uint32)) == want).all()


def test_guards_that_hold_for_nobody_do_nothing():
    out = np.zeros(THREADS, np.int32)
    body = "setp.lt.u32 %p1, %r0, 0;\n@%p1 trap;\n@%p1 bar.sync 0;\n@%p1 ret;\n"
    assert (run(body + STORE + "st.global.b32 [%rd3], %r0;", out, out) == np.arange(THREADS)).all()
    with pytest.raises(EmulatorError, match="trap"):
        run("setp.lt.u32 %p1, %r0, 1;\n@%p1 trap;", out, out)
    with pytest.raises(EmulatorError, match="a barrier with a guard"):
        run("setp.lt.u32 %p1, %r0, 32;\n@%p1 bar.sync 0;", out, out)


@pytest.mark.parametrize(
    "line", ["shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1", "elect.sync %r5|%p2, -1", "cp.async.commit_group"]
)
def test_what_warps_do_as_a_whole_is_refused_of_a_part(line):
    out = np.zeros(THREADS, np.int32)
    with pytest.raises(EmulatorError, match="by part of a"):
        run(f"setp.lt.u32 %p1, %r0, 16;\n@%p1 {line};", out, out)


def test_a_tensor_may_begin_between_two_aligned_addresses():
    kernel = parse_kernel(HEAD % 32 + "ld.global.b64 %rd5, [%rd0+4];\nst.global.b64 [%rd1], %rd5;\nret;\n}\n")
    memory, source, out = GlobalMemory(), np.arange(5, dtype=np.int32), np.zeros(1, np.int64)
    first = memory.add("source", source.view(np.uint8), 4).start
    second = memory.add("result", out.view(np.uint8), 0).start
    values = dict(zip(kernel.parameters, [first, second, 0], strict=True))
    Block(kernel, memory, values, {}, 64, Conditions()).run(0, 1)
    assert out.view(np.int32).tolist() == [1, 2]


def test_a_narrow_parameter_keeps_its_sign_in_a_wide_register():
    out = np.zeros(THREADS, np.int64)
    body = "ld.param.s32 %rd5, [program_param_2];\nmul.wide.u32 %rd3, %r0, 8;\nadd.s64 %rd3, %rd3, %rd1;\n"
    assert (run(body + "st.global.b64 [%rd3], %rd5;", np.zeros(1, np.int32), out, number=-5) == -5).all()


def test_threads_that_part_meet_again():
    body = """
	mov.b32 %r5, 0;
	mov.b32 %r6, 0;
$again:
	add.s32 %r6, %r6, %r5;
	add.s32 %r5, %r5, 1;
	setp.le.u32 %p1, %r5, %r0;
	@%p1 bra $again;
	setp.gt.u32 %p2, %r0, 40;
	@%p2 bra $large;
	add.s32 %r6, %r6, 1000;
	bra.uni $end;
$large:
	add.s32 %r6, %r6, 2000;
$end:
	mul.wide.u32 %rd3, %r0, 4;
	add.s64 %rd3, %rd3, %rd1;
	st.global.b32 [%rd3], %r6;
"""
    out = run(body, np.zeros(1, np.int32), np.zeros(THREADS, np.int32))
    assert out.tolist() == [t * (t + 1) // 2 + (2000 if t > 40 else 1000) for t in range(THREADS)]


REVERSE = """
	shl.b32 %r5, %r0, 2;
	st.shared.b32 [%r5], %r0;
	bar.sync 0;
	sub.s32 %r6, 252, %r5;
	ld.shared.b32 %r7, [%r6];
	cvt.u64.u32 %rd3, %r5;
	add.s64 %rd3, %rd3, %rd1;
	st.global.b32 [%rd3], %r7;
"""
APART: list[dict[str, Any]] = [{}, {"groups": (32, 32), "order": (0, 1)}, {"groups": (32, 32), "order": (1, 0)}]
APART += [{"apart": True, "seed": seed} for seed in range(3)]


@pytest.mark.parametrize("conditions", APART)
def test_values_pass_from_warp_to_warp_over_a_barrier(conditions):
    out = run(REVERSE, np.zeros(1, np.int32), np.zeros(THREADS, np.int32), **conditions)
    assert out.tolist() == list(range(THREADS))[::-1]


def test_a_missing_barrier_shows_when_warps_run_apart():
    body = REVERSE.replace("bar.sync 0;", "")
    together = run(body, np.zeros(1, np.int32), np.zeros(THREADS, np.int32))
    assert together.tolist() == list(range(THREADS))[::-1]
    first = run(body, np.zeros(1, np.int32), np.zeros(THREADS, np.int32), groups=(32, 32), order=(0, 1))
    assert (first[:32] == -1).all(), "shared memory that nothing was written to is not what it was"


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


STORE = "mul.wide.u32 %rd3, %r0, 4;\nadd.s64 %rd3, %rd3, %rd1;\n"


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


def test_warps_that_wait_for_nobody_are_told():
    out = np.zeros(THREADS, np.int32)
    body = "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $first;\nbar.sync 0;\nbra.uni $end;\n$first:\nbar.sync 0;\n$end:"
    with pytest.raises(DeadlockError, match="different barriers"):
        run(body, out, out)
    with pytest.raises(DeadlockError, match="nobody can go on"):
        run("setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $end;\nbar.sync 0;\n$end:", out, out, groups=(32, 32))
    waiting = "mov.b32 %r5, 0;\nmbarrier.init.shared::cta.b64 [%r5], 1;\n"
    waiting += "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r5], 0;"
    with pytest.raises(DeadlockError, match="try_wait"):
        run(waiting, out, out)


def test_a_loop_without_end_is_told():
    out = np.zeros(THREADS, np.int32)
    with pytest.raises(DeadlockError, match="no end after 1,"):
        run("$again:\nadd.s32 %r5, %r0, 1;\nbra.uni $again;", out, out, most_instructions=1000)


def test_arrivals_and_bytes_that_do_not_add_up_are_told():
    out = np.zeros(THREADS, np.int32)
    begin = "mov.b32 %r5, 0;\nmbarrier.init.shared::cta.b64 [%r5], 1;\nsetp.lt.u32 %p1, %r0, 2;\n"
    with pytest.raises(RaceError, match=r"bytes more|more arrivals"):
        run(begin + "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 128;", out, out)
    with pytest.raises(AccessError, match="an mbarrier in"):
        run(begin.replace("mov.b32 %r5, 0", "mov.b32 %r5, 9999"), out, out)
    with pytest.raises(EmulatorError, match="no mbarrier at byte 8"):
        run(begin + "mbarrier.arrive.shared::cta.b64 _, [%r5+8];", out, out)


@pytest.mark.parametrize(
    "line, message",
    [
        ("brev.b32 %r1, %r2;", r"brev\.b32"),
        ("ld.acquire.gpu.global.b32 %r1, [%rd0];", "this form of ld"),
        ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1}, {%r2}, {%r3}, {%r1};", "this form of mma"),
        ("bra $nowhere;", "no label"),
    ],
)
def test_an_instruction_without_a_rule_is_named(line, message):
    with pytest.raises(UnknownInstructionError, match=message):
        run(line, np.zeros(1, np.int32), np.zeros(1, np.int32))


FORMS = """
cvt.rp.f16.f32 %rs1, %r2; cvt.rn.sat.f16.f32 %rs1, %r2; cvt.rn.satfinite.f16.f32 %rs1, %r2; cvt.rni.f32.f32 %r1, %r2;
cvt.sat.f32.f32 %r1, %r2; cvt.ftz.f32.f32 %r1, %r2; cvt.rz.f32.s32 %r1, %r2; cvt.sat.u16.u32 %rs1, %r2;
cvt.rzi.s64.f32 %rd1, %r2; cvt.pack.sat.s16.s32 %r1, %r2, %r3; cvt.u32.u16 %r1, %r2; cvt.s64.s32 %rd1, %rd2;
mad.rn.f32 %r1, %r2, %r3, %r4; max.f32 %r1, %r2, %r3, %r4; add.s32 %r1, %r2; add.rz.f32 %r1, %r2, %r3;
mul.rm.f32 %r1, %r2, %r3; fma.rz.f32 %r1, %r2, %r3, %r4; div.rz.f32 %r1, %r2, %r3; sqrt.rm.f32 %r1, %r2;
add.sat.s32 %r1, %r2, %r3; add.sat.f32 %r1, %r2, %r3; max.relu.s32 %r1, %r2, %r3;
fma.rn.relu.f16 %rs1, %rs2, %rs3, %rs4;
add.cc.s32 %r1, %r2, %r3; addc.s32 %r1, %r2, %r3; shf.l.clamp.b32 %r1, %r2, %r3, %r4; prmt.b32.f4e %r1, %r2, %r3, %r4;
tanh.approx.f16 %rs1, %rs2; ex2.approx.f16 %rs1, %rs2; add.f64 %rd1, %rd2, %rd3; bfe.u32 %r1, %r2, %r3, 4;
bfe.u32 %r1, %r2, 30, 4; mov.b32 %r1, %rd2; mov.b64 %rd1, %r2; selp.f64 %rd1, %rd2, %rd3, %p1;
setp.lt.s32 %p1, %r2, %r3, %p2; setp.lt.and.s32 %p1, %r2, %r3; set.eq.u32.u32 %r1, %r2, %r3;
ld.volatile.global.b32 %r1, [%rd0]; ld.relaxed.gpu.global.b32 %r1, [%rd0]; st.release.gpu.global.b32 [%rd0], %r1;
atom.global.add.u32 %r1, [%rd0], 1; red.global.add.u32 [%rd0], 1; vote.sync.ballot.b32 %r1, %p1, -1;
ld.local.b32 %r1, [%r2];
cp.async.ca.shared.global [%r1], [%rd0], 4, %p1; cp.async.mbarrier.arrive.noinc.shared.b64 [%r1];
cp.async.bulk.tensor.1d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd0, {%r2}], [%r3];
mbarrier.try_wait.shared::cta.b64 %p1, [%r1], %rd2; mbarrier.arrive.noComplete.shared::cta.b64 _, [%r1], 1;
bar.arrive 0, 64; bar.red.popc.u32 %r1, 0, %p1; barrier.cluster.arrive; fence.proxy.tensormap::generic.release.gpu;
ldmatrix.sync.aligned.m8n8.x4.shared.b8 {%r1, %r2, %r3, %r4}, [%r5];
ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r1}, [%r5];
wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {%r1, %r2}, %rd1, %rd2, 1, 1, 1, 0, 0;
mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1, %r2}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r1, %r2};
"""
"""Legal PTX whose modifiers or operands change what it does, and for which there is no rule."""


@pytest.mark.parametrize("line", [line.strip() for line in FORMS.replace("\n", " ").split(";") if line.strip()])
def test_a_form_without_a_rule_is_refused_and_not_taken_for_another(line):
    with pytest.raises(UnknownInstructionError, match=re.escape(line.split()[0])):
        run(line + ";", np.zeros(1, np.int32), np.zeros(1, np.int32))


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


def test_every_rule_names_its_section_of_the_manual():
    sections = {name: section for name, (section, _) in FLOW.items()} | {
        name: rule.section for name, rule in RULES.items()
    }
    for name, section in sections.items():
        assert re.fullmatch(r"[A-Z].*Instructions: .+", section), f"{name}: {section}"


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


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--arch", "sm_80"], "the emulator knows sm_90 only"),
        (["--net", "digits"], "TRITON_INTERPRET is set"),
        (["--chains", "none"], "no whole number from 1"),
        (["--net", "digitz"], "invalid choice"),
    ],
)
def test_a_command_that_cannot_run_says_why_in_one_line(arguments, message):
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root / "kernels")}
    command = [sys.executable, "-m", "kaleido_kernels.emulate", *arguments]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert message in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("version", ["installed", "3.6.0", "3.8.0"])
def test_all_compiled_kernels_are_right_under_each_release_of_triton(version, tmp_path):
    """The kernels' own tests and those of the six networks, every one of them, in the emulator; 20 minutes or more."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    if version != "installed":
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "triton")]
        subprocess.run([*install, f"triton=={version}"], check=True)
        env["PYTHONPATH"] = str(tmp_path / "triton")
    tests = [
        *sorted(str(path) for path in (Path(__file__).parents[1] / "kernels").glob("test_*.py")),
        "tests/proving/test_emulated.py",
    ]
    options = ["--emulate", "-q", "-n", "auto", "--maxprocesses", "8", "-p", "no:cacheprovider", "-rP"]
    command = [sys.executable, "-m", "pytest", *options, "-m", "slow or not slow", *tests]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
