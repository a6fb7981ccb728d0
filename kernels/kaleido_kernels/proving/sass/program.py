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
LABEL = re.compile(r"^\s*\.?(?P<name>L_x_\w+):\s*$")
BRANCH_TARGET = re.compile(r"`\(\.?(?P<name>[\w.$]+)\)")
TENSOR = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "UTCMMA")
WARPGROUP_TENSOR = ("HGMMA", "QGMMA", "IGMMA")
ENDS_FLOW = ("EXIT", "RET", "BRX", "JMX", "KILL")


@dataclass(frozen=True)
class Instruction:
    """One line of machine code: ``guard`` is its predicate ("@P0" or ""), ``opcode`` carries its modifiers."""

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    target: str | None = None

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
            if instruction.target is not None or instruction.kind in ENDS_FLOW:
                leaders.add(index + 1)
        cuts = sorted(cut for cut in leaders if cut < len(self.instructions))
        return [range(a, b) for a, b in zip(cuts, [*cuts[1:], len(self.instructions)], strict=True) if b > a]

    @cached_property
    def successors(self) -> list[list[int]]:
        """For each block the blocks that may run next."""
        starts = {block.start: number for number, block in enumerate(self.blocks)}
        result: list[list[int]] = []
        for number, block in enumerate(self.blocks):
            last = self.instructions[block[-1]]
            following = []
            if last.target is not None and self.labels.get(last.target) in starts:
                following.append(starts[self.labels[last.target]])
            ends = last.kind in ENDS_FLOW or (last.target is not None and last.kind != "CALL")
            falls = not ends or _conditional(last)
            if falls and number + 1 < len(self.blocks):
                following.append(number + 1)
            result.append(following)
        return result

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


def is_tensor(instruction: Instruction) -> bool:
    return instruction.kind in TENSOR


def parse_program(text: str) -> Program:
    """Reads the output of ``nvdisasm -c`` for a cubin with one kernel (later functions are appended as they stand)."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = LABEL.match(line)
        if label:
            labels[label["name"]] = len(instructions)
            continue
        found = INSTRUCTION.search(line)
        if found:
            target = BRANCH_TARGET.search(found["operands"]) if found["opcode"].startswith(("BRA", "CALL")) else None
            operands = tuple(part.strip() for part in split_operands(found["operands"]) if part.strip())
            instructions.append(
                Instruction(
                    int(found["address"], 16),
                    found["guard"] or "",
                    found["opcode"],
                    operands,
                    target["name"] if target else None,
                )
            )
    return Program(instructions, labels)


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
