"""Registers that the partitions of a kernel hand to each other while it runs (``setmaxnreg``).

A multiprocessor gives a program what its launch asks for. A partition that gives registers back must need no more than
it keeps, and what others ask for must be there at last: else their warps wait for ever.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kaleido_kernels.proving.architectures import REGISTERS
from kaleido_kernels.proving.sass.program import WARPGROUP_TENSOR, Instruction, Program
from kaleido_kernels.proving.sass.registers import accumulator_registers, operand_registers, written_registers

SHARE = "USETMAXREG"
NAMED = re.compile(r"(?<![A-Z\w])R(\d+)(\.64)?\b")
STORES = ("STG", "STS", "STL", "ST")
GROUP = 4
"""Warps of a warp group: they must ask for the same number, by the same instruction."""


@dataclass(frozen=True)
class Shares:
    """What partitions ask for, registers a thread: the default one first, then by the table of the branch to them.

    ``idle`` is what warps hold between partitions, ``outside`` what the default ones do.
    """

    busy: tuple[int, ...]
    idle: int
    outside: int


def asked(instruction: Instruction) -> int | None:
    """The registers that an instruction sets as its warp's share; None for others."""
    return int(instruction.operands[-1], 16) if instruction.kind == SHARE else None


def highest_register(instruction: Instruction) -> int:
    """The highest general register that an instruction touches, ends of vectors included; -1 for none."""
    found = {int(number) + (1 if pair else 0) for part in instruction.operands for number, pair in NAMED.findall(part)}
    found |= written_registers(instruction)
    if instruction.kind in WARPGROUP_TENSOR:
        found |= accumulator_registers(instruction) | operand_registers(instruction)
    elif instruction.kind in STORES:
        data = re.fullmatch(r"R(\d+)", instruction.operands[-1])
        wide = 4 if ".128" in instruction.opcode else 2 if ".64" in instruction.opcode else 1
        found |= {int(data[1]) + wide - 1} if data else set()
    return max(found, default=-1)


def limits(program: Program, registers: int) -> tuple[list[set[int]], list[str]]:
    """The shares that a warp may have at the begin of each block, and what goes against them, as readable lines."""
    entry: list[set[int]] = [set() for _ in program.blocks]
    entry[0] = {registers}
    found: dict[int, str] = {}
    waiting = [0]
    while waiting:
        number = waiting.pop()
        state = set(entry[number])
        for instruction in program.of_block(number):
            share = asked(instruction)
            if share is None:
                if highest_register(instruction) >= min(state):
                    found[instruction.address] = f"{instruction.text}: of {min(state)} registers"
                continue
            if instruction.guard not in ("", "@PT"):
                found[instruction.address] = f"{instruction.text}: by some threads only"
            if share % 8 or not 24 <= share <= 256:
                found[instruction.address] = f"{instruction.text}: no multiple of 8 from 24 to 256"
            if ("DEALLOC" in instruction.opcode and share > min(state)) or (
                "TRY_ALLOC" in instruction.opcode and share < max(state)
            ):
                found[instruction.address] = f"{instruction.text}: with {sorted(state)} before"
            state = {share}
        for following in program.successors[number]:
            if not state <= entry[following]:
                entry[following] |= state
                waiting.append(following)
    return entry, [found[address] for address in sorted(found)]


def read_shares(program: Program) -> Shares | None:
    """The shares of a kernel that branches to partitions; None for others."""
    branching = [number for number in program.reached if program.instructions[program.blocks[number][-1]].kind == "BRX"]
    if len(branching) != 1:
        return None
    (branch,) = branching
    head = program.dominators[branch]
    between = [share for number in sorted(head) for share in _of(program, number)]
    parts = [_ways(program, start, head) for start in program.successors[branch]]
    away = head.union(*parts)
    own = [share for number in sorted(program.reached - away) for share in _of(program, number)]
    if not between or not own:
        return None
    idle = between[-1]
    busy = [
        next((share for number in part for share in _of(program, number)), idle)
        for part in parts
        if not _ends(program, part)
    ]
    return Shares((min(own), *busy), idle, max(own))


def _ends(program: Program, part: list[int]) -> bool:
    """Whether a place of the table is the end of the program."""
    return next(program.of_block(part[0])).kind == "EXIT"


def _of(program: Program, number: int) -> list[int]:
    found = (asked(instruction) for instruction in program.of_block(number))
    return [share for share in found if share is not None]


def _ways(program: Program, start: int, ends: set[int]) -> list[int]:
    """Blocks that are reached from one without entering others, nearest first."""
    seen, waiting = [start], [start]
    while waiting:
        for following in program.successors[waiting.pop(0)]:
            if following not in seen and following not in ends:
                seen.append(following)
                waiting.append(following)
    return seen


def wrong_shares(program: Program, registers: int, warps: int, partition_warps: Sequence[int]) -> list[str]:
    """What is wrong with the shares of a kernel's partitions, as readable lines.

    Args:
        program: the machine code.
        registers: a thread of the launch begins with.
        warps: of the launch.
        partition_warps: warps of each partition, those of the default one first; what is left over is idle.
    """
    _, found = limits(program, registers)
    shares = read_shares(program)
    if shares is None:
        return [*found, "no partitions that hand registers to each other"]
    rest = warps - sum(partition_warps)
    if rest < 0 or len(shares.busy) < len(partition_warps):
        return [*found, f"{len(partition_warps)} partitions of {warps} warps, and shares {shares.busy}"]
    small = [share for share, n in zip(shares.busy, [*partition_warps, *[1] * warps], strict=False) if n % GROUP]
    if len(set(small)) > 1:
        found.append(f"warps of one group ask for {' and '.join(map(str, sorted(set(small))))}")
    own = [n * share for n, share in zip(partition_warps, shares.busy, strict=False)]
    idle = rest * max(shares.busy[len(partition_warps) :], default=shares.idle)
    running, outside = sum(own) + idle, partition_warps[0] * shares.outside + (warps - partition_warps[0]) * shares.idle
    there = min(REGISTERS, registers * warps * 32)
    for name, need in (("while partitions run", running), ("before and after", outside)):
        if need * 32 > there:
            found.append(f"{need * 32:,} of {there:,} registers {name}")
    return found
