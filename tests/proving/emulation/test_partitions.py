"""Warps that are specialised: every partition its own stream of instructions, in every order; rules they may break."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from ptx_programs import run
from ring_kernel import LAYOUT, ring_variant, run_ring
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kaleido_kernels.proving.emulation.block import ORDERS, Conditions
from kaleido_kernels.proving.emulation.driver import Emulator, emulated
from kaleido_kernels.proving.emulation.errors import DeadlockError, EmulatorError, RaceError
from kaleido_kernels.proving.emulation.faults import left_out_singly, planted
from kaleido_kernels.proving.fake_driver import compile_variant

ALLOWED = 1e-2
"""Of values around 1: an fp16 rounding that falls the other way, through the layers."""
DISPATCH = """
	shr.u32 %r5, %r0, 5;
	setp.lt.u32 %p1, %r5, 4;
	@%p1 bra $default;
	sub.s32 %r6, %r5, 4;
	INDEX
$table: .branchtargets $work, $help, $idle;
	brx.idx %r6, $table;
$default:
	DEFAULT
	bra.uni $end;
$work:
	WORK
	bra.uni $end;
$help:
	HELP
	bra.uni $end;
$idle:
	IDLE
$end:
"""
"""Four warps, then a partition of one warp, one of another, and two idle warps."""


def run_parts(
    default: str = "", work: str = "", help: str = "", idle: str = "", index: str = "min.u32 %r6, %r6, 2;", **conditions
) -> np.ndarray:
    """What the partitions stored, a number a thread."""
    parts = {"DEFAULT": default, "WORK": work, "HELP": help, "IDLE": idle, "INDEX": index}
    body = re.sub("|".join(parts), lambda found: parts[found[0]], DISPATCH)
    return run(body, np.zeros(1, np.int32), np.zeros(256, np.int32), threads=256, **conditions)


def stored(number: int) -> str:
    """A partition stores a number for each of its threads, and the order in which it did."""
    place = "mul.wide.u32 %rd3, %r0, 4;\nadd.s64 %rd3, %rd3, %rd1;\n"
    took = "ld.shared.b32 %r7, [%r9+64];\nadd.s32 %r7, %r7, 1;\nst.shared.b32 [%r9+64], %r7;\n"
    return f"mov.b32 %r9, 0;\n{took}mad.lo.s32 %r7, %r7, 16, {number};\n{place}st.global.b32 [%rd3], %r7;\n"


FIRST = "mov.b32 %r9, 0;\nst.shared.b32 [%r9+64], %r9;\nbarrier.sync 1;\n"


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_partitions_run_in_the_order_that_is_asked_for(order):
    begin = FIRST.replace("barrier.sync 1", "barrier.sync 1, 192")
    wait = "barrier.sync 1, 192;\n"
    out = run_parts(begin + stored(1), wait + stored(2), wait + stored(3), order=order)
    assert [set(out[first : first + n].tolist()) for first, n in ((0, 128), (128, 32), (160, 32), (192, 64))] == [
        {16 * (1 + order.index(0)) + 1},
        {16 * (1 + order.index(1)) + 2},
        {16 * (1 + order.index(2)) + 3},
        {0},
    ]


@pytest.mark.parametrize(
    "index, message",
    [("and.b32 %r6, %r0, 1;", "threads of a warp take apart"), ("mov.b32 %r6, 3;", "number 3 of 3")],
)
def test_a_partition_that_is_none_is_refused(index, message):
    with pytest.raises(EmulatorError, match=message):
        run_parts(index=index)


def test_barriers_of_some_threads_are_counted():
    run_parts("barrier.sync 1, 160;", "barrier.sync 1, 160;")
    with pytest.raises(DeadlockError, match=r"warps 0 to 3, [^;]*barrier.sync 1, 192 with 128 of 192 threads"):
        run_parts("barrier.sync 1, 192;")
    with pytest.raises(RaceError, match="224 threads meet at barrier 1, where 192 do"):
        run_parts("barrier.sync 1, 192;", "barrier.sync 1, 224;", order=(0, 1, 2))
    with pytest.raises(RaceError, match="more than 48 threads at barrier 1"):
        run_parts("", "barrier.sync 1, 48;", "barrier.sync 1, 48;")


INC, DEC = "setmaxnreg.inc.sync.aligned.u32 ", "setmaxnreg.dec.sync.aligned.u32 "


def test_registers_come_from_a_pool_that_others_fill():
    give = dict.fromkeys(("work", "help", "idle"), f"{DEC}24;")
    for order in ((0, 1, 2), (1, 2, 0)):
        run_parts(f"{INC}232;", **give, registers=128, order=order)
    with pytest.raises(DeadlockError, match="for 14,336 registers, 13,312 are free"):
        run_parts(f"{INC}240;", **give, registers=128)
    with pytest.raises(DeadlockError, match="for 13,312 registers, 0 are free"):
        run_parts(f"{INC}232;", registers=128)
    with pytest.raises(RaceError, match="warps of one warp group ask for different registers"):
        run_parts("", **(give | {"help": f"{DEC}32;"}), registers=128)
    with pytest.raises(RaceError, match="with 128 registers"):
        run_parts(f"{DEC}136;", registers=128)


ANNOUNCED = """
	mov.b32 %r9, 0;
	setp.eq.u32 %p3, %r0, 0;
	@%p3 mbarrier.init.shared::cta.b64 [%r9], 1;
	bar.sync 2, 128;
	WORK
	bar.sync 2, 128;
	@%p3 mbarrier.arrive.shared::cta.b64 _, [%r9];
"""
WORKS = {
    "a store": "st.shared.b32 [%r9+64], %r9;",
    "a load of shared memory": "st.shared.b32 [%r9+64], %r9;\nbar.sync 2, 128;\nld.shared.b32 %r7, [%r9+64];",
    "a fence": "fence.proxy.async.shared::cta;",
    "a wait for products": "wgmma.wait_group.sync.aligned 0;",
}


@pytest.mark.parametrize("what", WORKS)
def test_one_thread_announces_its_groups_work_only_after_a_barrier(what):
    work = ANNOUNCED.replace("WORK", WORKS[what])
    run_parts(work)
    before, _, arrival = work.rpartition("bar.sync 2, 128;")
    with pytest.raises(RaceError, match=f"one thread announces {what} of its group without a barrier since"):
        run_parts(before + arrival)


def test_a_deadlock_says_who_waits_for_what():
    init = "mov.b32 %r9, 64;\n@%p1 mbarrier.init.shared::cta.b64 [%r9], 256;\nbarrier.sync 1, 160;\n"
    wait = "mov.b32 %r9, 64;\nbarrier.sync 1, 160;\nmbarrier.try_wait.parity.shared::cta.b64 %p3, [%r9], 0;"
    arrive = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r9];"
    with pytest.raises(DeadlockError, match=r"warp 4, .* at byte 64: phase 0, 128 of 256 arrivals and 0 bytes to come"):
        run_parts(init + arrive, wait)
    run_parts(init + arrive + arrive, wait)


# ---- a kernel of Gluon


def shows(text: str, groups: int, conditions: Conditions) -> str:
    """What shows when this PTX runs in place of the ring kernel's own; nothing if all is right."""
    try:
        error = run_ring(Emulator(replace(conditions, most_instructions=100_000), change=lambda _: text), groups)
    except EmulatorError as problem:
        return f"{type(problem).__name__}: {problem}"
    return "" if error < ALLOWED else f"error {error:.3g}"


def first_shown(text: str, groups: int) -> str:
    return next((found for each in ORDERS.values() if (found := shows(text, groups, each))), "")


def ptx(groups: int) -> str:
    text: str = compile_variant(ring_variant(groups)).asm["ptx"]
    return text


@functools.cache
def what_faults_show(groups: int) -> dict[str, str]:
    return {name: first_shown(text, groups) for name, text in planted(ptx(groups))}


@pytest.mark.emulated
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_order_of_partitions_gives_the_right_results(groups, order):
    assert run_ring(Emulator(ORDERS[order]), groups, programs=2) < ALLOWED


NOT_SEEN = {1: "wait 5 of 6 .* passes at once", 2: "wait 7 of 8 .* passes at once"}
"""The one fault that rightly does not show, by the number of groups: the wait for a slot that the last tile of the step
before was in. The rows came, so all products of that step are done."""


@pytest.mark.emulated
@pytest.mark.parametrize("groups", [1, 2])
def test_every_planted_fault_shows_in_some_order(groups):
    found = what_faults_show(groups)
    hidden = [name for name, shown in found.items() if not shown]
    assert len(found) > 50
    assert len(hidden) == 1 and re.fullmatch(NOT_SEEN[groups], hidden[0]), hidden


@pytest.mark.emulated
@pytest.mark.parametrize(
    "message",
    [
        "no warps can go on",
        "more arrivals at an mbarrier than it counts",
        "bytes more came to an mbarrier than were expected",
        "the copy engine writes over bytes that a copy in flight will write",
        "a product reads bytes that a copy in flight will write",
        "a product reads bytes that were stored without a proxy fence",
        "a product reads bytes that were stored and fenced, but without a barrier",
        "the copy engine reads x_desc: bytes that were stored without a proxy fence",
        "an operand of a product was overwritten while the product was at work",
        "of a product that is at work is used before a wait",
        "one thread announces a wait for products of its group without a barrier",
    ],
)
def test_every_rule_is_broken_by_some_planted_fault(message):
    assert any(message in shown for shown in what_faults_show(2).values())


@pytest.mark.emulated
def test_fences_and_barriers_before_arrivals_are_missed_one_by_one():
    text = ptx(2)
    for name, changed in left_out_singly(text):
        number = int(name.split()[1]) - 1
        before_arrival = False
        if name.startswith("barrier"):
            after = text[list(re.finditer(r"bar\.sync\s+\d, 128;", text))[number].end() :]
            before_arrival = (
                re.match(r"(?:(?!bar\.sync|wgmma|bra|ld\.|st\.)[\s\S])*?mbarrier\.arrive\.", after) is not None
            )
        assert bool(first_shown(changed, 2)) == (name.startswith("fence") or before_arrival), name


TOUCHED = r"(cp\.async\.bulk\.tensor[^;]*?\[(%r\d+)\][^;]*;)"


@pytest.mark.emulated
@pytest.mark.parametrize(
    "touch, message",
    [
        (r"\1 st.shared.b32 [\2], 0;", "an ordinary store to bytes that a copy in flight will write"),
        (r"\1 ld.shared.b32 \2, [\2];", "a load of bytes that a copy in flight will write"),
        (r"st.shared.b32 [\2], 0; \1", "the copy engine writes over bytes that were stored without a proxy fence"),
    ],
)
def test_memory_under_a_copy_is_left_alone(touch, message):
    text = re.sub(TOUCHED, touch, ptx(2), count=1)
    assert message in shows(text, 2, Conditions(order=(0, 1, 2)))


@pytest.mark.emulated
def test_descriptors_that_do_more_than_copy_are_refused():
    tiles, scratch = torch.zeros(512, 128, dtype=torch.float16), torch.zeros(256, 64, dtype=torch.float16)
    rows = TensorDescriptor.from_tensor(scratch, [64, 64], LAYOUT)
    for descriptor, message in (
        (TensorDescriptor.from_tensor(tiles, [128, 64], LAYOUT, padding="nan"), "w_desc pads with NaN"),
        (TensorDescriptor(tiles, [512, 64], [128, 1], [128, 64], LAYOUT), "w_desc: its rows are not all of"),
        (TensorDescriptor(tiles, [2048, 64], [64, 1], [128, 64], LAYOUT), "w_desc: its rows are not all of"),
    ):
        with emulated(Emulator()), pytest.raises(EmulatorError, match=message):
            ring_variant().launch(1, [torch.zeros(128, 128), descriptor, rows, scratch, 1])
