"""Verdicts on machine code: each catches the faults planted for it."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:  # importing it here would fix its mode for the interpreter's tests
    pytest.skip("needs triton", allow_module_level=True)

from machine_code import FLAT_LOOP, HIDDEN_LOOP, LAYER_LOOP, PRODUCT, before, instead, program, without

from kaleido_kernels.proving.verdicts import Evidence, dot_products, has_body, judge, narrow_offsets, spills

TTIR = """
  tt.func public @k(%draws_ptr: !tt.ptr<f32>, %n_draws: i32) {
    %rows = arith.addi %a, %b : tensor<64xi64> loc(#loc1)
    %wide = arith.extsi %n_draws : i32 to i64 loc(#loc1)
    %wide_s = tt.splat %wide : i64 -> tensor<64xi64> loc(#loc1)
    %place = arith.muli %rows, %wide_s : tensor<64xi64> loc(#loc2)
    %p = tt.splat %draws_ptr : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>> loc(#loc3)
    %q = tt.addptr %p, %place : tensor<64x!tt.ptr<f32>>, tensor<64xi64> loc(#loc3)
    %d = tt.dot %x, %w, %c : tensor<64x16xf16> * tensor<16x64xf16> -> tensor<64x64xf32> loc(#loc4)
  }
"""

COUNTING = """
  tt.func public @k(%p: !tt.ptr<i32>, %n: i32) {
    %zero = arith.constant 0 : i32 loc(#loc1)
    %one = arith.constant 1 : i32 loc(#loc1)
    %last = scf.for %t = %zero to %n step %one iter_args(%i = %zero) -> (i32)  : i32 {
      tt.store %p, %i : !tt.ptr<i32> loc(#loc1)
      %next = arith.addi %i, %n : i32 loc(#loc1)
      scf.yield %next : i32 loc(#loc1)
    } loc(#loc2)
    %d = tt.dot %x, %w, %c : tensor<64x16xf16> * tensor<16x64xf16> -> tensor<64x64xf32> loc(#loc4)
  }
"""


def evidence(*lines: str, **options) -> Evidence:
    values = {
        **{"kernel": "narrow", "precision": "fp16", "jitter": "none", "arch": "sm_90", "use_tma": False},
        **{"warps": 4, "registers": 64, "stack": 0, "shared": 40_000},
        **{"ttir": TTIR, "ttgir": TTIR, "program": program(*(lines or HIDDEN_LOOP))},
    }
    return Evidence(**(values | options))


def failed(found: Evidence) -> list[str]:
    return [verdict.name for verdict in judge(found) if not verdict.passed]


def test_sound_kernels_pass_every_verdict():
    assert failed(evidence()) == []
    assert failed(evidence(*FLAT_LOOP, kernel="stream")) == []
    assert failed(evidence(*LAYER_LOOP, kernel="wide", use_tma=True)) == []


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("spills", evidence(*before(HIDDEN_LOOP, "DEPBAR", "STL [R1+0x4], R90"), kernel="wide", jitter="normal")),
        ("spills", evidence(stack=8)),
        ("shared memory", evidence(shared=232_449)),
        ("shared memory", evidence(shared=101_377, arch="sm_89")),
        ("registers", evidence(registers=255, warps=16)),
        ("64-bit offsets", evidence(ttir=TTIR.replace("tensor<64xi64> loc(#loc3)", "tensor<64xi32> loc(#loc3)"))),
        ("input precision", evidence(precision="bf16")),
        ("input precision", evidence(precision="fp16x3")),
        ("input precision", evidence(precision="tf32")),
        ("tensor cores", evidence(*instead(HIDDEN_LOOP, "HGMMA", "HMMA.16816.F32 R24, R56, R60, R24"))),
        ("tensor cores", evidence(*instead(HIDDEN_LOOP, "HGMMA", "FFMA R24, R56, R60, R24"))),
        ("reached code", evidence(*HIDDEN_LOOP, PRODUCT, "EXIT")),
        ("reached code", evidence(*HIDDEN_LOOP, "L_x_7:", "STG.E [R2], R24", "BRA `(.L_x_8)", "L_x_8:", "EXIT")),
        ("hazards", evidence(*without(HIDDEN_LOOP, "DEPBAR"))),
        ("carried values", evidence(ttir=COUNTING, ttgir=COUNTING.replace("tt.store %p, %i", "tt.store %p, %zero"))),
        ("quiet step loop", evidence(*before(HIDDEN_LOOP, "MUFU", "LDS.128 R8, [R90]"))),
        ("fenced operands", evidence(*without(FLAT_LOOP, "FENCE"), kernel="stream")),
        ("barrier order", evidence(*without(LAYER_LOOP, "FENCE"), kernel="wide", use_tma=True)),
        ("barrier order", evidence(*without(LAYER_LOOP, "BAR.SYNC"), kernel="wide", use_tma=True)),
        (
            "barrier order",
            evidence(*instead(LAYER_LOOP, "FENCE", "@P3 FENCE.VIEW.ASYNC.G"), kernel="wide", use_tma=True),
        ),
        ("wide loads", evidence(*before(LAYER_LOOP, "UTMALDG", "LDG.E.U16 R9, [R90]"), kernel="wide", use_tma=True)),
        ("wide loads", evidence(*LAYER_LOOP, kernel="wide", use_tma=False)),
    ],
)
def test_a_planted_fault_fails_its_verdict(name, found):
    assert name in failed(found), [verdict for verdict in judge(found) if verdict.name == name]


def test_spills_outside_the_loops_of_products_are_allowed_in_wide_only():
    lines = before(LAYER_LOOP, "STG", "LDL R9, [R1+0x4]")
    assert spills(evidence(*lines, kernel="wide", stack=8)).passed
    assert not spills(evidence(*lines, kernel="stream", stack=8)).passed


def test_products_of_the_ir():
    fp32 = "%d = tt.dot %x, %w, %c, inputPrecision = tf32 : tensor<64x16xf32> * tensor<16x64xf32> -> tensor<64x64xf32>"
    ieee = fp32.replace(", inputPrecision = tf32", "")
    assert list(dot_products(fp32)) == [("f32", "tf32")] and list(dot_products(ieee)) == [("f32", "ieee")]


def test_offsets_widened_too_late_are_seen():
    late = TTIR.replace(
        "%wide = arith.extsi %n_draws : i32", "%m = arith.muli %n_draws, %pid : i32\n    %wide = arith.extsi %m : i32"
    )
    assert narrow_offsets(TTIR) == [] and len(narrow_offsets(late)) == 1


def test_a_kernel_that_only_traps_has_no_body():
    found = evidence("BPT.TRAP 0x1", "L_x_0:", "BRA `(.L_x_0)")
    assert not has_body(found).passed and has_body(evidence()).passed
