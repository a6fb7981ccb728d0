"""Dominators and natural loops of a control-flow graph: address ranges alone would mislead.

They would take an out-of-line spin wait, which jumps back into the middle of a loop, for a loop around it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Loop:
    """A natural loop: the index of its first block and of all its blocks; ``depth`` 1 is outermost."""

    head: int
    blocks: frozenset[int]
    depth: int = 1
    innermost: bool = True


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
