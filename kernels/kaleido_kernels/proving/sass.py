"""Reading machine code: instructions, loops, in-flight tensor instructions and barrier order. Plain Python, no Triton.

The text is what ``nvdisasm -c`` prints. Loops are natural loops of the control-flow graph: address ranges alone would
take an out-of-line spin wait, which jumps back into the middle of a loop, for a loop around it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:(?P<guard>@!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;"
)
LABEL = re.compile(r"^\s*\.?(?P<name>L_x_\w+):\s*$")
BRANCH_TARGET = re.compile(r"`\(\.?(?P<name>[\w.$]+)\)")
REGISTER = re.compile(r"(?<![A-Z\w])R(\d+)\b")
TENSOR_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)")

TENSOR = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "UTCMMA")
WARPGROUP_TENSOR = ("HGMMA", "QGMMA", "IGMMA")
ENDS_FLOW = ("EXIT", "RET", "BRX", "JMX", "KILL")
NO_RESULT = ("ST", "STG", "STS", "STL", "STSM", "RED", "REDG", "BAR", "BRA", "EXIT", "FENCE", "MEMBAR", "NOP", "R2P")
RESULT_AFTER_PREDICATE = ("SHFL", "ATOM", "ATOMG", "ATOMS", "MATCH")
COUNTED = (
    *("HGMMA", "QGMMA", "HMMA", "UTCHMMA", "FFMA", "FADD", "FMUL", "FMNMX", "MUFU", "F2FP", "F2F", "SHFL"),
    *("PRMT", "LOP3", "ISETP", "FSETP", "SHF", "SEL", "FSEL", "IADD3", "LEA", "IMAD", "MOV"),
    *("LDG", "STG", "LDS", "LDSM", "STS", "STSM", "LDL", "STL", "LDGSTS", "UTMALDG", "UTMASTG", "UBLKCP"),
    *("BAR", "FENCE", "MEMBAR", "WARPGROUP", "DEPBAR", "LDGDEPBAR", "SYNCS", "CALL", "DFMA", "DMUL"),
)


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


@dataclass(frozen=True)
class Loop:
    """A natural loop: the index of its first block and of all its blocks; ``depth`` 1 is outermost."""

    head: int
    blocks: frozenset[int]
    depth: int = 1
    innermost: bool = True


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


def natural_loops(
    successors: list[list[int]], predecessors: list[list[int]], dominators: list[set[int]]
) -> dict[int, frozenset[int]]:
    """Loop bodies by head block, one a head: blocks that reach a back edge without passing the head."""
    bodies: dict[int, set[int]] = {}
    for tail, following in enumerate(successors):
        for head in following:
            if head in dominators[tail]:
                body = bodies.setdefault(head, {head})
                waiting = [tail]
                while waiting:
                    block = waiting.pop()
                    if block not in body:
                        body.add(block)
                        waiting.extend(predecessors[block])
    return {head: frozenset(body) for head, body in bodies.items()}


def dominator_sets(successors: list[list[int]], predecessors: list[list[int]]) -> list[set[int]]:
    """For each block the blocks that every path from the entry passes; unreachable blocks dominate themselves only."""
    reached = {0}
    waiting = [0]
    while waiting:
        for following in successors[waiting.pop()]:
            if following not in reached:
                reached.add(following)
                waiting.append(following)
    everything = set(reached)
    result = [set(everything) if number in reached else {number} for number in range(len(successors))]
    result[0] = {0}
    changed = True
    while changed:
        changed = False
        for number in sorted(reached - {0}):
            sources = [result[source] for source in predecessors[number] if source in reached]
            new = set.intersection(*sources) | {number}
            if new != result[number]:
                result[number] = new
                changed = True
    return result


def nest_loops(bodies: dict[int, frozenset[int]]) -> list[Loop]:
    """Loops sorted by head, each with its depth and whether it holds no other loop with more than one block.

    A wait that spins on one barrier is a loop of one or two blocks without arithmetic; it does not make the loop around
    it an outer one, which `Program.tensor_loops` respects by looking at tensor instructions only.
    """
    loops = []
    for head, blocks in sorted(bodies.items()):
        depth = sum(blocks <= other for other in bodies.values())
        innermost = not any(other < blocks for other in bodies.values())
        loops.append(Loop(head, blocks, depth, innermost))
    return loops


def count_kinds(instructions: Iterable[Instruction]) -> Counter[str]:
    """How often each kind of `COUNTED` occurs, and ``all`` for the sum over every kind."""
    result: Counter[str] = Counter()
    for instruction in instructions:
        result["all"] += 1
        if instruction.kind in COUNTED:
            result[instruction.kind] += 1
    return result


def path_counts(program: Program, loop: Loop) -> tuple[Counter[str], Counter[str]]:
    """Counts along the shortest and along the longest way through one round of a loop, back edges left out.

    Where a loop branches, as the flat loop over layers does for the last one, these are its common and its rare round.
    """
    dominators = program.dominators
    ways: dict[int, tuple[Counter[str], Counter[str]]] = {}

    def best(block: int) -> tuple[Counter[str], Counter[str]]:
        if block not in ways:
            own = count_kinds(program.of_block(block))
            forward = [n for n in program.successors[block] if n in loop.blocks and n not in dominators[block]]
            onward = [best(number) for number in forward] or [(Counter(), Counter())]
            shortest = min((way[0] for way in onward), key=lambda way: way["all"])
            longest = max((way[1] for way in onward), key=lambda way: way["all"])
            ways[block] = own + shortest, own + longest
        return ways[block]

    return best(loop.head)


def shortest_way(program: Program, loop: Loop) -> list[Instruction]:
    """Instructions of the shortest round of a loop, head to back edge: no spinning, nothing rare."""
    dominators = program.dominators
    ways: dict[int, list[int]] = {}

    def best(block: int) -> list[int]:
        if block not in ways:
            forward = [n for n in program.successors[block] if n in loop.blocks and n not in dominators[block]]
            onward = min(
                (best(n) for n in forward), key=lambda way: sum(len(program.blocks[n]) for n in way), default=[]
            )
            ways[block] = [block, *onward]
        return ways[block]

    return [item for block in best(loop.head) for item in program.of_block(block)]


@dataclass(frozen=True)
class CopyOrder:
    """What a round of a loop of products does between issuing its asynchronous copies and the next wait for copies.

    Args:
        ahead: rounds from issuing a copy to waiting for it, from the number of copies that may stay in flight at the
            wait: 1 where it waits for all of them; None where a barrier in memory decides (the copy engine's).
        products: share of a round's products that run meanwhile, 0 to 1.
        other: the same share of its other instructions.
    """

    ahead: int | None
    products: float
    other: float


COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")


def copy_order(program: Program, loop: Loop) -> CopyOrder | None:
    """Where the copies of ``loop`` lie against its products; None for a loop without asynchronous copies.

    The round is followed from its last copy to the next wait for copies, around the back edge. Products are done once
    ``WARPGROUP.DEPBAR`` has waited for their group; other kinds of products are done when they have been passed.
    """
    way = shortest_way(program, loop)
    last = max((place for place, item in enumerate(way) if item.kind in COPIES), default=None)
    if last is None:
        return None
    around = [*way[last + 1 :], *way[: last + 1]]
    until = next((place for place, item in enumerate(around) if _waits_for_copies(item)), len(around))
    kinds = TENSOR if any(is_tensor(item) for item in way) else ("FFMA",)
    products = sum(item.kind in kinds for item in way)
    passed = sum(item.kind in kinds for item in around[:until])
    running = _unfinished_products([*around, *around])
    return CopyOrder(
        _rounds_ahead(way),
        min(1.0, (running + passed) / max(products, 1)),
        (until - passed) / max(len(way) - products, 1),
    )


def _waits_for_copies(instruction: Instruction) -> bool:
    """DEPBAR waits for copies by threads, a phase check of a barrier in memory for those of the copy engine."""
    counted = instruction.kind == "DEPBAR" and len(instruction.operands) == 2
    return counted or (instruction.kind == "SYNCS" and "PHASECHK" in instruction.opcode)


def _unfinished_products(way: Iterable[Instruction]) -> int:
    """Warp-group tensor instructions that have not been waited for at the end of ``way``."""
    groups: list[int] = []
    open_group = 0
    for item in way:
        if item.kind in WARPGROUP_TENSOR:
            open_group += 1
            if "gsb0" in item.operands:
                groups.append(open_group)
                open_group = 0
        elif item.opcode.startswith("WARPGROUP.DEPBAR"):
            pending = int(item.operands[-1], 16)
            groups = groups[len(groups) - pending :] if pending < len(groups) else groups
    return sum(groups) + open_group


def _rounds_ahead(way: list[Instruction]) -> int | None:
    """Rounds between copy and wait, from ``DEPBAR.LE SB0, n`` and the groups of copies that a round closes."""
    closed = sum(item.kind == "LDGDEPBAR" for item in way)
    pending = [int(item.operands[-1], 16) for item in way if item.kind == "DEPBAR" and len(item.operands) == 2]
    return min(pending) // closed + 1 if closed and pending else None


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


SHARED_PROXY_FENCES = ("FENCE.VIEW.ASYNC.S", "FENCE.VIEW.ASYNC.ALL", "FENCE.VIEW.ASYNC")


def unfenced_products(program: Program) -> list[str]:
    """Warp-group products that may read shared memory before it was fenced for them, as readable lines.

    They read it as the copy engine does: what threads stored (STS, STSM), and what their asynchronous copies brought
    (LDGSTS, once DEPBAR has waited for it), they see behind ``FENCE.VIEW.ASYNC.S`` only. Rounds of a loop around the
    loops of products are not followed: what they store at their end is for threads, a layout changed on the way out.
    """
    inner = {loop.head for loop in program.tensor_loops}
    outer = [loop for loop in program.loops if loop.head not in inner]
    entry: list[set[str]] = [set() for _ in program.blocks]
    found: dict[int, str] = {}
    waiting = list(range(len(program.blocks)))
    while waiting:
        number = waiting.pop()
        state = set(entry[number])
        for instruction in program.of_block(number):
            reads_shared = any("gdesc" in operand for operand in instruction.operands)
            if instruction.kind in WARPGROUP_TENSOR and reads_shared and "unfenced" in state:
                found[instruction.address] = f"{instruction.text}: reads shared memory that was not fenced"
            _advance_fences(state, instruction)
        for following in program.successors[number]:
            next_round = any(following == loop.head and number in loop.blocks for loop in outer)
            if not next_round and not state <= entry[following]:
                entry[following] |= state
                waiting.append(following)
    return [found[address] for address in sorted(found)]


def _advance_fences(state: set[str], instruction: Instruction) -> None:
    """Applies one instruction to what is known of shared memory: "copying" and "unfenced" where some of it may be."""
    if instruction.kind == "LDGSTS":
        state.add("copying")
    elif instruction.kind in ("STS", "STSM"):
        state.add("unfenced")
    elif instruction.kind == "DEPBAR" and "copying" in state:
        state.add("unfenced")
        if int(instruction.operands[-1], 16) == 0:
            state.discard("copying")
    elif instruction.opcode in SHARED_PROXY_FENCES:
        state.discard("unfenced")


GLOBAL_LOADS = ("LDG", "LDGSTS", "UTMALDG")
GLOBAL_PROXY_FENCES = ("FENCE.VIEW.ASYNC.G", "FENCE.VIEW.ASYNC.ALL", "FENCE.VIEW.ASYNC")


def unordered_loads(program: Program) -> list[str]:
    """Loads that may run before the barrier that orders them after a tile's stores, as readable lines (wide kernels).

    From every global store the code is followed forwards: a generic load needs ``BAR`` first, a bulk load by the copy
    engine (UTMALDG) needs ``FENCE.VIEW.ASYNC.G`` (or the fence of all spaces) and then ``BAR``. The innermost loop
    around a store may load other places meanwhile: its back edge is not followed (`own_loop`).
    """
    found: dict[int, str] = {}
    for number in range(len(program.blocks)):
        for offset, instruction in enumerate(program.of_block(number)):
            if instruction.kind == "STG":
                own = own_loop(program, number)
                for load in reached_loads(program, number, offset + 1, own):
                    found.setdefault(load.address, f"{load.text}: reached from {instruction.text} without its barrier")
    return [found[address] for address in sorted(found)]


def own_loop(program: Program, block: int) -> Loop | None:
    """The smallest loop around ``block`` that holds no fence: rounds of it store and load different places.

    These are the loop over a layer's output tiles and the loop over blocks of the state; a loop with a fence is the
    loop over layers, steps or tiles, whose rounds do read what the last round stored.
    """
    around = [loop for loop in program.loops if block in loop.blocks]
    smallest = min(around, key=lambda loop: len(loop.blocks), default=None)
    if smallest is None or any(item.opcode in GLOBAL_PROXY_FENCES for item in program.inside(smallest)):
        return None
    return smallest


def reached_loads(program: Program, block: int, offset: int, own: Loop | None) -> list[Instruction]:
    """Loads on some path from an instruction that pass no sufficient barrier; paths stop at barriers and where
    ``own`` would start its next round."""
    loads: list[Instruction] = []
    seen: set[tuple[int, bool, bool]] = set()
    waiting = [(block, offset, False, False)]
    while waiting:
        number, start, fenced, ordered = waiting.pop()
        finished = False
        for instruction in list(program.of_block(number))[start:]:
            if instruction.opcode in GLOBAL_PROXY_FENCES:
                fenced = True
            elif instruction.kind == "BAR":
                ordered = True
                finished = fenced
            elif instruction.kind == "UTMALDG" or (instruction.kind in GLOBAL_LOADS and not ordered):
                loads.append(instruction)
                finished = True
            if finished:
                break
        if finished:
            continue
        for following in program.successors[number]:
            key = (following, fenced, ordered)
            next_round = own is not None and following == own.head and number in own.blocks
            if not next_round and key not in seen:
                seen.add(key)
                waiting.append((following, 0, fenced, ordered))
    return loads
