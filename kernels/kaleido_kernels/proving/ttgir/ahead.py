"""How many rounds' copies may be under way while a product runs, in each loop of products that loads.

Each partition that multiplies is played through with what is known of its numbers: which copies were issued, waited for
and given back, and which products still run. Copies of other partitions are taken to be there when they are waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kaleido_kernels.proving.ttgir.barriers import ARRIVE, COPY, EXPECT, WAIT, barrier_operand, copied_to, slots
from kaleido_kernels.proving.ttgir.numbers import Numbers, compute, number_of
from kaleido_kernels.proving.ttgir.operations import Block, Operation, Value, constant, origin, partitions, slot_of

PRODUCTS = ("ttng.warp_group_dot", "tt.dot")
PRODUCT_WAIT, COPY_WAIT, COMMIT = "ttng.warp_group_dot_wait", "ttg.async_wait", "ttg.async_commit_group"
EVENTS = (*PRODUCTS, PRODUCT_WAIT, COPY_WAIT, COMMIT, WAIT, ARRIVE, EXPECT)
LOOPS = ("scf.for", "scf.while")
ROUNDS, OUTER_ROUNDS = 24, 2
"""Rounds that are played of a loop of products, more than any number of slots, and of a loop around it."""


@dataclass(frozen=True)
class Ahead:
    """A loop of products that loads: rounds' copies under way at most while a product runs, of how many buffers."""

    loop: str
    ahead: int
    buffers: int


@dataclass
class _Loop:
    """A loop of products that is being played: copies that it issues a round, and what was seen.

    Of several times that it runs the longest counts: a single round has no other behind it.
    """

    operation: Operation
    a_round: int
    begun: int = 0
    rounds: int = 0
    most: int = 0
    warm: bool = False

    def begin(self, rounds: int, under_way: int) -> None:
        self.begun = max(self.begun, under_way)
        if rounds > self.rounds:
            self.rounds, self.most = rounds, 0


@dataclass
class _Player:
    """Plays one partition.

    Args:
        rings: memory of slots that copies of other partitions fill, with the barriers that these signal.
        loops: the loops of products, innermost ones.
        under_way: copies that the partition itself issued and did not wait for.
        held: slots that were waited for and not given back.
        running: products that were not waited for, with the slots that they read.
        inside: the loop of products that is being played.
    """

    rings: dict[Value, Value]
    loops: dict[Operation, _Loop]
    known: Numbers = field(default_factory=dict)
    under_way: int = 0
    held: list[int | None] = field(default_factory=list)
    running: list[set[int | None]] = field(default_factory=list)
    inside: _Loop | None = None
    faults: list[str] = field(default_factory=list)

    def play(self, block: Block) -> list[int | None]:
        """Plays a block; returns what it hands on."""
        for operation in block.operations:
            if operation.name in ("scf.yield", "scf.condition"):
                handed = operation.operands[operation.name == "scf.condition" :]
                return [number_of(each, self.known) for each in handed]
            if operation.name in LOOPS:
                handed_on = self._loop(operation)
            elif operation.name == "scf.if":
                handed_on = self._branch(operation)
            else:
                self._event(operation)
                handed_on = [compute(operation, self.known)]
            self.known.update(zip(operation.results, handed_on, strict=False))
        return []

    def _branch(self, operation: Operation) -> list[int | None]:
        """Of a branch whose condition is not known the way that does more is taken."""
        condition = number_of(operation.operands[0], self.known)
        place = int(condition == 0)
        if condition is None:
            work = [sum(each.name in EVENTS for each in block.walk()) for block in operation.blocks]
            place = work.index(max(work))
        return self.play(operation.blocks[place]) if place < len(operation.blocks) else []

    def _loop(self, operation: Operation) -> list[int | None]:
        if not any(each.name in PRODUCTS or each.name in (WAIT, ARRIVE) for each in inside(operation)):
            return []
        around, self.inside = self.inside, self.loops.get(operation)
        bounded = operation.name == "scf.for"
        carried: list[int | None] = [number_of(each, self.known) for each in operation.operands[3 * bounded :]]
        first, end, step = (number_of(each, self.known) for each in operation.operands[:3]) if bounded else (None,) * 3
        rounds = ROUNDS if self.inside else OUTER_ROUNDS
        if first is not None and end is not None and step:
            rounds = min(ROUNDS, len(range(first, end, step)))
        if self.inside:
            self.inside.begin(rounds, self.under_way)
        for number in range(rounds):
            if self.inside:
                self.inside.warm = number >= rounds // 2 and rounds == self.inside.rounds
            # Numbers that are not known count from 0: only their differences matter.
            numbers = [0 if each is None else each for each in carried]
            if bounded:
                numbers = [(first or 0) + number * (step or 1), *numbers]
            for block in operation.blocks:
                self.known.update(zip(block.arguments, numbers, strict=False))
                carried = self.play(block)
                numbers = [0 if each is None else each for each in carried]
        if self.inside and not self.rings:
            self.under_way = 0  # the last rounds issue nothing, which is not known here
        self.inside = around
        return carried

    def _event(self, operation: Operation) -> None:
        """Applies what copies, waits for, gives back or multiplies."""
        name = operation.name
        if name == COMMIT or (name == EXPECT and not self.rings):
            self.under_way += 1
        elif name == COPY_WAIT:
            self.under_way = min(self.under_way, operation.number("num"))
        elif name == WAIT:
            self._wait(operation)
        elif name == ARRIVE and self.rings:
            self._give_back(operation)
        elif name == PRODUCT_WAIT:
            pending = operation.number("pendings")
            self.running = self.running[len(self.running) - pending :] if pending else []
        elif name in PRODUCTS:
            read = {slot for each in operation.operands[:2] for slot in self._slots_read(each)}
            if not read <= set(self.held):
                self._blame(operation, "a product reads a slot that was not waited for")
            self.running.append(read)
        self._note()
        if name in PRODUCTS and "isAsync = true" not in operation.text:
            self.running.pop()

    def _note(self) -> None:
        """Counts what is under way while a product runs."""
        if self.running and self.inside and self.inside.warm:
            room = {slots(barriers) for barriers in self.rings.values()}
            free = max(room, default=0) - len(self.held) if self.rings else 0
            self.inside.most = max(self.inside.most, self.under_way, free)

    def _blame(self, operation: Operation, fault: str) -> None:
        line = f"{operation.partition or 'kernel'}: {fault}"
        if line not in self.faults:
            self.faults.append(line)

    def _wait(self, operation: Operation) -> None:
        memory, number = slot_of(operation.operands[0])
        if not self.rings:
            self.under_way = max(0, self.under_way - 1)
        elif memory in self.rings.values():
            slot = number_of(number, self.known) if number is not None else 0
            if slot is None:
                self._blame(operation, "waits for a slot whose number cannot be read")
            if slot in self.held:
                self._blame(operation, "waits for a slot that it did not give back")
            else:
                self.held.append(slot)

    def _give_back(self, operation: Operation) -> None:
        memory, number = slot_of(operation.operands[0])
        ring = memory not in self.rings.values() and slots(memory) in map(slots, self.rings.values())
        if not ring or number is None or [number_of(each, self.known) for each in operation.operands[1:]] == [0]:
            return
        if constant(number) is not None and slots(memory) > 1:
            return  # one of several barriers that are no ring
        slot = number_of(number, self.known)
        if slot is None:
            self._blame(operation, "gives back a slot whose number cannot be read")
        elif any(slot in read for read in self.running):
            self._blame(operation, "gives back a slot while a product may read it")
        elif slot not in self.held:
            self._blame(operation, "gives back a slot that it does not hold")
        if slot in self.held:
            self.held.remove(slot)

    def _slots_read(self, value: Value) -> Iterator[int | None]:
        """The slots that a product's operand lies in; none where it lies elsewhere."""
        number = None
        while isinstance(value.source, Operation) and value.source.name.startswith("ttg.memdesc_"):
            if value.source.name == "ttg.memdesc_index":
                number = value.source.operands[1]
            value = value.source.operands[0]
        if origin(value) in self.rings and number is not None:
            yield number_of(number, self.known)


def inside(operation: Operation) -> Iterator[Operation]:
    """All operations inside of one."""
    for block in operation.blocks:
        yield from block.walk()


def product_loops(module: Block) -> list[Operation]:
    """The loops that hold products, and no other such loop."""
    holding = [each for each in module.walk() if each.name in LOOPS and any(o.name in PRODUCTS for o in inside(each))]
    outer = {around for loop in holding for around in loop.around}
    return [loop for loop in holding if loop not in outer]


def copies_ahead(module: Block) -> tuple[list[Ahead], list[str]]:
    """The innermost loops of products that load what they multiply, and what is wrong with slots and waits."""
    found: list[Ahead] = []
    faults = waits_for_itself(module)
    for part in partitions(module) or _functions(module):
        if not any(each.name in PRODUCTS for each in part.walk()):
            continue
        loops = {loop: _Loop(loop, _issues(loop)) for loop in product_loops(part)}
        player = _Player(_rings(module, part), loops)
        player.play(part)
        if player.held:
            player.faults.append(f"{part.name}: keeps {len(player.held)} slots at its end")
        faults += player.faults
        for loop in loops.values():
            if loop.a_round or player.rings:
                room = max(map(slots, player.rings.values())) if player.rings else loop.begun // loop.a_round + 1
                ahead = loop.most // max(loop.a_round, 1)
                found.append(Ahead(_name(loop.operation), ahead, room))
    return found, faults


def waits_for_itself(module: Block) -> list[str]:
    """Partitions that only copy and wait for their own copies: they run ahead of nothing."""
    found = []
    for copying in sorted({each.partition for each in module.walk() if each.name == COPY}):
        own = [each for each in module.walk() if each.partition == copying]
        if any(each.name in PRODUCTS for each in own):
            continue
        signalled = {origin(barrier_operand(each)) for each in own if each.name == COPY}
        if any(origin(each.operands[0]) in signalled for each in own if each.name == WAIT):
            found.append(f"{copying} waits for its own copies")
    return found


def _functions(module: Block) -> list[Block]:
    return [block for each in module.walk() if each.name == "tt.func" for block in each.blocks]


def _rings(module: Block, part: Block) -> dict[Value, Value]:
    """Memory that other partitions' copies fill slot by slot, with the barriers of the same numbers."""
    own = set(part.walk())
    rings = {}
    for copy in module.walk():
        if copy.name == COPY and copy not in own:
            (memory, part_of_it), (barriers, number) = slot_of(copied_to(copy)), slot_of(barrier_operand(copy))
            if part_of_it is number and number is not None:
                rings[memory] = barriers
    return rings


def _issues(loop: Operation) -> int:
    """Groups of copies, or barriers told of bytes, in a round."""
    return sum(each.name in (COMMIT, EXPECT) for each in inside(loop))


def _name(loop: Operation) -> str:
    return f"{loop.partition or 'kernel'} {loop.results[0].name if loop.results else loop.text.split(' ')[0]}"
