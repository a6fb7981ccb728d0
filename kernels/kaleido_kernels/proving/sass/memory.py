"""Loads and products that may read memory before the fence or barrier that they need."""

from __future__ import annotations

from collections.abc import Callable

from kaleido_kernels.proving.sass.flow import Loop
from kaleido_kernels.proving.sass.program import WARPGROUP_TENSOR, Instruction, Program

SHARED_PROXY_FENCES = ("FENCE.VIEW.ASYNC.S", "FENCE.VIEW.ASYNC.ALL", "FENCE.VIEW.ASYNC")
GLOBAL_LOADS = ("LDG", "LDGSTS", "UTMALDG")
GLOBAL_PROXY_FENCES = ("FENCE.VIEW.ASYNC.G", "FENCE.VIEW.ASYNC.ALL", "FENCE.VIEW.ASYNC")


def unfenced_products(program: Program, next_rounds: bool = False) -> list[str]:
    """Warp-group products that may read shared memory before it was fenced for them, as readable lines.

    They read it as the copy engine does: what threads stored (STS, STSM), and what their asynchronous copies brought
    (LDGSTS, once DEPBAR has waited for it), they see behind ``FENCE.VIEW.ASYNC.S`` only.

    Args:
        program: the machine code.
        next_rounds: whether rounds of a loop around the loops of products are followed by the next. Where activations
            stay in shared memory, the next layer reads what this one stored. Elsewhere what a round stores at its end
            is for threads, a layout changed on the way out.
    """
    inner = {loop.head for loop in program.tensor_loops}
    outer = [] if next_rounds else [loop for loop in program.loops if loop.head not in inner]
    found = _unfenced(program, outer, _reads_shared)
    return [f"{item.text}: reads shared memory that was not fenced" for item in found]


def unfenced_arrivals(program: Program) -> list[str]:
    """Arrivals at barriers in memory that may let the copy engine at shared memory that was not fenced for it.

    As in `unfenced_products`; all rounds of all loops are followed.
    """
    found = _unfenced(program, [], lambda item: item.opcode.startswith("SYNCS.ARRIVE"))
    return [f"{item.text}: shows shared memory that was not fenced" for item in found]


def _reads_shared(instruction: Instruction) -> bool:
    return instruction.kind in WARPGROUP_TENSOR and any("gdesc" in operand for operand in instruction.operands)


def _unfenced(program: Program, outer: list[Loop], at: Callable[[Instruction], bool]) -> list[Instruction]:
    """The instructions ``at`` which shared memory may be unfenced; next rounds of ``outer`` are not followed."""
    entry: list[set[str]] = [set() for _ in program.blocks]
    found: dict[int, Instruction] = {}
    waiting = list(range(len(program.blocks)))
    while waiting:
        number = waiting.pop()
        state = set(entry[number])
        for instruction in program.of_block(number):
            if "unfenced" in state and at(instruction):
                found[instruction.address] = instruction
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
    elif instruction.opcode in SHARED_PROXY_FENCES and instruction.guard in ("", "@PT"):
        state.discard("unfenced")


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
