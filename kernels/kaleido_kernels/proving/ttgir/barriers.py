"""Barriers in shared memory (mbarriers): who initialises them, arrives at them, and waits for them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations

from kaleido_kernels.proving.ttgir.operations import Block, Operation, Value, constant, origin, slot_of

COPY = "ttng.async_tma_copy_global_to_local"
INIT, WAIT, ARRIVE, EXPECT = "ttng.init_barrier", "ttng.wait_barrier", "ttng.arrive_barrier", "ttng.barrier_expect"
KNOWN = (COPY, INIT, WAIT, ARRIVE, EXPECT, "ttng.inval_barrier", "ttg.barrier", "gpu.barrier", "ttg.local_barrier")
THREAD_BARRIERS = ("ttg.barrier", "gpu.barrier", "ttg.local_barrier")
"""The barrier of a partition's threads, by its names in Triton's versions."""
ELEMENT_BITS = {"f8E4M3FN": 8, "f8E5M2": 8, "f16": 16, "bf16": 16, "f32": 32, "i8": 8, "i16": 16, "i32": 32}


@dataclass(eq=False)
class Barrier:
    """One barrier: number ``slot`` of those that were allocated together, and the operations that name it.

    An operation whose number is found at run time names every slot.
    """

    memory: Value
    slot: int
    operations: list[Operation] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.memory.name}[{self.slot}]"

    def of(self, *names: str) -> list[Operation]:
        return [operation for operation in self.operations if operation.name in names]


def barrier_operand(operation: Operation) -> Value:
    """The barrier that an operation names."""
    if operation.name == COPY:
        return operation.operands[1 - _behind_coordinates(operation)]
    return operation.operands[0]


def copied_to(operation: Operation) -> Value:
    """Where a copy puts what it loads."""
    return operation.operands[-_behind_coordinates(operation)]


def copied_bytes(operation: Operation) -> int:
    """Bytes of a copy of the copy engine, from its descriptor's block."""
    found = re.search(r"!tt\.tensordesc<(?:tensor<)?((?:\d+x)+)(\w+)", operation.text)
    if not found or found[2] not in ELEMENT_BITS:
        raise ValueError(f"a copy whose size cannot be read: {operation.text}")
    size = ELEMENT_BITS[found[2]] // 8
    for side in found[1].split("x")[:-1]:
        size *= int(side)
    return size


def _behind_coordinates(operation: Operation) -> int:
    """How many operands stand behind the coordinates: where to, barrier, and a predicate."""
    return operation.text.partition("] ")[2].partition(" :")[0].count("%")


def slots(memory: Value) -> int:
    """How many barriers, or slots of memory, were allocated together."""
    source = memory.source
    found = re.search(r"-> !ttg\.memdesc<(\d+)x\d", source.text) if isinstance(source, Operation) else None
    return int(found[1]) if found else 1


def find_barriers(module: Block) -> list[Barrier]:
    """All barriers of a kernel."""
    found: dict[Value, list[Operation]] = defaultdict(list)
    for operation in module.walk():
        if operation.name in (COPY, INIT, WAIT, ARRIVE, EXPECT):
            found[origin(barrier_operand(operation))].append(operation)
    barriers = []
    for memory, operations in found.items():
        # A part of one barrier, (1 x i64), is the barrier itself: "1x1xi64" has slots, "1xi64" is one.
        for slot in range(slots(memory)):
            barriers.append(Barrier(memory, slot, [each for each in operations if slot in _named(each, memory)]))
    return barriers


def _named(operation: Operation, memory: Value) -> range | list[int]:
    """The slots that an operation may name."""
    _, number = slot_of(barrier_operand(operation))
    everything = range(slots(memory))
    if number is None:
        return everything
    value = constant(number)
    if value is not None:
        return [value]
    block = number.source
    if isinstance(block, Block) and block.parent is not None and block.parent.name == "scf.for" and number.index == 0:
        first, end, step = (constant(bound) for bound in block.parent.operands[:3])
        if first is not None and end is not None and step:
            return range(first, end, step)
    return everything


def unpaired_barriers(module: Block) -> list[str]:
    """Barriers whose arrivals, bytes and waits do not fit together, as readable lines."""
    found = [
        f"{operation.name}: of its barrier nothing is known here"
        for operation in module.walk()
        if "barrier" in operation.name and operation.name not in KNOWN
    ]
    for barrier in find_barriers(module):
        found += [f"{barrier.name}: {fault}" for fault in _faults(barrier)]
        if barrier.slot == 0:  # the copies of all slots are the same operations
            found += [f"{barrier.memory.name}: {fault}" for fault in _wrong_bytes(barrier)]
    return found + list(_unasked_slots(module))


def _unasked_slots(module: Block) -> Iterator[str]:
    """Slots that a partition fills without having waited for them: in front of each announcement, and as near as it."""
    for operation in module.walk():
        if operation.name != EXPECT or not operation.partition:
            continue
        _, number = slot_of(operation.operands[0])
        before = operation.block.operations[: operation.block.operations.index(operation)]
        asked = [slot_of(each.operands[0])[1] for each in before if each.name == WAIT]
        if number is not None and number not in asked:
            yield f"{operation.partition} announces copies to slot {number.name}, and did not wait for it"


def _faults(barrier: Barrier) -> Iterator[str]:
    inits, waits, copies = barrier.of(INIT), barrier.of(WAIT), barrier.of(COPY)
    arrivals, expected = barrier.of(ARRIVE), barrier.of(EXPECT)
    if not (waits or arrivals or expected or copies):
        return
    if len(inits) != 1:
        yield f"initialised {len(inits)} times"
    elif inits[0].partition:
        yield f"initialised by {inits[0].partition}, while the others run"
    if waits and not arrivals and not expected:
        yield "waited for, and nothing arrives"
    if not waits:
        yield "armed, and nothing waits for it"
    if bool(copies) != bool(expected):
        yield "copies signal it, and it expects no bytes" if copies else "expects bytes that no copy brings"
    yield from _wrong_counts(barrier)


def _wrong_counts(barrier: Barrier) -> Iterator[str]:
    """In a phase each partition arrives once, by whichever operation: as often as the barrier was told to expect."""
    counts: dict[str, set[int]] = defaultdict(set)
    for operation in barrier.of(ARRIVE, EXPECT):
        counts[operation.partition].add(_count(operation) if operation.name == ARRIVE else 1)
    for init in barrier.of(INIT):
        for partition, several in counts.items():
            if len(several) > 1:
                yield f"{partition or 'the kernel'} arrives by {sorted(several)} at once"
        total = sum(max(several) for several in counts.values())
        if counts and total != _count(init):
            yield f"initialised for {_count(init)} arrivals, and {total} come ({', '.join(sorted(counts))})"


def _count(operation: Operation) -> int:
    found = re.search(r"barrier %\S+, (\d+)", operation.text)
    if not found:
        raise ValueError(f"an arrival whose count cannot be read: {operation.text}")
    return int(found[1])


def _wrong_bytes(barrier: Barrier) -> Iterator[str]:
    """Bytes that are expected where no set of copies brings them.

    That is the copies beside it, with or without those of blocks that expect nothing themselves: one tile may be
    announced together with copies that other operations issue later.
    """
    copies: dict[Block, int] = defaultdict(int)
    for copy in barrier.of(COPY):
        copies[copy.block] += copied_bytes(copy)
    expecting = {operation.block for operation in barrier.of(EXPECT)}
    later = {block: size for block, size in copies.items() if block not in expecting}
    sets = [chosen for n in range(len(later) + 1) for chosen in combinations(later, n)]
    announced: set[Block] = set()
    for operation in barrier.of(EXPECT):
        found = re.search(r"barrier_expect %\S+, (\d+)", operation.text)
        size, beside = int(found[1]) if found else -1, copies.get(operation.block, 0)
        fitting = [chosen for chosen in sets if beside + sum(later[block] for block in chosen) == size]
        announced.update(*fitting)
        if not fitting or size <= 0:
            yield f"{size} bytes are expected, and copies bring {beside} there, {list(later.values())} later"
    for block in later.keys() - announced:
        yield f"copies bring {later[block]} bytes that nothing expects"
