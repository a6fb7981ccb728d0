"""Registers that an instruction reads and writes, and those of products in flight that nothing may touch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kaleido_kernels.proving.sass.program import WARPGROUP_TENSOR, Instruction, Program

REGISTER = re.compile(r"(?<![A-Z\w])R(\d+)\b")
TENSOR_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)")
NO_RESULT = ("ST", "STG", "STS", "STL", "STSM", "RED", "REDG", "BAR", "BRA", "EXIT", "FENCE", "MEMBAR", "NOP", "R2P")
RESULT_AFTER_PREDICATE = ("SHFL", "ATOM", "ATOMG", "ATOMS", "MATCH")


def written_registers(instruction: Instruction) -> frozenset[int]:
    """General registers that the instruction writes (tensor instructions apart: see `accumulator_registers`)."""
    if instruction.kind in NO_RESULT or not instruction.operands:
        return frozenset()
    first = 1 if instruction.kind in RESULT_AFTER_PREDICATE else 0
    operand = instruction.operands[first] if len(instruction.operands) > first else ""
    found = re.fullmatch(r"R(\d+)(?:\.\w+)*", operand)
    if not found:
        return frozenset()
    start = int(found[1])
    return frozenset(range(start, start + result_width(instruction.opcode)))


def result_width(opcode: str) -> int:
    """How many 32-bit registers an instruction writes, by its modifiers."""
    kind = opcode.split(".", 1)[0]
    modifiers = opcode.split(".")[1:]
    if kind == "HMMA":
        return 4 if "F32" in modifiers else 2
    if kind == "LDSM":
        return int(modifiers[-1]) if modifiers[-1].isdigit() else 1
    if kind in ("LDG", "LDS", "LDL", "LD", "LDC", "ATOMG"):
        return 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    if kind == "CS2R":
        return 1 if "32" in modifiers else 2
    return 2 if "WIDE" in modifiers or "F64" in modifiers or kind in ("DADD", "DMUL", "DFMA") else 1


def read_registers(instruction: Instruction) -> frozenset[int]:
    """General registers that the instruction names without writing them (starts of vectors only)."""
    skip = 1 if written_registers(instruction) else 0
    named = {int(n) for operand in instruction.operands[skip:] for n in REGISTER.findall(operand)}
    return frozenset(named)


def accumulator_registers(instruction: Instruction) -> frozenset[int]:
    """Registers that a warp-group tensor instruction adds into: N/2 fp32 registers for a 64 x N tile (N/4 for fp16)."""
    shape = TENSOR_SHAPE.search(instruction.opcode)
    found = re.match(r"R(\d+)", instruction.operands[0])
    if not shape or not found:
        return frozenset()
    width = int(shape[2]) // (4 if ".F16" in instruction.opcode.split("x")[-1] else 2)
    return frozenset(range(int(found[1]), int(found[1]) + width))


def operand_registers(instruction: Instruction) -> frozenset[int]:
    """Registers of the left operand where it comes from registers: four for every shape in use."""
    found = re.match(r"R(\d+)", instruction.operands[1]) if len(instruction.operands) > 2 else None
    return frozenset(range(int(found[1]), int(found[1]) + 4)) if found else frozenset()


InFlight = dict[tuple[str, int], int]
"""(use, register) -> how many groups were committed since its instruction; use is "acc" or "a", 0 is still open."""


def find_hazards(program: Program) -> list[str]:
    """Instructions that touch registers of a tensor instruction still in flight, as readable lines.

    A warp-group tensor instruction runs on after its issue: until ``WARPGROUP.DEPBAR.LE gsb0, n`` has waited for its
    group, nothing may write its A registers, and nothing but another tensor instruction may touch its accumulators.
    """
    entry: list[InFlight | None] = [None] * len(program.blocks)
    if entry:
        entry[0] = {}
    waiting = [0] if entry else []
    while waiting:
        number = waiting.pop()
        state = dict(entry[number] or {})
        for instruction in program.of_block(number):
            advance_in_flight(state, instruction)
        for following in program.successors[number]:
            merged = merge_in_flight(entry[following], state)
            if merged != entry[following]:
                entry[following] = merged
                waiting.append(following)
    return list(_hazard_lines(program, entry))


def _hazard_lines(program: Program, entry: list[InFlight | None]) -> Iterator[str]:
    for number, known in enumerate(entry):
        if known is None:
            continue
        state = dict(known)
        for instruction in program.of_block(number):
            clash = touched_in_flight(state, instruction)
            if clash:
                yield f"{instruction.text}: R{min(clash)} belongs to a tensor instruction in flight"
            advance_in_flight(state, instruction)


def touched_in_flight(state: InFlight, instruction: Instruction) -> set[int]:
    """Registers of in-flight tensor instructions that this instruction must not touch yet."""
    if not state or instruction.kind == "WARPGROUP":
        return set()
    if instruction.kind in WARPGROUP_TENSOR:
        return {r for r in accumulator_registers(instruction) if ("a", r) in state}
    written = written_registers(instruction)
    clash = {r for r in written if ("a", r) in state or ("acc", r) in state}
    return clash | {r for r in read_registers(instruction) if ("acc", r) in state}


def advance_in_flight(state: InFlight, instruction: Instruction) -> None:
    """Applies one instruction to the set of registers in flight."""
    if instruction.kind in WARPGROUP_TENSOR:
        for register in accumulator_registers(instruction):
            state["acc", register] = 0
        for register in operand_registers(instruction):
            state["a", register] = 0
        if "gsb0" in instruction.operands:
            for key in state:
                state[key] += 1
    elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        pending = int(instruction.operands[-1], 16)
        for key in [key for key, age in state.items() if age > pending]:
            del state[key]


def merge_in_flight(known: InFlight | None, new: InFlight) -> InFlight:
    """What may be in flight where two paths meet: the union, with the younger age."""
    if known is None:
        return dict(new)
    merged = dict(known)
    for key, age in new.items():
        merged[key] = min(age, merged.get(key, age))
    return merged
