"""Instructions and their control flow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from kaleido_kernels.proving.sass.flow import Loop, dominator_sets, natural_loops, nest_loops

INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:(?P<guard>@!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;"
)
ADDRESS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/")
LABEL = re.compile(r"^\s*\.?(?P<name>[\w.$]+):\s*$")
BRANCH_TARGET = re.compile(r"`\(\.?(?P<name>[\w.$]+)\)")
BRANCH_TABLE = re.compile(r'\(\*"BRANCH_TARGETS (?P<names>[^"]*)"\*\)')
"""The places that an indirect branch may go to, behind its operands."""
TENSOR = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "UTCMMA")
WARPGROUP_TENSOR = ("HGMMA", "QGMMA", "IGMMA")
ENDS_FLOW = ("EXIT", "RET", "KILL")
FOLLOWED = ("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU", "CALL")
"""Instructions that go on elsewhere; each must say where to."""
DIVERTS_FLOW = re.compile(r"(BR[AKX]|J[A-Z]|CALL|RET|RTT|EXIT|KILL|CONT|LONGJMP|SYNC$|SSY|P(BK|CNT|RET)$)")
"""Kinds that may go on elsewhere, of any architecture."""


class UnknownFlow(ValueError):
    """Machine code whose control flow cannot be read: to follow a part of it would pass the rest unseen."""


@dataclass(frozen=True)
class Instruction:
    """One line of machine code: ``guard`` is its predicate ("@P0" or ""), ``opcode`` carries its modifiers.

    ``targets`` are labels that it may go on to: one of a branch or a call, all of an indirect branch's table.
    """

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    targets: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The opcode without modifiers: HGMMA, LDG, BAR."""
        return self.opcode.split(".", 1)[0]

    @property
    def text(self) -> str:
        return f"{self.address:#06x} {self.guard} {self.opcode} {', '.join(self.operands)}".replace("  ", " ")


@dataclass
class Program:
    """One kernel's instructions with their control flow. Built by `parse_program`."""

    instructions: list[Instruction]
    labels: dict[str, int] = field(default_factory=dict)

    @cached_property
    def blocks(self) -> list[range]:
        """Basic blocks as ranges of instruction indices, in address order."""
        leaders = {0, *self.labels.values()}
        for index, instruction in enumerate(self.instructions):
            if instruction.targets or instruction.kind in ENDS_FLOW:
                leaders.add(index + 1)
        cuts = sorted(cut for cut in leaders if cut < len(self.instructions))
        return [range(a, b) for a, b in zip(cuts, [*cuts[1:], len(self.instructions)], strict=True) if b > a]

    @cached_property
    def successors(self) -> list[list[int]]:
        """For each block the blocks that may run next. A call goes on behind itself, too, and a return nowhere.

        Raises:
            UnknownFlow: an instruction goes on elsewhere, and where cannot be read.
        """
        check_flow(self)
        starts = {block.start: number for number, block in enumerate(self.blocks)}
        result: list[list[int]] = []
        for number, block in enumerate(self.blocks):
            last = self.instructions[block[-1]]
            following = [starts[self.labels[name]] for name in dict.fromkeys(last.targets)]
            ends = last.kind in ENDS_FLOW or (last.targets and last.kind != "CALL")
            falls = not ends or _conditional(last)
            if falls and number + 1 < len(self.blocks):
                following.append(number + 1)
            result.append(following)
        return result

    @cached_property
    def reached(self) -> frozenset[int]:
        """The blocks that some way from the first instruction leads to."""
        seen, waiting = {0}, [0]
        while waiting:
            for following in self.successors[waiting.pop()]:
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
        return frozenset(seen)

    @cached_property
    def predecessors(self) -> list[list[int]]:
        result: list[list[int]] = [[] for _ in self.blocks]
        for number, following in enumerate(self.successors):
            for other in following:
                result[other].append(number)
        return result

    @cached_property
    def dominators(self) -> list[set[int]]:
        """For each block the blocks that every way to it passes."""
        return dominator_sets(self.successors, self.predecessors)

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops with their nesting depth, spin waits and the trap at the end included."""
        return nest_loops(natural_loops(self.successors, self.predecessors, self.dominators))

    def inside(self, loop: Loop) -> Iterator[Instruction]:
        for number in sorted(loop.blocks):
            yield from self.of_block(number)

    def of_block(self, number: int) -> Iterator[Instruction]:
        return (self.instructions[index] for index in self.blocks[number])

    @cached_property
    def tensor_loops(self) -> list[Loop]:
        """The innermost loops that hold tensor instructions: the step loop of narrow, the k loops of wide."""
        holding = [loop for loop in self.loops if any(is_tensor(item) for item in self.inside(loop))]
        return [loop for loop in holding if not any(other.blocks < loop.blocks for other in holding)]

    @cached_property
    def work_loops(self) -> list[Loop]:
        """The loops to judge: `tensor_loops`, or where there are none the innermost loops of plain products.

        Those are FFMA of operands in shared memory; FFMA of registers alone make activations and noise.
        """
        if self.tensor_loops:
            return self.tensor_loops
        kinds = [(loop, {item.kind for item in self.inside(loop)}) for loop in self.loops if loop.innermost]
        return [loop for loop, found in kinds if {"FFMA", "LDS"} <= found]


def _conditional(instruction: Instruction) -> bool:
    """Whether the instruction may fall through although it names a target or ends the flow."""
    named_predicate = any(re.fullmatch(r"!?U?P\d", operand) for operand in instruction.operands)
    may_diverge = instruction.opcode.startswith(("BRA.DIV", "BRA.CONV"))
    return may_diverge or instruction.guard not in ("", "@PT") or (instruction.kind == "BRA" and named_predicate)


def check_flow(program: Program) -> None:
    """Raises `UnknownFlow` for the first instruction that goes on where it cannot be followed."""
    instructions, labels = program.instructions, program.labels
    for place, item in enumerate(instructions):
        missing = [name for name in item.targets if labels.get(name, len(instructions)) >= len(instructions)]
        if missing:
            raise UnknownFlow(f"{item.text}: goes on at {missing[0]}, which is not there")
        if item.kind in FOLLOWED and not item.targets:
            raise UnknownFlow(f"{item.text}: goes on elsewhere, and where is not said")
        if item.kind not in (*FOLLOWED, *ENDS_FLOW) and DIVERTS_FLOW.match(item.kind):
            raise UnknownFlow(f"{item.text}: may go on elsewhere, and what it does is not known here")
        if item.kind == "BSYNC" and not {place, place + 1} & _meeting_places(program, item.operands[-1]):
            raise UnknownFlow(f"{item.text}: threads that met here go on elsewhere")


def _meeting_places(program: Program, barrier: str) -> set[int]:
    """Where threads go on that met at a convergence barrier: there, or behind it, `BSYNC` falls through."""
    found = (BRANCH_TARGET.search(i.operands[-1]) for i in program.instructions if _sets_meeting(i, barrier))
    return {program.labels[name["name"]] for name in found if name and name["name"] in program.labels}


def _sets_meeting(instruction: Instruction, barrier: str) -> bool:
    return instruction.kind == "BSSY" and instruction.operands[0] == barrier


def is_tensor(instruction: Instruction) -> bool:
    return instruction.kind in TENSOR


def parse_program(text: str) -> Program:
    """Reads the output of ``nvdisasm -c`` for a cubin with one kernel (later functions are appended as they stand).

    Raises:
        UnknownFlow: a line that is none of an instruction although it has an address.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = LABEL.match(line)
        if label:
            labels[label["name"]] = len(instructions)
            continue
        found = INSTRUCTION.search(line)
        if found:
            instructions.append(_instruction(found))
        elif ADDRESS.match(line):
            raise UnknownFlow(f"no instruction that can be read: {line.strip()}")
    return Program(instructions, labels)


def _instruction(found: re.Match[str]) -> Instruction:
    text, targets = found["operands"], tuple[str, ...]()
    if table := BRANCH_TABLE.search(text):
        targets = tuple(name.strip().removeprefix(".") for name in table["names"].split(",") if name.strip())
        text = text[: table.start()]
    elif found["opcode"].split(".", 1)[0] in FOLLOWED:
        targets = tuple(place["name"] for place in BRANCH_TARGET.finditer(text))
    operands = tuple(part.strip() for part in split_operands(text) if part.strip())
    return Instruction(int(found["address"], 16), found["guard"] or "", found["opcode"], operands, targets)


def split_operands(text: str) -> list[str]:
    """Operands of one instruction; commas inside brackets do not part them."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += character in "[({"
        depth -= character in "])}"
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [*parts, current]
