"""What a round of a loop issues: how much of each kind, and where its copies lie against its products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from kaleido_kernels.proving.sass.flow import Loop
from kaleido_kernels.proving.sass.program import TENSOR, WARPGROUP_TENSOR, Instruction, Program, is_tensor

COUNTED = (
    *("HGMMA", "QGMMA", "HMMA", "UTCHMMA", "FFMA", "FADD", "FMUL", "FMNMX", "MUFU", "F2FP", "F2F", "SHFL"),
    *("PRMT", "LOP3", "ISETP", "FSETP", "SHF", "SEL", "FSEL", "IADD3", "LEA", "IMAD", "MOV"),
    *("LDG", "STG", "LDS", "LDSM", "STS", "STSM", "LDL", "STL", "LDGSTS", "UTMALDG", "UTMASTG", "UBLKCP"),
    *("BAR", "FENCE", "MEMBAR", "WARPGROUP", "DEPBAR", "LDGDEPBAR", "SYNCS", "CALL", "DFMA", "DMUL"),
)
COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")


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
