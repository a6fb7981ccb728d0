"""Verdicts on kernels whose warps part, and on copies ahead of products: each catches the faults planted for it."""

from __future__ import annotations

import importlib.util
import re
from types import SimpleNamespace

import pytest
from compiling import run_python

if importlib.util.find_spec("triton") is None:  # importing it here would fix its mode for the interpreter's tests
    pytest.skip("needs triton", allow_module_level=True)

from machine_code import LAYER_LOOP, SPECIALISED, before, instead, program, without
from ring_ir import RING, dropped, edited, loop_by_copy_engine, loop_by_threads

from kaleido_kernels.proving import verdicts
from kaleido_kernels.proving.evidence import Evidence
from kaleido_kernels.proving.sass.shares import Shares, highest_register, read_shares, wrong_shares
from kaleido_kernels.proving.ttgir.ahead import copies_ahead, product_loops
from kaleido_kernels.proving.ttgir.barriers import find_barriers, unpaired_barriers
from kaleido_kernels.proving.ttgir.operations import origin, partitions, read_operations

ASKED = ("paired barriers", "fenced layers", "fenced scratch", "register shares", "loads ahead")
FENCED = before(before(SPECIALISED, "HGMMA", "FENCE.VIEW.ASYNC.G"), "HGMMA", "FENCE.VIEW.ASYNC.G")
WARPS, REGISTERS = 9, 216


def evidence(text: str = RING, lines: tuple[str, ...] = FENCED, **options) -> Evidence:
    values = {
        **{"kernel": "wide", "precision": "fp16", "jitter": "none", "arch": "sm_90", "use_tma": True},
        **{"warps": WARPS, "registers": REGISTERS, "stack": 0, "shared": 40_000, "loads_ahead": 2},
        **{"ttir": text, "ttgir": text, "program": program(*lines)},
    }
    return Evidence(**(values | options))


@pytest.fixture(autouse=True)
def a_plan_that_asks_for_all(monkeypatch):
    monkeypatch.setattr(verdicts, "plan", lambda kernel: SimpleNamespace(VERDICTS=ASKED))


def failed(found: Evidence) -> dict[str, str]:
    return {verdict.name: verdict.detail for verdict in verdicts.judge(found) if not verdict.passed}


def test_a_sound_kernel_passes_every_verdict():
    names = [verdict.name for verdict in verdicts.judge(evidence())]
    assert set(ASKED) < set(names) and failed(evidence()) == {}


def test_verdicts_on_partitions_are_for_plans_that_ask_for_them(monkeypatch):
    monkeypatch.setattr(verdicts, "plan", lambda kernel: SimpleNamespace(VERDICTS=()))
    names = {verdict.name for verdict in verdicts.judge(evidence(lines=LAYER_LOOP))}
    assert names & set(ASKED) == {"loads ahead"}, "its number is told of every kernel that loads"


def test_partitions_are_read_with_their_warps_and_captures():
    module = read_operations(RING)
    assert [(part.name, part.warps) for part in partitions(module)] == [
        ("default", 0),
        ("partition0", 4),
        ("partition1", 1),
    ]
    assert {barrier.memory.name for barrier in find_barriers(module)} == {"%full", "%empty", "%ready"}
    stores = [operation for operation in module.walk() if operation.name == "tt.store"]
    assert [origin(store.operands[0]).name for store in stores] == ["%scratch_ptr"] * 2
    assert [loop.partition for loop in product_loops(module)] == ["default", "partition0"]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (dropped(RING, "init_barrier"), r"%full\[0\]: initialised 0 times"),
        (dropped(RING, "init_barrier", 7), r"%ready\[1\]: initialised 0 times"),
        (edited(RING, "%full_1, 1 ", "%full_0, 1 "), "initialised 2 times"),
        (edited(RING, "%empty_0, 2 ", "%empty_0, 1 "), r"for 1 arrivals, and 2 come \(default, partition0\)"),
        (edited(RING, "arrive_barrier %g, 1,", "arrive_barrier %g, 2,"), r"arrives by \[1, 2\] at once"),
        (edited(RING, "arrive_barrier %r, 1,", "arrive_barrier %r, 2,"), "for 1 arrivals, and 2 come"),
        (dropped(RING, "arrive_barrier %r"), r"%ready\[0\]: waited for, and nothing arrives"),
        (dropped(RING, "wait_barrier %second"), r"%ready\[1\]: armed, and nothing waits"),
        (dropped(dropped(RING, "wait_barrier %b"), "wait_barrier %b"), r"%full\[0\]: armed, and nothing waits"),
        (dropped(RING, "barrier_expect"), "it expects no bytes"),
        (edited(RING, "16384", "8192"), "8192 bytes are expected, and copies bring 16384"),
        (edited(RING, "16384", "32768"), "32768 bytes are expected"),
        (dropped(RING, "copy_global_to_local %arg7"), "16384 bytes are expected, and copies bring 8192"),
        (dropped(dropped(RING, "_to_local"), "_to_local"), "expects bytes that no copy brings"),
        (dropped(RING, "wait_barrier %g"), "and did not wait for it"),
        (edited(RING, "ttng.arrive_barrier", "ttng.strange_barrier"), "of its barrier nothing is known"),
    ],
)
def test_barriers_that_do_not_pair_are_seen(fault, told):
    assert "paired barriers" in failed(evidence(fault))
    found = unpaired_barriers(read_operations(fault))
    assert any(re.search(told, line) for line in found), found


def test_a_barrier_that_the_partitions_race_to_initialise_is_seen():
    line = next(line for line in RING.splitlines() if "init_barrier %full_2" in line)
    moved = dropped(RING, "init_barrier %full_2").replace("ttg.warp_yield", f"{line.strip()}\n ttg.warp_yield", 1)
    assert "initialised by default" in failed(evidence(moved))["paired barriers"]


def test_bytes_may_be_announced_for_copies_of_another_loop():
    late = RING.splitlines()
    place = next(n for n, line in enumerate(late) if "to_local %arg7" in line)
    loop = ["scf.for %j = %c0 to %c3 step %c1  : i32 {", late[place], "}"]
    text = "\n".join([*late[:place], *loop, *late[place + 1 :]])
    assert failed(evidence(text)) == {}
    assert "24576 bytes are expected" in failed(evidence(edited(text, "16384", "24576")))["paired barriers"]
    assert "nothing expects" in failed(evidence(edited(text, "16384", "8192")))["paired barriers"]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (without(FENCED, "FENCE.VIEW.ASYNC.S"), "HGMMA"),
        (instead(FENCED, "FENCE.VIEW.ASYNC.S", "@P0 FENCE.VIEW.ASYNC.S"), "HGMMA"),
        (before(FENCED, "FENCE.VIEW.ASYNC.S", "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR8], RZ"), "SYNCS"),
    ],
)
def test_layers_that_are_not_fenced_are_seen(lines, told):
    assert told in failed(evidence(lines=lines))["fenced layers"]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (dropped(RING, "fence.proxy"), "default stores, and arrives nowhere"),
        (dropped(RING, "fence.proxy", 1), "partition0 stores, and arrives nowhere"),
        (dropped(RING, "ttg.barrier all"), "default stores, and arrives nowhere"),
        (edited(RING, "async.global", "async.shared::cta"), "default stores, and arrives nowhere"),
        (dropped(dropped(RING, "arrive_barrier %r"), "ttg.barrier all"), "default stores, and arrives nowhere"),
        (dropped(RING, "wait_barrier %first"), "no descriptor's copies all wait for default, partition0"),
        (dropped(RING, "wait_barrier %second"), "no descriptor's copies all wait"),
        (edited(RING, "%scratch_ptr", "%other_ptr", None), "nothing is stored to scratch"),
    ],
)
def test_scratch_memory_that_copies_may_miss_is_seen(fault, told):
    assert told in failed(evidence(fault))["fenced scratch"]


def test_a_fence_behind_the_arrival_is_too_late():
    lines = RING.splitlines()
    place = next(n for n, line in enumerate(lines) if "fence.proxy" in line)
    swapped = [*lines[:place], *lines[place + 1 : place + 4], lines[place], *lines[place + 4 :]]
    assert "default stores, and arrives nowhere" in failed(evidence("\n".join(swapped)))["fenced scratch"]


@pytest.mark.parametrize(
    "lines", [without(FENCED, "ASYNC.G"), instead(FENCED, "FENCE.VIEW.ASYNC.G", "@P1 FENCE.VIEW.ASYNC.G")]
)
def test_the_machine_code_has_the_fences_of_global_memory_for_all_threads(lines):
    assert "fenced scratch" in failed(evidence(lines=lines))


def share(old: str, new: str) -> tuple[str, ...]:
    return instead(FENCED, old, f"USETMAXREG.{old.rsplit(' ', 1)[0]} {new}")


@pytest.mark.parametrize(
    ("lines", "options", "told"),
    [
        (FENCED, {"registers": 168}, "while partitions run"),  # 4 x 240 + 4 x 240 + 24 of 9 x 168
        (share("TRY_ALLOC.CTAPOOL UP0, 0x100", "0x108"), {}, "no multiple of 8 from 24 to 256"),
        (share("TRY_ALLOC.CTAPOOL UP0, 0xf0", "0xec"), {}, "no multiple of 8"),
        (share("DEALLOC.CTAPOOL 0x18", "0x10"), {}, "from 24"),
        (share("DEALLOC.CTAPOOL 0x18", "0x80"), {}, r"0x80: with \[120\] before"),
        (share("TRY_ALLOC.CTAPOOL UP0, 0xf0", "0x70"), {}, r"0x70: with \[112, 120\] before"),
        (instead(FENCED, "DEALLOC.CTAPOOL 0x18", "@P0 USETMAXREG.DEALLOC.CTAPOOL 0x18"), {}, "by some threads only"),
        (before(FENCED, "UTMALDG", "MOV R24, R2"), {}, "MOV R24, R2: of 24 registers"),
        (before(FENCED, "UTMALDG", "STG.E.128 [R2], R21"), {}, "of 24 registers"),
        (before(FENCED, "UTMALDG", "LDG.E.64 R2, [R23.64]"), {}, "of 24 registers"),
        (instead(FENCED, "HGMMA", "HGMMA.64x128x16.F32 R180, gdesc[UR8], R180, gsb0"), {}, "of 240 registers"),
        (without(FENCED, "BRX"), {}, "no partitions"),
        (FENCED, {"warps": 7}, "partitions of 7 warps"),
    ],
)
def test_registers_that_partitions_cannot_share_are_seen(lines, options, told):
    found = evidence(lines=lines, **options)
    assert "register shares" in failed(found)
    faults = wrong_shares(found.program, found.registers, found.warps, [4, 4, 1])
    assert any(re.search(told, line) for line in faults), faults


def test_more_than_a_multiprocessor_has_cannot_be_shared():
    text = edited(RING, "num_warps(4)", "num_warps(8)")
    assert "of 65,536 registers while" in failed(evidence(text, warps=13, registers=255))["register shares"]


def test_warps_of_one_group_must_ask_alike():
    table = instead(FENCED, "BRX", 'BRX R6 -0x240 (*"BRANCH_TARGETS .L_x_2,.L_x_4,.L_x_20,.L_x_6"*)')
    other = ("L_x_20:", "USETMAXREG.DEALLOC.CTAPOOL 0x20", "BRA `(.L_x_9)")
    place = table.index("L_x_7:")
    lines = (*table[:place], *other, *table[place:])
    assert read_shares(program(*lines)) == Shares((240, 240, 24, 32), 120, 256)
    assert "ask for 24 and 32" in failed(evidence(lines=lines, warps=12))["register shares"]
    alike = instead(lines, "0x20", "USETMAXREG.DEALLOC.CTAPOOL 0x18")
    assert "register shares" not in failed(evidence(lines=alike, warps=12))


@pytest.mark.parametrize(
    ("line", "highest"),
    [
        ("LDG.E.128 R4, desc[UR4][R2.64]", 7),
        ("STG.E.64 desc[UR4][R8.64], R4", 9),
        ("STS.128 [R4], R20", 23),
        ("HGMMA.64x256x16.F32 R24, gdesc[UR8], R24, gsb0", 151),
        ("UMOV UR200, 0x1", -1),
        ("MOV R3, UR7", 3),
        ("BAR.SYNC 0x0", -1),
    ],
)
def test_the_highest_register_of_an_instruction(line, highest):
    assert highest_register(program(line).instructions[0]) == highest


@pytest.mark.parametrize(
    ("loop", "ahead", "buffers"),
    [
        (loop_by_threads("wpdc", 1), 0, 2),  # two stages as stream had them: all copies waited for, products too
        (loop_by_threads("wpcd", 1), 1, 2),
        (loop_by_threads("wpDc", 1), 1, 2),  # two stages of wide: a product runs when the next copy is issued
        (loop_by_threads("wcpd", 1), 1, 2),
        (loop_by_threads("cwpd", 1), 0, 2),
        (loop_by_threads("Wpdc", 2), 1, 3),
        (loop_by_threads("WpDc", 2), 2, 3),
        (loop_by_threads("wPc", 1), 0, 2),  # a product that is waited for where it stands
        (loop_by_threads("wcP", 1), 1, 2),
        (loop_by_threads("wpdpDccd", 2), 1, 2),  # two groups a round
        (loop_by_copy_engine("wpDc", 1), 1, 2),
        (loop_by_copy_engine("wpdc", 1), 0, 2),
        (loop_by_copy_engine("wpDc", 2), 2, 3),
        (loop_by_copy_engine("wpdc", 2), 1, 3),
        (loop_by_copy_engine("wpdpdpcd", 1), 1, 2),  # behind two of three products
    ],
)
def test_copies_ahead_of_products(loop, ahead, buffers):
    (found,), faults = copies_ahead(loop)
    assert (found.ahead, found.buffers, faults) == (ahead, buffers, [])


def test_a_loop_that_loads_nothing_is_none_that_loads_ahead():
    assert copies_ahead(loop_by_threads("pd", 0)) == ([], [])


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (edited(RING, "pendings = 1", "pendings = 2"), "default: gives back a slot while a product may read it"),
        (edited(RING, "pendings = 1", "pendings = 2", 1), "partition0: gives back a slot while a product may read it"),
        (edited(RING, "pendings = 1", "pendings = 0"), "1 of 2"),  # no copy runs beside the only product
        (edited(RING, "%before = arith.addi %i, %c2", "%before = arith.addi %i, %c3"), "while a product may read it"),
        (edited(RING, "%before = arith.addi %i, %c2", "%before = arith.addi %i, %c1"), "does not hold"),
        (dropped(RING, "arrive_barrier %g", 1), "default"),  # behind the loop: one slot is kept
        (edited(RING, "%full[%slot]", "%full[%c0]"), "waits for a slot that it did not give back"),
        (edited(RING, "%ring[%slot]", "%ring[%old_slot]"), "a product reads a slot that was not waited for"),
        (dropped(RING, "wait_barrier %b"), "a product reads a slot that was not waited for"),
        (edited(RING, "%slot = arith.remsi %i, %c3", "%slot = arith.remsi %x, %c3"), "cannot be read"),
    ],
)
def test_slots_that_are_given_back_wrongly_or_late_are_seen(fault, told):
    assert told in failed(evidence(fault))["loads ahead"]


def test_a_partition_that_waits_for_its_own_copies_runs_ahead_of_nothing():
    lines = RING.splitlines()
    place = next(n for n, line in enumerate(lines) if "to_local %arg7" in line)
    wait = next(line for line in lines if "wait_barrier %b" in line)
    fault = "\n".join([*lines[: place + 1], wait, *lines[place + 1 :]])
    assert "partition1 waits for its own copies" in failed(evidence(fault))["loads ahead"]


def test_branches_and_loops_whose_rounds_are_not_known_are_played():
    """A step that may be left early: its products stand in the branch that does more."""
    start, end = "    %acc:2 = scf.for", "    scf.yield %acc#0 : i32"
    for place in range(2):
        head, _, rest = RING.partition(start) if place == 0 else _second(RING, start)
        body, _, tail = rest.partition(end)
        left = "    %gone = arith.cmpi eq, %step, %steps : i32\n"
        left += "    %it2 = scf.if %gone -> (i32) {\n      scf.yield %it : i32\n    } else {\n"
        text = f"{head}{left}{start}{body}{end}\n    }}\n    scf.yield %it2 : i32{tail}"
        assert failed(evidence(text)) == {}
        early = edited(text, "pendings = 1", "pendings = 2", place)
        assert "while a product may read it" in failed(evidence(early))["loads ahead"]
    loop = "%last = scf.for %step = %c0 to %steps step %c1 iter_args(%it = %c0) -> (i32)  : i32 {"
    again = "%last = scf.while (%was = %c0) : (i32) -> i32 {\n    %more = arith.cmpi slt, %was, %steps : i32\n"
    again += "    scf.condition(%more) %was : i32\n  } do {\n  ^bb0(%it: i32):"
    text = edited(RING, loop, again)
    assert failed(evidence(text)) == {}
    assert (
        "while a product may read it" in failed(evidence(edited(text, "pendings = 1", "pendings = 2")))["loads ahead"]
    )


def _second(text: str, what: str) -> tuple[str, str, str]:
    first, _, rest = text.partition(what)
    middle, _, last = rest.partition(what)
    return first + what + middle, what, last


def test_what_a_tile_promises_must_be_there():
    assert "2 of 3" in failed(evidence(loads_ahead=3))["loads ahead"]
    plain = "module {\n  tt.func public @k(%n: i32) {\n  tt.return\n  }\n}"
    assert "no loop of products loads" in failed(evidence(plain, lines=LAYER_LOOP))["loads ahead"]
    assert "loads ahead" not in failed(evidence(plain, lines=LAYER_LOOP, precision="ieee", loads_ahead=1))


def test_a_small_kernel_as_it_is_compiled():
    result = run_python("tests/proving/judged_ring.py")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
