"""What a compiled kernel must satisfy, judged from its machine code and its Triton IR. Plain Python, no Triton.

Each verdict is a function of `Evidence`; `judge` runs those that apply. None needs a GPU, and none says anything of
speed or of races between warps: they catch what is known to go wrong silently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from kaleido_kernels.kernels import plan
from kaleido_kernels.proving.architectures import FACTS, REGISTERS
from kaleido_kernels.proving.carried import lost_values
from kaleido_kernels.proving.evidence import Evidence, Verdict, first_line, first_text
from kaleido_kernels.proving.sass.flow import Loop
from kaleido_kernels.proving.sass.memory import GLOBAL_PROXY_FENCES, unfenced_products, unordered_loads
from kaleido_kernels.proving.sass.program import Program, is_tensor
from kaleido_kernels.proving.sass.registers import find_hazards
from kaleido_kernels.proving.specialised import (
    fenced_layers,
    fenced_scratch,
    loads_ahead,
    paired_barriers,
    register_shares,
)
from kaleido_kernels.proving.ttgir.ahead import copies_ahead
from kaleido_kernels.proving.ttgir.offsets import narrow_offsets

ALLOWED_PRODUCTS = {
    "fp16x3": {("f16", "")},
    "fp16": {("f16", "")},
    "bf16": {("bf16", "")},
    "tf32": {("f32", "tf32"), ("f32", "ieee")},
    "ieee": {("f32", "ieee")},
}
"""(operand type, input precision) of each device precision; input precision matters for fp32 operands only."""
PRECISION_NUMBERS = {"0": "tf32", "1": "tf32x3", "2": "ieee"}
OF_PARTITIONS = {
    "paired barriers": paired_barriers,
    "fenced layers": fenced_layers,
    "fenced scratch": fenced_scratch,
    "register shares": register_shares,
}
"""Verdicts on partitions that wait for each other, by the names that a plan's VERDICTS may ask for."""


def judge(evidence: Evidence) -> list[Verdict]:
    """All verdicts that apply to the kernel."""
    verdicts = [
        spills(evidence),
        shared_memory(evidence.shared, evidence.arch),
        register_file(evidence),
        offsets(evidence),
        input_precision(evidence),
        reached_code(evidence),
        hazards(evidence),
        carried_values(evidence),
    ]
    if evidence.precision != "ieee":
        verdicts.append(tensor_cores(evidence))
    if not evidence.use_tma:
        verdicts.append(fenced_operands(evidence))
    asked = plan(evidence.kernel).VERDICTS
    if "quiet step loop" in asked and evidence.jitter == "none" and evidence.precision not in ("tf32", "ieee"):
        verdicts.append(quiet_loop(evidence))
    if "barrier order" in asked:
        verdicts.append(barrier_order(evidence))
    if "wide loads" in asked:
        verdicts.append(wide_loads(evidence))
    verdicts += [verdict(evidence) for name, verdict in OF_PARTITIONS.items() if name in asked]
    promised = evidence.loads_ahead if "loads ahead" in asked and evidence.precision != "ieee" else 0
    loops, faults = copies_ahead(evidence.module)
    if promised or loops or faults:
        verdicts.append(loads_ahead(loops, faults, promised))  # the number is told, whatever was promised
    return verdicts


def spills(evidence: Evidence) -> Verdict:
    """No spilled register in a loop of products; in kernels that say so ("no stack") no stack frame at all.

    In kernels that say so ("few spills") one in a hundred instructions: where a loop is a whole layer with all that
    follows its products, a few cost nothing to speak of.
    """
    asked = plan(evidence.kernel).VERDICTS
    found = [item for loop in evidence.program.work_loops for item in evidence.program.inside(loop)]
    inside = sum(item.kind in ("LDL", "STL") for item in found)
    total = sum(item.kind in ("LDL", "STL") for item in evidence.program.instructions)
    allowed = len(found) // 100 if "few spills" in asked else 0
    passed = inside <= allowed and (evidence.stack == 0 or "no stack" not in asked)
    return Verdict(
        "spills", passed, f"stack {evidence.stack} bytes, {inside} spills in loops of products, {total} in all"
    )


def shared_memory(need: int, arch: str) -> Verdict:
    """The shared memory that a launch would ask for exists; compilation does not check it."""
    limit = FACTS[arch].shared_memory
    return Verdict("shared memory", need <= limit, f"{need:,} of {limit:,} bytes")


def has_body(evidence: Evidence) -> Verdict:
    """The kernel computes something. Where tensor memory runs out (sm_100), compilation leaves a trap and succeeds."""
    products = sum(is_tensor(item) or item.kind == "FFMA" for item in evidence.program.instructions)
    traps = sum(item.opcode == "BPT.TRAP" for item in evidence.program.instructions)
    return Verdict("body", products > 0, f"{products} products, {traps} traps")


def register_file(evidence: Evidence) -> Verdict:
    """One program's registers exist on a multiprocessor."""
    need = evidence.registers * evidence.warps * 32
    return Verdict("registers", need <= REGISTERS, f"{evidence.registers} x {32 * evidence.warps} threads = {need:,}")


def tensor_cores(evidence: Evidence) -> Verdict:
    """Products run on tensor cores: warp-group ones on sm_90 where the tile allows, none on the ordinary units."""
    loops = evidence.program.tensor_loops
    kinds = {item.kind for loop in loops for item in evidence.program.inside(loop) if is_tensor(item)}
    wanted = "HGMMA" if evidence.arch == "sm_90" and evidence.warp_groups else None
    passed = bool(loops) and (wanted is None or wanted in kinds)
    return Verdict(
        "tensor cores", passed, f"{len(loops)} loops with {', '.join(sorted(kinds)) or 'no tensor products'}"
    )


def reached_code(evidence: Evidence) -> Verdict:
    """The control flow is understood: every instruction is reached, so that every verdict sees it.

    But for the trap and the padding behind the end: branches to themselves.
    """
    program = evidence.program
    unseen = [number for number in range(len(program.blocks)) if number not in program.reached]
    found = [item for number in unseen if program.successors[number] != [number] for item in program.of_block(number)]
    found = [item for item in found if item.kind != "NOP"]
    return Verdict("reached code", not found, f"{len(found)} instructions without a way to them" + first_text(found))


def hazards(evidence: Evidence) -> Verdict:
    """Nothing touches registers of a product in flight."""
    found = find_hazards(evidence.program)
    return Verdict("hazards", not found, f"{len(found)} found" + first_line(found))


def carried_values(evidence: Evidence) -> Verdict:
    """No loop loses a value that it carries from round to round on the way through Triton's GPU passes.

    Loops are matched by their place in the source. Of the values that change from round to round, each loop must still
    carry as many of each type (layouts apart) that rounds read, and as many that are used afterwards; each bound and
    condition must still be made from as many carried scalars, of the same loops. So a carried value is seen that was
    replaced by its first one, as Triton 3.6 and 3.7 do with a value that is only the bound of an inner loop.

    It does not see: two values of one type exchanged, or a wrong one handed on; one lost of several with one first
    value, which may be merged and count once; one lost where the passes added one of its type (pipelined loops, values
    in two layouts) - both unless a bound or condition was made from it; nor what happens after these passes.
    """
    found = lost_values(evidence.ttir, evidence.ttgir)
    return Verdict("carried values", not found, f"{len(found)} lost" + first_line(found))


def fenced_operands(evidence: Evidence) -> Verdict:
    """Products see what threads put into shared memory; what the copy engine puts there needs no fence."""
    found = unfenced_products(evidence.program)
    return Verdict("fenced operands", not found, f"{len(found)} products without" + first_line(found))


def barrier_order(evidence: Evidence) -> Verdict:
    """Every load of what the program itself stored comes after its fence and barrier, and all threads run the fence."""
    instructions = evidence.program.instructions
    found = unordered_loads(evidence.program)
    fences = [item for item in instructions if item.opcode in GLOBAL_PROXY_FENCES]
    found += [f"{item.text}: by some threads only" for item in fences if item.guard]
    stores = sum(item.kind == "STG" for item in instructions)
    passed = not found and stores > 0
    return Verdict("barrier order", passed, f"{stores} stores, {len(found)} faults" + first_line(found))


def quiet_loop(evidence: Evidence) -> Verdict:
    """The step loop of narrow touches no memory: weights are operands, activations are registers.

    So in 16-bit operands, those of split fp32 included; tf32 operands change layout and ieee ones are read from there.
    """
    kinds = ("LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDL", "STL", "LDGSTS")
    program = evidence.program
    found = [item for loop in program.work_loops for item in program.inside(loop) if item.kind in kinds]
    return Verdict("quiet step loop", not found, f"{len(found)} memory instructions" + first_text(found))


def wide_loads(evidence: Evidence) -> Verdict:
    """The loops of products of wide load by the copy engine, or by 16-byte asynchronous copies that bypass L1.

    A plain load there means that the compiler lost sight of the alignment: the loop would be three times as long.
    """
    program = evidence.program
    found = []
    for loop in program.tensor_loops:
        for item in program.inside(loop):
            asynchronous = item.kind == "UTMALDG" if evidence.use_tma else item.opcode.endswith("BYPASS.128")
            if item.kind in ("LDG", "LDGSTS", "UTMALDG") and not asynchronous:
                found.append(item)
    return Verdict("wide loads", not found, f"{len(found)} loads of another kind" + first_text(found))


def input_precision(evidence: Evidence) -> Verdict:
    """Every product has operands of the asked type; three of them at least where fp32 is split."""
    products = list(dot_products(evidence.written))
    allowed = ALLOWED_PRODUCTS[evidence.precision]
    wrong = sorted({f"{kind} {precision}".strip() for kind, precision in products if (kind, precision) not in allowed})
    enough = len(products) >= (3 if evidence.precision == "fp16x3" else 1)
    detail = f"{len(products)} products" + (f", not {evidence.precision}: {', '.join(wrong)}" if wrong else "")
    return Verdict("input precision", enough and not wrong, detail)


def dot_products(text: str) -> Iterator[tuple[str, str]]:
    """(operand type, input precision) of each product; precision is "" for 16-bit operands, where it has no effect."""
    for line in text.splitlines():
        if "tt.dot " not in line and "ttng.warp_group_dot " not in line:
            continue
        operand = re.search(r": (?:tensor|!ttg\.memdesc)<(?:\d+x)+(\w+)", line)
        precision = re.search(r"inputPrecision = (\w+)", line)
        kind = operand[1] if operand else "?"
        told = PRECISION_NUMBERS.get(precision[1], precision[1]) if precision else "ieee"
        yield kind, told if kind == "f32" else ""


def offsets(evidence: Evidence) -> Verdict:
    """Offsets into tensors of n_chains x ... values are 64-bit, and not widened 32-bit products."""
    wrong = narrow_offsets(evidence.written)
    return Verdict("64-bit offsets", not wrong, f"{len(wrong)} of 32 bits" + first_line(wrong))


def largest_loop(program: Program) -> Loop | None:
    """The loop of products with the most instructions: the step loop of narrow, the flat loop of stream."""
    return max(program.work_loops, key=lambda loop: sum(1 for _ in program.inside(loop)), default=None)
