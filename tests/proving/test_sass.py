"""Reading machine code: hazards, fences, loops, the order of copies and products, registers."""

from __future__ import annotations

import importlib.util

import pytest
from compiling import run_python

if importlib.util.find_spec("triton") is None:  # importing it here would fix its mode for the interpreter's tests
    pytest.skip("needs triton", allow_module_level=True)

from machine_code import FLAT_LOOP, HIDDEN_LOOP, PRODUCT, SPECIALISED, before, instead, program, without

from kaleido_kernels.proving.sass.memory import unfenced_products, unordered_loads
from kaleido_kernels.proving.sass.program import UnknownFlow, parse_program
from kaleido_kernels.proving.sass.registers import find_hazards, written_registers
from kaleido_kernels.proving.sass.rounds import CopyOrder, copy_order, count_kinds, path_counts


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


def test_what_a_layer_stores_the_next_one_reads_where_rounds_are_followed():
    lines = without(SPECIALISED, "FENCE")
    assert not unfenced_products(program(*SPECIALISED), next_rounds=True)
    assert not unfenced_products(program(*lines)) and unfenced_products(program(*lines), next_rounds=True)


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


def test_an_indirect_branch_goes_to_every_place_of_its_table():
    found = program(*SPECIALISED)
    assert len(found.tensor_loops) == 2, "one that the branch leads to, one besides"
    assert len(found.blocks) - len(found.reached) == 1, "the trap behind the end"
    (branch,) = (item for item in found.instructions if item.kind == "BRX")
    assert branch.targets == ("L_x_2", "L_x_4", "L_x_6") and branch.operands == ("R6 -0x240",)
    hazard = before(SPECIALISED, "STSM", "MOV R4, R24")
    late = instead(hazard, "WARPGROUP.DEPBAR", "WARPGROUP.DEPBAR.LE gsb0, 0x1")
    assert not find_hazards(program(*hazard)) and find_hazards(program(*late)), (
        "in a place that only the branch leads to"
    )


@pytest.mark.parametrize(
    "line",
    [
        "BRX R6 -0x240",  # a table that was not printed
        'BRX R6 -0x240 (*"BRANCH_TARGETS .L_x_77"*)',
        'BRX R6 -0x240 (*"BRANCH_TARGETS "*)',
        "BRA `(.L_x_77)",
        "BRA 0x240",
        "JMX R6 -0x240",
        "JMP 0x240",
        "JMXU UR6 -0x240",
        "CALL.ABS.NOINC R6",
        "CALL.REL.NOINC `($somewhere$else)",
        "RTT",
        "@P0 BRK",
        "BSYNC B0",  # where its threads go on was never said
    ],
)
def test_flow_that_cannot_be_followed_is_refused(line):
    found = program("STG.E [R2], R4", PRODUCT, line, "MOV R56, R2", "EXIT")
    for use in (find_hazards, unfenced_products, unordered_loads, lambda program: program.tensor_loops):
        with pytest.raises(UnknownFlow, match=line.removeprefix("@P0 ").split()[0]):
            use(found)


def test_code_that_is_no_instruction_is_refused():
    with pytest.raises(UnknownFlow, match="0x1234"):
        parse_program("        /*0000*/                   .word 0x1234")


def test_threads_that_met_go_on_behind_the_place():
    lines = ("BSSY B0, `(.L_x_1)", "@P0 BRA `(.L_x_2)", "MOV R1, R2", "L_x_2:", "BSYNC B0", "L_x_1:", "EXIT")
    assert len(program(*lines).reached) == 4
    with pytest.raises(UnknownFlow, match="BSYNC B0"):
        assert program(*without(lines, "L_x_1:"), "NOP", "L_x_1:", "EXIT").reached
    with pytest.raises(UnknownFlow, match="BSYNC B1"):
        assert program(*instead(lines, "BSYNC", "BSYNC B1")).reached


def test_a_call_goes_to_its_function_and_on_behind_itself():
    found = program("CALL.REL.NOINC `($k$div)", PRODUCT, "EXIT", "$k$div:", "MOV R4, R24", "RET.REL.NODEC R20 `(k)")
    assert len(found.reached) == len(found.blocks) == 3


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


def test_each_fence_and_barrier_of_the_real_kernel_is_needed():
    result = run_python("-c", UNORDERED)
    assert result.returncode == 0, result.stderr
