"""Verdicts on machine code: planted faults each verdict must catch, and real compilations in a process of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from proving.test_roofline import STUDY

if importlib.util.find_spec("triton") is None:  # importing it here would fix its mode for the interpreter's tests
    pytest.skip("needs triton", allow_module_level=True)

from kaleido_kernels.proving.inspect.command import make_parser
from kaleido_kernels.proving.inspect.jobs import FORM_NAMES, Job
from kaleido_kernels.proving.inspect.report import Report
from kaleido_kernels.proving.inspect.table import table, three_figures
from kaleido_kernels.proving.sass.memory import unfenced_products, unordered_loads
from kaleido_kernels.proving.sass.program import parse_program
from kaleido_kernels.proving.sass.registers import find_hazards, written_registers
from kaleido_kernels.proving.sass.rounds import CopyOrder, copy_order, count_kinds, path_counts
from kaleido_kernels.proving.verdicts import Evidence, dot_products, has_body, judge, narrow_offsets, spills
from kaleido_kernels.shapes import NETWORKS
from kaleido_kernels.tile import Tile

ROOT = Path(__file__).parents[2]
MOST_INSTRUCTIONS = {"points1d": 150, "points2d": 220}  # of a step; points2d is bound by its products


def program(*lines: str):
    """Instructions as text, one address each; a line that ends with a colon is a label."""
    text, address = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(f".{line}")
        else:
            text.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return parse_program("\n".join(text))


HIDDEN_LOOP = (
    "L_x_0:",
    "WARPGROUP.ARRIVE",
    "HGMMA.64x64x16.F32 R24, R56, gdesc[UR8], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "F2FP.F16.F32.PACK_AB R56, R25, R24",
    "MUFU.EX2 R3, R24",
    "ISETP.NE.AND P0, PT, R2, RZ, PT",
    "@P0 BRA `(.L_x_0)",
    "STG.E.128 desc[UR4][R2.64], R24",
    "EXIT",
)
LAYER_LOOP = (  # loop over layers > loop over output tiles > loop of products, then fence and barrier
    "L_x_9:",
    "LDG.E R88, desc[UR4][R86.64]",
    "L_x_1:",
    "MOV R90, R88",
    "L_x_2:",
    "UTMALDG.2D [UR8], [UR6]",
    "HGMMA.64x64x16.F32 R24, gdesc[UR4], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "@P0 BRA `(.L_x_2)",
    "STG.E.128 desc[UR4][R2.64], R24",
    "@P1 BRA `(.L_x_1)",
    "FENCE.VIEW.ASYNC.G",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "@P2 BRA `(.L_x_9)",
    "EXIT",
)
FLAT_LOOP = (  # the stream kernel's: operands stored and copied by threads, fenced, multiplied
    "L_x_0:",
    "STSM.16.M88.4 [R104+0x10000], R88",
    "DEPBAR.LE SB0, 0x0",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "FENCE.VIEW.ASYNC.S",
    "HGMMA.64x128x16.F32 R24, gdesc[UR40].tnspB, R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "LDGSTS.E.BYPASS.128 [R93], desc[UR50][R22.64], !P0",
    "LDGDEPBAR",
    "@P0 BRA `(.L_x_0)",
    "STG.E.128 desc[UR4][R2.64], R24",
    "EXIT",
)
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


def without(lines: tuple[str, ...], text: str) -> tuple[str, ...]:
    return tuple(line for line in lines if text not in line)


def instead(lines: tuple[str, ...], text: str, new: str) -> tuple[str, ...]:
    assert any(text in line for line in lines)
    return tuple(new if text in line else line for line in lines)


def before(lines: tuple[str, ...], text: str, new: str) -> tuple[str, ...]:
    place = next(number for number, line in enumerate(lines) if text in line)
    return (*lines[:place], new, *lines[place:])


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


PRODUCT = "HGMMA.64x64x16.F32 R24, R56, gdesc[UR8], R24, gsb0"


@pytest.mark.parametrize(
    ("lines", "hazard"),
    [
        ((PRODUCT, "MOV R56, R2"), True),  # the left operand
        ((PRODUCT, "MOV R59, R2"), True),  # its last register
        ((PRODUCT, "MOV R60, R2"), False),
        ((PRODUCT, "MOV R4, R56"), False),  # reading the left operand is allowed
        ((PRODUCT, "MOV R4, R55"), True),  # reading the last accumulator is not
        ((PRODUCT, "LDS.128 R20, [R2]"), False),
        ((PRODUCT, "LDS.128 R21, [R2]"), True),  # the vector's end reaches R24
        ((PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R56, R2"), False),
        ((PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R56, R2"), True),
        ((PRODUCT, "HGMMA.64x64x16.F32 R24, R64, gdesc[UR8], R24, gsb0"), False),  # products chain
        ((PRODUCT, PRODUCT.replace("R24", "R88"), "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R4, R24"), False),
        ((PRODUCT, "BRA `(.L_x_3)", "NOP", "L_x_3:", "MOV R56, R2"), True),  # along a branch
        ((PRODUCT, "STG.E desc[UR4][R2.64], R24"), True),  # a store reads it
    ],
)
def test_hazards_are_seen_where_they_are(lines, hazard):
    assert bool(find_hazards(program(*lines, "EXIT"))) == hazard


def test_a_hazard_across_the_back_edge_is_seen():
    lines = ("L_x_0:", "MOV R56, R2", PRODUCT, "@P0 BRA `(.L_x_0)", "EXIT")
    assert find_hazards(program(*lines))


@pytest.mark.parametrize(
    ("lines", "sound"),
    [
        (FLAT_LOOP, True),
        (instead(FLAT_LOOP, "FENCE", "FENCE.VIEW.ASYNC.G"), False),  # of global memory
        (without(without(FLAT_LOOP, "STSM"), "FENCE"), False),  # copied operands alone
        (without(without(FLAT_LOOP, "DEPBAR.LE SB0"), "FENCE"), False),  # stored ones alone
        (before(without(FLAT_LOOP, "FENCE"), "STSM", "FENCE.VIEW.ASYNC.S"), False),  # too early
        (("STS [R2], R4", *without(FLAT_LOOP[:1] + FLAT_LOOP[5:7] + FLAT_LOOP[9:], "FENCE")), False),  # before the loop
        (("L_x_9:", "NOP", *FLAT_LOOP[:1], *FLAT_LOOP[5:7], *FLAT_LOOP[9:10], "STS [R2], R4", "BRA `(.L_x_9)"), True),
    ],
)
def test_operands_that_threads_put_into_shared_memory_are_fenced(lines, sound):
    assert (unfenced_products(program(*lines)) == []) == sound


def test_loops_are_natural_loops():
    """A spin wait out of line jumps back into the middle of a loop and is no loop around it."""
    found = program(
        *("L_x_1:", "MOV R1, R2", "L_x_3:", "SYNCS.PHASECHK P1, [UR8], R3", "@!P1 BRA `(.L_x_2)", "L_x_6:", PRODUCT),
        *("@P0 BRA `(.L_x_1)", "EXIT", "L_x_2:", "SYNCS.PHASECHK P1, [UR8], R3", "@!P1 BRA `(.L_x_2)"),
        *("BRA `(.L_x_6)", "L_x_7:", "BRA `(.L_x_7)"),
    )
    sizes = [sum(1 for _ in found.inside(loop)) for loop in found.loops]
    assert sizes == [8, 2, 1], "the loop with its wait, the wait, the trap"
    assert len(found.tensor_loops) == 1


def test_ways_through_a_loop_with_a_branch():
    found = program(
        *("L_x_0:", PRODUCT, "@P1 BRA `(.L_x_1)", "MUFU.EX2 R3, R4", "MUFU.RCP R3, R4", "L_x_1:", "@P0 BRA `(.L_x_0)"),
        "EXIT",
    )
    common, rare = path_counts(found, found.tensor_loops[0])
    assert (common["all"], rare["all"], common["MUFU"], rare["MUFU"]) == (3, 5, 0, 2)
    assert count_kinds(found.instructions)["all"] == 6


COPY = "LDGSTS.E.BYPASS.128 [R93], desc[UR50][R22.64], !P0"
FLAT_BODY = FLAT_LOOP[1:8]  # from the stored operand to the copy
SHARED = "HGMMA.64x128x16.F32 R24, gdesc[UR40].tnspB, R24, gsb0"
PHASE, BULK = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR15+0x24000], R160", "UTMALDG.2D [UR32], [UR16]"
ALL_DONE, ONE_LEFT = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"


def loop_of(*body: str):
    return program("L_x_0:", *body, "@P0 BRA `(.L_x_0)", "EXIT")


@pytest.mark.parametrize(
    ("lines", "order"),
    [
        # Two stages of stream: every copy is waited for, and issued behind the product.
        (FLAT_LOOP, CopyOrder(1, 0.0, 3 / 8)),  # closing the group, the branch, the store of the operand
        # Three stages leave one group of copies in flight.
        (instead(FLAT_LOOP, "DEPBAR.LE SB0", "DEPBAR.LE SB0, 0x1"), CopyOrder(2, 0.0, 3 / 8)),
        # Issued between wait and product, they run beside it.
        (before(without(FLAT_LOOP, "LDGSTS"), "HGMMA", COPY), CopyOrder(1, 1.0, 4 / 8)),
        # Two groups of copies a round (high and low halves).
        (
            before(instead(FLAT_LOOP, "DEPBAR.LE SB0", "DEPBAR.LE SB0, 0x2"), "@P0", "LDGDEPBAR"),
            CopyOrder(2, 0.0, 4 / 9),
        ),
    ],
)
def test_the_order_of_copies_by_threads_and_products(lines, order):
    found = program(*lines)
    read = copy_order(found, found.tensor_loops[0])
    assert read is not None and read.ahead == order.ahead
    assert (read.products, read.other) == pytest.approx((order.products, order.other))


@pytest.mark.parametrize(
    ("body", "products"),
    [
        ((PHASE, SHARED, ONE_LEFT, BULK), 1.0),  # wide in 16 bits
        ((PHASE, SHARED, ALL_DONE, BULK), 0.0),
        ((PHASE, SHARED, ALL_DONE, SHARED, ALL_DONE, SHARED, BULK), 1 / 3),  # wide in split fp32
        ((PHASE, SHARED, ALL_DONE, SHARED, BULK, ALL_DONE, SHARED), 2 / 3),
        ((PHASE, BULK, SHARED, ALL_DONE), 1.0),
        ((PHASE, SHARED, SHARED, BULK, ONE_LEFT), 1.0),
        ((PHASE, SHARED, SHARED, ONE_LEFT, BULK), 0.5),
    ],
)
def test_the_order_of_the_copy_engine_and_products_wherever_the_round_begins(body, products):
    for turn in range(len(body)):
        found = loop_of(*body[turn:], *body[:turn])
        read = copy_order(found, found.tensor_loops[0])
        assert read is not None and read.ahead is None, "the barrier in memory decides"
        assert read.products == pytest.approx(products), body[turn:]


def test_a_loop_without_copies_has_no_order_of_them():
    found = program(*HIDDEN_LOOP)
    assert copy_order(found, found.tensor_loops[0]) is None


def test_plain_products_are_done_when_they_are_passed():
    product = "FFMA R4, R8, R12, R4"
    for body, share in (
        ((COPY, product, product), 1.0),
        ((product, COPY, product), 0.5),
        ((product, product, COPY), 0),
    ):
        found = loop_of("DEPBAR.LE SB0, 0x0", "LDS.128 R8, [R2]", *body, "LDGDEPBAR")
        read = copy_order(found, found.work_loops[0])
        assert read is not None and (read.ahead, read.products) == (1, share)


def test_a_rare_part_of_a_round_does_not_count():
    rare = ("@P1 BRA `(.L_x_1)", "MUFU.EX2 R3, R4", COPY, PRODUCT, "L_x_1:", "NOP")
    plain = loop_of(*FLAT_BODY, "LDGDEPBAR", "NOP", "NOP")
    branched = loop_of(*FLAT_BODY, "LDGDEPBAR", *rare)
    assert copy_order(branched, branched.tensor_loops[0]) == copy_order(plain, plain.tensor_loops[0])


@pytest.mark.parametrize(
    ("line", "registers"),
    [
        ("LDG.E.128 R4, desc[UR4][R2.64]", {4, 5, 6, 7}),
        ("LDSM.16.M88.4 R8, [R2]", {8, 9, 10, 11}),
        ("IMAD.WIDE R6, R2, 0x4, R8", {6, 7}),
        ("CS2R R10, SRZ", {10, 11}),
        ("SHFL.BFLY PT, R9, R8, 0x1, 0x1f", {9}),
        ("STS.128 [R4], R8", set()),
        ("ISETP.GE.AND P0, PT, R0, 0x1, PT", set()),
        ("LDG.E R0, desc[UR40][R2.64+0x8]", {0}),
    ],
)
def test_written_registers(line, registers):
    assert written_registers(program(line).instructions[0]) == registers


def test_the_state_pass_may_load_other_blocks_while_it_stores():
    """Rounds of a loop without a fence touch different places; behind the loop the order counts."""
    state = ("L_x_0:", "LDG.E R4, [R2]", "STG.E [R8], R4", "@P0 BRA `(.L_x_0)")
    after = ("L_x_1:", "UTMALDG.2D [UR8], [UR6]", PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "@P0 BRA `(.L_x_1)", "EXIT")
    assert unordered_loads(program(*state, "FENCE.VIEW.ASYNC.G", "BAR.SYNC 0x0", *after)) == []
    assert unordered_loads(program(*state, "BAR.SYNC 0x0", "FENCE.VIEW.ASYNC.G", *after)), "wrong order"
    assert unordered_loads(program(*state, "FENCE.VIEW.ASYNC.S", "BAR.SYNC 0x0", *after)), "fence of shared memory"


def test_products_of_the_ir():
    fp32 = "%d = tt.dot %x, %w, %c, inputPrecision = tf32 : tensor<64x16xf32> * tensor<16x64xf32> -> tensor<64x64xf32>"
    ieee = fp32.replace(", inputPrecision = tf32", "")
    assert list(dot_products(fp32)) == [("f32", "tf32")] and list(dot_products(ieee)) == [("f32", "ieee")]


def test_offsets_widened_too_late_are_seen():
    late = TTIR.replace(
        "%wide = arith.extsi %n_draws : i32", "%m = arith.muli %n_draws, %pid : i32\n    %wide = arith.extsi %m : i32"
    )
    assert narrow_offsets(TTIR) == [] and len(narrow_offsets(late)) == 1


def test_reference_networks_are_those_of_the_presets():
    from kaleido_fast import presets

    for name, network in presets.NETWORKS.items():
        assert NETWORKS[name].widths == network.widths and NETWORKS[name].bound == network.bound
    assert set(NETWORKS) == set(presets.NETWORKS)


def test_an_unknown_network_is_refused(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--net", "minst"])
    assert "mnist" in capsys.readouterr().err


def test_the_table_counts_memory_instructions_in_the_loop_and_outside_of_it():
    job = Job("points1d", NETWORKS["points1d"], Tile("narrow", 64, 4), "fp16", "none")
    total, loop = {"HGMMA": 10, "STG": 9, "MUFU": 16, "all": 600}, {"HGMMA": 10, "MUFU": 15, "all": 132}
    (_, line, *_) = table([Report(job, "sm_90", 64, 0, 9216, 1.0, total, loop, (), None)]).splitlines()
    assert line.endswith("  HGMMA:10 MUFU:15 | MUFU:1 STG:9") and " 132 " in line


def run_command(*arguments: str, interpret: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: this one may have the interpreter switched on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    if interpret:
        environment["TRITON_INTERPRET"] = interpret
    return subprocess.run(
        [sys.executable, "-m", "kaleido_kernels.inspect", *arguments],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip


def test_the_interpreter_is_refused():
    result = run_command("--net", "points1d", interpret="1")
    assert result.returncode == 2 and "TRITON_INTERPRET" in result.stderr


def test_without_triton_it_says_what_to_install():
    script = "import sys; sys.modules['triton'] = None; sys.path_importer_cache.clear()\n"
    script += "import importlib.util; importlib.util.find_spec = lambda name: None\n"
    script += "from kaleido_kernels.proving.inspect import command; sys.exit(command.main(['--net', 'points1d']))"
    result = run_script(script)
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr == "error: Triton is not installed, and it compiles the kernels: pip install triton (on Linux)\n"
    )


def check_estimate(record: dict) -> None:
    """The range holds the study's figure, its middle is within a tenth of it; narrow's step loop is short.

    bf16 is held to the figures of fp16: its loops have the same copies and products.
    """
    name, precision, guess = record["net"], record["precision"], record["estimate"]
    figures = STUDY.get((name, "fp16" if precision == "bf16" else precision))
    if figures is not None:
        middle = sum(figures) / 2
        what = f"{name} {precision}: {guess['low']['milliseconds']:.4g} to {guess['high']['milliseconds']:.4g} ms"
        assert guess["milliseconds"] == pytest.approx(middle, rel=0.1), what
        assert guess["low"]["milliseconds"] <= middle <= guess["high"]["milliseconds"], what
    assert record["loop_instructions"]["all"] <= MOST_INSTRUCTIONS.get(name, 10**6) or precision == "fp16x3", name


@pytest.mark.parametrize("net", ["points1d", "mnist"])
def test_a_quick_subset_compiles_and_passes(net):
    result = run_command("--net", net, "--precision", "fp16", "--variant", "none", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    (record, *_) = json.loads(result.stdout)
    check_estimate(record)
    assert record["loop_instructions"]["HGMMA"] > 0 and record["shared"] <= 232_448
    assert all(verdict["passed"] for verdict in record["verdicts"]) and len(record["verdicts"]) >= 8
    guess = record["estimate"]
    assert guess["note"] == "model, not a measurement"
    assert 0 < guess["low"]["milliseconds"] < guess["milliseconds"] < guess["high"]["milliseconds"]
    if net == "points1d":
        assert guess["overlap"] is None, "narrow loads nothing in its loop"
    else:
        assert (guess["overlap"]["ahead"], guess["overlap"]["products"]) == (2, 1.0), "two tiles ahead, behind products"


ORDERS = """
from kaleido_kernels.proving.inspect.compiling import compile_job, disassemble
from kaleido_kernels.proving.inspect.estimating import read_overlap
from kaleido_kernels.proving.inspect.jobs import Job
from kaleido_kernels.proving.roofline.loops import Overlap
from kaleido_kernels.proving.roofline.work import stream_overlap, wide_overlap
from kaleido_kernels.shapes import NETWORKS
from kaleido_kernels.tile import Tile
from kaleido_kernels.wide.plan import WideTile

def read(net, tile, precision, planned):
    job = Job(net, NETWORKS[net], tile, precision, "none")
    return read_overlap(disassemble(compile_job(job, "sm_90").binary), planned)

for net, stages in (("digits", 2), ("deep128", 3)):
    found = read(net, Tile("stream", 128, 8, stages), "fp16", Overlap(99, 1.0, 1.0))
    assert (found.ahead, found.products) == (stages - 1, 0.0), (net, stages, found)
    assert found.ahead == stream_overlap(stages).ahead and stream_overlap(stages).products == 0, (net, found)
    assert found.other < 0.5, (net, stages, found)
for tile in (WideTile(stages=2), WideTile(inner=32, stages=4)):
    planned = wide_overlap("fp16x3", tile.stages)
    found = read("mnist", tile, "fp16x3", Overlap(planned.ahead, 9.0))
    assert abs(found.products - planned.products) < 1e-9 and found.ahead == tile.stages - 1, (tile, found)
"""


def test_stages_mean_to_the_model_what_the_compiled_loops_do():
    """Two stages of stream wait for all copies; wide in split fp32 issues them behind two of three products."""
    result = run_script(ORDERS)
    assert result.returncode == 0, result.stderr


def page_of_predictions() -> dict[tuple[str, str], str]:
    """(network, precision) -> the range that docs/kernels.md shows."""
    text = (ROOT / "docs/kernels.md").read_text()
    rows = re.findall(r"^\| (\w+) \| [^|]* \| ([\d.,-]+) \| ([\d.,-]+) \| [\d-]+ % \|$", text, re.M)
    return {
        (net, form): ms.replace(",", "")
        for net, *cells in rows
        for form, ms in zip(("fp16", "fp16x3"), cells, strict=True)
    }


@pytest.mark.slow
def test_the_page_shows_what_the_command_predicts():
    result = run_command("--variant", "none", "--precision", "fp16", "--precision", "fp32", "--json")
    assert result.returncode == 0, result.stderr[-2000:]
    found = {}
    for record in json.loads(result.stdout):
        ends = [record["estimate"][end]["milliseconds"] for end in ("low", "high")]
        found[record["net"], record["precision"]] = "-".join(map(three_figures, ends))
    assert page_of_predictions() == found


def test_a_kernel_that_only_traps_has_no_body():
    found = evidence("BPT.TRAP 0x1", "L_x_0:", "BRA `(.L_x_0)")
    assert not has_body(found).passed and has_body(evidence()).passed


UNORDERED = """
from kaleido_kernels.proving.inspect.compiling import compile_job, disassemble
from kaleido_kernels.proving.inspect.jobs import Job
from kaleido_kernels.proving.sass.memory import unordered_loads
from kaleido_kernels.proving.sass.program import Instruction, Program
from kaleido_kernels.shapes import NETWORKS
from kaleido_kernels.wide.plan import WideTile
job = Job("mnist", NETWORKS["mnist"], WideTile(), "fp16", "none")
program = disassemble(compile_job(job, "sm_90").binary)
assert not unordered_loads(program)
lines = program.instructions
fences = [place for place, item in enumerate(lines) if item.opcode == "FENCE.VIEW.ASYNC.G"]
assert len(fences) == 3, fences  # before the first step, after a layer, after the pass over the state
for fence in fences:
    barrier = next(place for place in range(fence, len(lines)) if lines[place].kind == "BAR")
    for dropped in (fence, barrier):
        without = [Instruction(i.address, "", "NOP", ()) if n == dropped else i for n, i in enumerate(lines)]
        assert unordered_loads(Program(without, program.labels)), lines[dropped].text
"""


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)


def test_each_fence_and_barrier_of_the_real_kernel_is_needed():
    result = run_script(UNORDERED)
    assert result.returncode == 0, result.stderr


SPILLING = """
from kaleido_kernels.proving.inspect import command, jobs
from kaleido_kernels.tile import Tile
jobs.planned_tiles = lambda shape, precision, arch: [Tile("narrow", 256, 4, 1)]
raise SystemExit(command.main(["--net", "points2d", "--precision", "fp16", "--variant", "none"]))
"""


def test_a_spilling_tile_ends_with_status_1():
    """256 chains on 4 warps need more than 255 registers a thread."""
    result = run_script(SPILLING)
    assert result.returncode == 1 and "FAILED spills" in result.stdout, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("net", NETWORKS)
def test_every_configuration_passes(net):
    result = run_command("--net", net, "--json", *(word for name in FORM_NAMES for word in ("--precision", name)))
    records = json.loads(result.stdout)
    wrong = [(record["precision"], verdict) for record in records for verdict in record["verdicts"]]
    assert result.returncode == 0, [entry for entry in wrong if not entry[1]["passed"]]
    assert {record["precision"] for record in records} == {"fp16x3", "ieee", "tf32", "fp16", "bf16"}
    for record in records:
        if record["precision"] in ("fp16", "bf16", "fp16x3") and record["variant"] == "none":
            check_estimate(record)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_100", "sm_120", "gfx942"])
def test_other_devices_compile(arch):
    result = run_command("--arch", arch, "--precision", "fp16")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.6.0", "3.8.0"])
def test_every_configuration_compiles_under_other_releases_of_triton(version, tmp_path):
    """Registers may differ there, so that some may spill; every kernel must compile to products and be sound."""
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(tmp_path),
        f"triton=={version}",
    ]
    subprocess.run(install, check=True)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), "kernels"])
    command = [sys.executable, "-m", "kaleido_kernels.inspect", "--arch", "sm_90", "--json"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr[-2000:]
    reports = json.loads(result.stdout)
    assert len(reports) == 54
    for report in reports:
        what = f"{report['net']} {report['precision']} {report['variant']}"
        assert report["loop_instructions"].get("HGMMA", 0) > 0, what
        failed = {verdict["name"]: verdict["detail"] for verdict in report["verdicts"] if not verdict["passed"]}
        assert set(failed) <= {"spills"}, f"{what}: {failed}"
