"""Carried values that Triton's passes lose: planted in the IR's text, and as the installed Triton loses them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kaleido_kernels.proving.carried import lost_values, read_dataflow

ROOT = Path(__file__).parents[2]
TTIR = """
#loc = loc("/somewhere/kernel.py":1:0)
#loc2 = loc("/somewhere/kernel.py":7:4)
#loc3 = loc("/somewhere/kernel.py":9:8)
#loc4 = loc("/somewhere/kernel.py":12:8)
#loc5 = loc("/somewhere/steps.py":3:8)
#loc12 = loc("x"(#loc2))
#loc13 = loc(callsite(#loc5 at #loc3))
module {
  tt.func public @kernel(%ptr: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("ptr"(#loc)), %first: i32 loc("first"(#loc)), %end: i32 loc("end"(#loc))) attributes {noinline = false} {
    %c0_i32 = arith.constant 0 : i32 loc(#loc)
    %c1_i32 = arith.constant 1 : i32 loc(#loc)
    %zero = arith.constant dense<0.000000e+00> : tensor<64xf32> loc(#loc)
    %place = tt.splat %ptr : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>> loc(#loc)
    %start = tt.load %place : tensor<64x!tt.ptr<f32>> loc(#loc)
    %done:4 = scf.while (%x = %start, %step = %first, %stop = %end, %calm = %zero) : (tensor<64xf32>, i32, i32, tensor<64xf32>) -> (tensor<64xf32>, i32, i32, tensor<64xf32>) {
      %more = arith.cmpi slt, %step, %stop : i32 loc(#loc2)
      scf.condition(%more) %x, %step, %stop, %calm : tensor<64xf32>, i32, i32, tensor<64xf32> loc(#loc2)
    } do {
    ^bb0(%x: tensor<64xf32> loc("x"(#loc2)), %step: i32 loc("step"(#loc2)), %stop: i32 loc("stop"(#loc2)), %calm: tensor<64xf32> loc("calm"(#loc2))):
      %next = arith.addi %step, %c1_i32 : i32 loc(#loc2)
      %change:2 = scf.for %t = %step to %next step %c1_i32 iter_args(%x_1 = %x, %turn = %c0_i32) -> (tensor<64xf32>, i32)  : i32 {
        %even = arith.cmpi eq, %turn, %c0_i32 : i32 loc(#loc3)
        %y = scf.if %even -> (tensor<64xf32>) {
          %z = arith.mulf %x_1, %x_1 : tensor<64xf32> loc(#loc3)
          scf.yield %z : tensor<64xf32> loc(#loc3)
        } else {
          scf.yield %x_1 : tensor<64xf32> loc(#loc3)
        } loc(#loc4)
        %turned = arith.subi %c1_i32, %turn : i32 loc(#loc3)
        scf.yield %y, %turned : tensor<64xf32>, i32 loc(#loc3)
      } loc(#loc13)
      %largest = "tt.reduce"(%change#0) <{axis = 0 : i32}> ({
      ^bb0(%a: f32 loc("a"), %b: f32 loc("b")):
        %c = arith.maxnumf %a, %b : f32 loc(#loc2)
        tt.reduce.return %c : f32 loc(#loc2)
      }) : (tensor<64xf32>) -> f32 loc(#loc2)
      %small = arith.cmpf olt, %largest, %largest : f32 loc(#loc2)
      %stop_2 = arith.select %small, %next, %stop : i32 loc(#loc2)
      %calm_3 = arith.addf %calm, %change#0 : tensor<64xf32> loc(#loc2)
      scf.yield %change#0, %next, %stop_2, %calm_3 : tensor<64xf32>, i32, i32, tensor<64xf32> loc(#loc2)
    } loc(#loc12)
    tt.store %place, %done#0 : tensor<64x!tt.ptr<f32>> loc(#loc)
    tt.store %place, %done#3 : tensor<64x!tt.ptr<f32>> loc(#loc)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""  # noqa: E501
TTGIR = re.sub(r"tensor<64xf32>", "tensor<64xf32, #blocked>", TTIR).replace("#loc3", "#loc33")
FIRST = {"%x": "%start", "%step": "%first", "%stop": "%end", "%calm": "%zero", "%x_1": "%x", "%turn": "%c0_i32"}


def within_rounds(text: str, old: str, new: str) -> str:
    """The text with a value's uses replaced, but not where it is defined."""
    return re.sub(re.escape(old) + r"(?![\w.$#-])(?!:)(?! =)", new, text)


def test_other_layouts_and_numbers_of_places_are_no_loss():
    assert lost_values(TTIR, TTIR) == [] == lost_values(TTIR, TTGIR)


def test_what_a_loop_carries_is_read_with_its_place():
    flow = read_dataflow(TTIR)
    assert [loop.place for loop in flow.loops] == ["steps.py:3:8 from kernel.py:9:8", "kernel.py:7:4"]
    assert [item.kind for item in flow.loops[1].carried] == ["tensor<64xf32>", "i32", "i32", "tensor<64xf32>"]
    assert [place for place, _ in flow.branches] == ["kernel.py:12:8"]


@pytest.mark.parametrize("name", FIRST)
def test_a_value_replaced_by_its_first_one_is_seen(name):
    lost = lost_values(TTIR, within_rounds(TTGIR, name, FIRST[name]))
    where = "kernel.py:7:4" if name in ("%x", "%step", "%stop", "%calm") else "steps.py:3:8 from kernel.py:9:8"
    assert any(line.startswith(where) for line in lost), lost


def test_a_value_no_longer_handed_on_is_seen():
    dropped = TTGIR.replace("scf.yield %change#0, %next, %stop_2", "scf.yield %change#0, %next, %stop")
    assert lost_values(TTIR, dropped), "the end stays what it was: the loop's condition reads it still"


def test_a_loop_that_has_gone_is_seen():
    assert "kernel.py:7:4: the loop has gone" in lost_values(TTIR, TTGIR.replace('kernel.py":7:4', 'kernel.py":8:4'))


COUNTED = "%count_4 = arith.addi %count, %c1_i32 : i32 loc(#loc2)"
CHOSEN = """%late = arith.cmpi slt, %count, %end : i32 loc(#loc2)
      %count_4 = scf.if %late -> (i32) {
        scf.yield %next : i32 loc(#loc2)
      } else {
        scf.yield %count : i32 loc(#loc2)
      } loc(#loc4)"""


@pytest.mark.parametrize("counted", [COUNTED, CHOSEN])
def test_a_value_that_nothing_hangs_on_may_go(counted):
    """A counter that only counts, or that only decides on itself: nothing that the program does is made from it."""
    header = "scf.while (%x = %start, %step = %first, "
    counting = TTIR.replace(header, f"{header}%count = %c0_i32, ")
    counting = re.sub(r"\(tensor<64xf32>, i32, i32, ", "(tensor<64xf32>, i32, i32, i32, ", counting)
    counting = counting.replace("%done:4", "%done:5").replace("%done#3", "%done#4")
    counting = counting.replace("scf.condition(%more) %x, %step, ", "scf.condition(%more) %x, %step, %count, ")
    counting = counting.replace('%stop: i32 loc("stop"', '%count: i32 loc("count"(#loc2)), %stop: i32 loc("stop"')
    counting = counting.replace("%stop_2 =", f"{counted}\n      %stop_2 =")
    counting = counting.replace("scf.yield %change#0, %next, ", "scf.yield %change#0, %next, %count_4, ")
    assert len(read_dataflow(counting).loops[1].carried) == 5
    assert lost_values(counting, TTGIR) == []
    used = counting.replace("tt.return", "tt.store %ptr, %done#2 : !tt.ptr<f32> loc(#loc)\n    tt.return")
    assert lost_values(used, TTGIR) != []


INNER = """
  tt.func private @inner(%p: !tt.ptr<f32>, %n: i32) {
    %c0 = arith.constant 0 : i32 loc(#loc)
    %c1 = arith.constant 1 : i32 loc(#loc)
    %last = scf.for %t = %c0 to %n step %c1 iter_args(%turn = %c0) -> (i32)  : i32 {
      tt.store %p, %turn : !tt.ptr<f32> loc(#loc3)
      %next = arith.addi %turn, %n : i32 loc(#loc3)
      scf.yield %next : i32 loc(#loc3)
    } loc(#loc3)
    %once = scf.for %t = %c0 to %c1 step %c1 iter_args(%turn = %n) -> (i32)  : i32 {
      tt.store %p, %turn : !tt.ptr<f32> loc(#loc4)
      %next = arith.addi %turn, %n : i32 loc(#loc4)
      scf.yield %next : i32 loc(#loc4)
    } loc(#loc4)
    tt.store %p, %once : !tt.ptr<f32> loc(#loc)
    tt.return loc(#loc)
  } loc(#loc)
"""
PLACES = "\n".join(line for line in TTIR.splitlines() if line.startswith("#loc"))
LOOP, ONCE = INNER.index("    %last"), INNER.index("    %once")
CALLED = f"{PLACES}\n{INNER}\n  tt.func public @k(%q: !tt.ptr<f32>) {{\n    tt.call @inner(%q) : () -> ()\n  }}\n"
COPY = INNER[LOOP:ONCE].replace("} loc(#loc3)", "} loc(#loc13)")


def inlined(*copies: str) -> str:
    """Copies of the inner function's first loop as they are inlined; the other one runs once and is no loop then."""
    head = "  tt.func public @k(%p: !tt.ptr<f32>, %n: i32) {\n"
    numbers = "".join(f"    %c{n} = arith.constant {n} : i32 loc(#loc)\n" for n in (0, 1))
    return f"{PLACES}\n#loc13 = loc(callsite(#loc3 at #loc))\n{head}{numbers}{''.join(copies)}\n  }}\n"


def test_loops_of_functions_that_are_inlined_are_matched_wherever_they_went():
    lost = COPY.replace("tt.store %p, %turn", "tt.store %p, %c0")
    assert lost != COPY
    assert lost_values(CALLED, inlined(COPY)) == [] == lost_values(CALLED, inlined(COPY, COPY))
    for copies in ((lost,), (COPY, lost), (lost, COPY)):
        assert any("carries no more: 1 i32" in line for line in lost_values(CALLED, inlined(*copies))), copies
    assert any("kernel.py:9:8: the loop has gone" in line for line in lost_values(CALLED, inlined()))
    often = CALLED.replace("%once = scf.for %t = %c0 to %c1", "%once = scf.for %t = %c0 to %n")
    assert any("kernel.py:12:8: the loop has gone" in line for line in lost_values(often, inlined(COPY)))


def test_results_with_names_of_their_own_are_followed():
    lines = ("%low, %high:2 = tt.split %n : i32 loc(#loc)", "tt.store %ptr, %low : i32 loc(#loc)")
    flow = read_dataflow("\n".join(("tt.func @k(%ptr: i32, %n: i32) {", *lines, "} loc(#loc)")))
    assert len(flow.sources) == 5 and flow.sources[2] == flow.sources[4] == (1,) and 1 in flow.live()


STRETCHES = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kaleido_kernels.proving.carried import lost_values


@triton.jit
def carried(ptr, first, stretches, length, SIZE: tl.constexpr):
    x = tl.load(ptr + tl.arange(0, SIZE))
    step = first
    for number in range(stretches):
        stop = (number + 1) * length
        for _ in range(step, stop):
            x = x * x
        step = stop
    tl.store(ptr + tl.arange(0, SIZE), x)


@triton.jit
def computed(ptr, first, stretches, length, SIZE: tl.constexpr):
    x = tl.load(ptr + tl.arange(0, SIZE))
    for number in range(stretches):
        for _ in range(tl.where(number == 0, first, number * length), (number + 1) * length):
            x = x * x
    tl.store(ptr + tl.arange(0, SIZE), x)


def lost(kernel):
    signature = {"ptr": "*fp32", "first": "i32", "stretches": "i32", "length": "i32", "SIZE": "constexpr"}
    made = triton.compile(ASTSource(kernel, signature, {"SIZE": 128}), target=GPUTarget("cuda", 90, 32))
    return lost_values(made.asm["ttir"], made.asm["ttgir"])


assert lost(computed) == []
assert len(lost(carried)) == (2 if triton.__version__ < "3.8" else 0), lost(carried)  # the loop's, and the bound's
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_what_triton_loses_is_seen(tmp_path):
    """Triton 3.6 and 3.7 lose the begin of each stretch but the first; 3.8 does not."""
    script = tmp_path / "stretches.py"
    script.write_text(STRETCHES)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
