"""Warps of the emulator: guards, threads that part, what whole warps do together."""

from __future__ import annotations

import re

import numpy as np
import pytest
from ptx_programs import STORE, THREADS, run

from kaleido_kernels.proving.emulation.block import RULES
from kaleido_kernels.proving.emulation.errors import EmulatorError, UnknownInstructionError
from kaleido_kernels.proving.emulation.flow import FLOW


def test_guards_that_hold_for_nobody_do_nothing():
    out = np.zeros(THREADS, np.int32)
    body = "setp.lt.u32 %p1, %r0, 0;\n@%p1 trap;\n@%p1 bar.sync 0;\n@%p1 ret;\n"
    assert (run(body + STORE + "st.global.b32 [%rd3], %r0;", out, out) == np.arange(THREADS)).all()
    with pytest.raises(EmulatorError, match="trap"):
        run("setp.lt.u32 %p1, %r0, 1;\n@%p1 trap;", out, out)
    with pytest.raises(EmulatorError, match="a barrier with a guard"):
        run("setp.lt.u32 %p1, %r0, 32;\n@%p1 bar.sync 0;", out, out)


@pytest.mark.parametrize(
    "line",
    [
        "shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1",
        "redux.sync.add.s32 %r5, %r0, -1",
        "elect.sync %r5|%p2, -1",
        "cp.async.commit_group",
    ],
)
def test_what_warps_do_as_a_whole_is_refused_of_a_part(line):
    out = np.zeros(THREADS, np.int32)
    with pytest.raises(EmulatorError, match="by part of a"):
        run(f"setp.lt.u32 %p1, %r0, 16;\n@%p1 {line};", out, out)


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
redux.sync.min.abs.f32 %r1, %r2, -1; redux.sync.and.s32 %r1, %r2, -1;
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


def test_every_rule_names_its_section_of_the_manual():
    sections = {name: section for name, (section, _) in FLOW.items()} | {
        name: rule.section for name, rule in RULES.items()
    }
    for name, section in sections.items():
        assert re.fullmatch(r"[A-Z].*Instructions: .+", section), f"{name}: {section}"
