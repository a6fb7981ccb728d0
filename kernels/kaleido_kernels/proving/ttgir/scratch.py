"""Global memory that a kernel writes itself for copies of its own copy engine: fences, and who waits for them.

What threads store, the copy engine sees behind a fence of the global proxy by the same threads, a barrier of theirs,
and an arrival at an mbarrier that the copying partition waits for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from kaleido_kernels.proving.ttgir.barriers import ARRIVE, COPY, EXPECT, THREAD_BARRIERS, WAIT, Barrier, find_barriers
from kaleido_kernels.proving.ttgir.operations import Block, Operation, origin, partitions, slot_of

SCRATCH = "scratch"
"""In the name of a pointer to such memory."""
GLOBAL_FENCES = ("fence.proxy.async.global", "fence.proxy.async;")
Order = dict[Operation, list[Operation]]
"""For each operation of a partition those that may run next."""
STORED, FENCED, SHOWN = "stored", "fenced", "shown"


def order_of(block: Block) -> Order:
    """What may run after what in a block, through branches and loops; how often loops run is not looked at."""
    following: Order = {}
    _lay(block, [], following)
    return following


def _lay(block: Block, entries: list[Operation], following: Order) -> list[Operation]:
    """Adds a block that is entered from ``entries``; returns where it may be left from."""
    for operation in block.operations:
        for entry in entries:
            following[entry].append(operation)
        following.setdefault(operation, [])
        entries = [operation]
        if operation.name == "scf.for":
            for last in _lay(operation.blocks[0], entries, following):
                following[last].append(operation)
        elif operation.name == "scf.while":
            entries = _lay(operation.blocks[0], entries, following)
            for last in _lay(operation.blocks[1], entries, following):
                following[last].append(operation)
        elif operation.name == "scf.if":
            entries = [last for inner in operation.blocks for last in _lay(inner, [operation], following)]
            if len(operation.blocks) == 1:
                entries.append(operation)
    return entries


def spread(
    following: Order, first: frozenset[str], step: Callable[[Operation, frozenset[str]], frozenset[str]],
    meet: Callable[[frozenset[str], frozenset[str]], frozenset[str]],
) -> dict[Operation, frozenset[str]]:  # fmt: skip
    """What is known before each operation: ``step`` passes one, ``meet`` joins ways."""
    start = next(iter(following), None)
    known = {start: first} if start is not None else {}
    waiting = list(known)
    while waiting:
        operation = waiting.pop()
        after = step(operation, known[operation])
        for other in following[operation]:
            joined = meet(known[other], after) if other in known else after
            if known.get(other) != joined:
                known[other] = joined
                waiting.append(other)
    return known


def unfenced_scratch(module: Block) -> list[str]:
    """Copies of what the kernel stored that may run before it is there, as readable lines; none without such stores."""
    parts = partitions(module) or [module]
    storing = {part.name for part in parts if any(map(_stores_scratch, part.walk()))}
    copies = [operation for operation in module.walk() if operation.name == COPY]
    descriptors = {origin(copy.operands[0]) for copy in copies}
    if not storing:
        several = ", ".join(sorted(value.name for value in descriptors))
        return [f"copies from {several}, and nothing is stored to {SCRATCH} memory"] if len(descriptors) > 1 else []
    shown, early = _shown_by(parts, find_barriers(module))
    missing = sorted(storing - {name for names in shown.values() for name in names})
    if missing:
        return [f"{name} stores, and arrives nowhere behind a fence and a barrier" for name in missing] + early
    waited = _guarded(parts, shown)
    if not any(
        all(storing <= waited[copy] for copy in copies if origin(copy.operands[0]) is each) for each in descriptors
    ):
        return [f"no descriptor's copies all wait for {', '.join(sorted(storing))}"]
    return []


def _stores_scratch(operation: Operation) -> bool:
    return operation.name == "tt.store" and SCRATCH in origin(operation.operands[0]).name


def is_fence(operation: Operation) -> bool:
    """Whether an operation is a fence of the global proxy."""
    return any(fence in operation.text for fence in GLOBAL_FENCES)


def _pass_fences(operation: Operation, state: frozenset[str]) -> frozenset[str]:
    if _stores_scratch(operation):
        return state | {STORED}
    if is_fence(operation) and STORED in state:
        return state - {STORED} | {FENCED}
    if operation.name in THREAD_BARRIERS and FENCED in state:
        return state - {FENCED} | {SHOWN}
    return state


def _shown_by(parts: list[Block], barriers: list[Barrier]) -> tuple[dict[Barrier, set[str]], list[str]]:
    """Barriers whose arrivals say that scratch memory is there, with the partitions that say so; arrivals too early.

    An arrival in front of a fence is a fault only where no other barrier shows the same: slots are given back while
    scratch memory is being written.
    """
    shown: dict[Barrier, set[str]] = defaultdict(set)
    early: list[str] = []
    for part in parts:
        known = spread(order_of(part), frozenset(), _pass_fences, frozenset.union)
        for barrier in barriers:
            arrivals = [known[each] for each in barrier.of(ARRIVE) if each in known]
            if any(state & {STORED, FENCED} for state in arrivals):
                early.append(f"{barrier.name}: {part.name} may arrive between its stores and their fence and barrier")
            elif any(SHOWN in state for state in arrivals):
                shown[barrier].add(part.name)
    return shown, early


def _guarded(parts: list[Block], shown: dict[Barrier, set[str]]) -> dict[Operation, frozenset[str]]:
    """For each copy the partitions whose scratch memory it waits for, on every way to it from its partition's begin.

    Waits for a slot of the ring do not count: in the first round every slot is free.
    """
    said: dict[Operation, set[str]] = defaultdict(set)
    filled = {slot_of(each.operands[0])[1] for part in parts for each in part.walk() if each.name == EXPECT}
    for barrier, names in shown.items():
        for wait in barrier.of(WAIT):
            number = slot_of(wait.operands[0])[1]
            if number is None or number not in filled:
                said[wait] |= names
    found: dict[Operation, frozenset[str]] = {}
    for part in parts:

        def step(operation: Operation, state: frozenset[str]) -> frozenset[str]:
            return state | said.get(operation, set())

        found |= spread(order_of(part), frozenset(), step, frozenset.intersection)
    return found
