"""What instructions of the emulator compute: as Python and torch do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from ptx_programs import STORE, THREADS, per_thread, run


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
