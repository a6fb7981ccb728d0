"""One block of threads: what its groups of warps share, and in which order they run."""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from kaleido_kernels.proving.emulation import arithmetic, copies, movement, products
from kaleido_kernels.proving.emulation.copies import Copy, CopyDescriptor, MBarrier
from kaleido_kernels.proving.emulation.errors import DeadlockError, EmulatorError, RaceError
from kaleido_kernels.proving.emulation.flow import Outline, Wait, Waiting
from kaleido_kernels.proving.emulation.memory import GlobalMemory, SharedMemory
from kaleido_kernels.proving.emulation.products import ProductGroup
from kaleido_kernels.proving.emulation.ptx import Immediate, Instruction, Kernel
from kaleido_kernels.proving.emulation.warps import Rule, Warps, immediate

RULES: dict[str, Rule] = {**arithmetic.RULES, **movement.RULES, **copies.RULES, **products.RULES}
"""Every instruction that the emulator knows, besides those of `flow.FLOW`."""
_FORMS = {name: rule.forms for name, rule in RULES.items()}


@functools.lru_cache(maxsize=16)
def _outline(kernel: Kernel) -> Outline:
    return Outline(kernel, _FORMS)


@dataclass(frozen=True)
class Conditions:
    """What the machine may choose, as it is chosen for a run.

    Args:
        early_copies: copies take effect when they are issued, not as late as allowed.
        groups: threads of the groups that run apart, in order; empty for all together. Groups of less than 128 threads
            cannot take part in products of warp groups.
        apart: instead of that, the smallest groups that can run apart.
        order: numbers of groups, the most urgent first; empty for ``seed``. Of a kernel whose warps are specialised, of
            partitions: 0 the default one, then the others as they were listed; its idle warps come last.
        seed: of the choice among the groups that could go on.
        most_instructions: of one block; more are taken for a loop without end.
    """

    early_copies: bool = False
    groups: tuple[int, ...] = ()
    apart: bool = False
    order: tuple[int, ...] = ()
    seed: int = 0
    most_instructions: int = 50_000_000

    def sizes(self, kernel: Kernel) -> tuple[int, ...]:
        """Threads of each group of a kernel's block.

        Raises:
            ValueError: groups that do not add up to the block's threads.
        """
        n_threads = kernel.n_threads
        if self.groups and sum(self.groups) != n_threads:
            raise ValueError(f"groups of {self.groups} threads: {kernel.name} has {n_threads}")
        specialised = kernel.is_specialised
        if self.groups or not (self.apart or specialised):
            return self.groups or (n_threads,)
        size = 128 if specialised or any(item.name == "wgmma" for item in kernel.instructions) else 32
        return (size,) * (n_threads // size)


ORDERS: dict[str, Conditions] = {
    f"{name}, copies {'at once' if early else 'late'}": Conditions(early_copies=early, order=order)
    for name, order in {
        "producer last": (0, 1, 2),
        "producer last, second group first": (1, 0, 2),
        "producer first": (2, 0, 1),
        "producer first, second group before": (2, 1, 0),
        "producer between": (0, 2, 1),
        "producer between, second group first": (1, 2, 0),
    }.items()
    for early in (False, True)
} | {f"by chance {seed}": Conditions(seed=seed) for seed in range(2)}
"""Every order in which two groups of consumers and a producer, partitions 0, 1 and 2, can be urgent, with copies late
and at once; and two by chance. A fault may show in one of them only.

Of one group of consumers and a producer, partitions 0 and 1, both orders are among them.
"""


@dataclass
class NamedBarrier:
    """A barrier of some threads of the block: how often it opened, how many came since, how many it waits for."""

    opened: int = 0
    came: int = 0
    threads: int = 0


@dataclass
class _Running:
    """A group of warps, the steps that it still has to take, and what it waits for."""

    group: Warps
    steps: Iterator[Waiting]
    waits: Waiting = None


class Block:
    """Runs one block of threads after the other.

    Args:
        kernel: what they run.
        memory: the tensors.
        parameters: values of the kernel's parameters by name; None for those of which only the address counts.
        descriptors: copy descriptors by the address of their parameter.
        shared_bytes: shared memory of a block.
        conditions: see `Conditions`.

    Raises:
        UnknownInstructionError: an instruction that has no rule.
        ValueError: groups that do not add up to the block's threads.
    """

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        parameters: Mapping[str, int | float | None],
        descriptors: Mapping[int, CopyDescriptor],
        shared_bytes: int,
        conditions: Conditions,
    ) -> None:
        self.kernel, self.memory, self.parameters, self.descriptors = kernel, memory, parameters, descriptors
        self.shared_bytes, self.conditions = shared_bytes, conditions
        self.n_instructions, self.last_instruction = 0, 0
        self.index, self.n_blocks = 0, 1
        self.outline = _outline(kernel)
        sizes = conditions.sizes(kernel)
        self._begin()
        firsts = np.cumsum((0, *sizes[:-1]))
        self.groups = [
            Warps(self, number, int(first), size, RULES)
            for number, (first, size) in enumerate(zip(firsts, sizes, strict=True))
        ]
        if not self.outline.is_known:  # what has no rule is told before anything runs
            self.groups[0].build_handlers()
            self.outline.is_known = True
        self._parts: dict[tuple[int, int], Warps] = {}

    def _begin(self) -> None:
        self.shared = SharedMemory(self.shared_bytes, self.kernel.uses_async_proxy)
        self.barriers: dict[int, MBarrier] = {}
        self.named: dict[int, NamedBarrier] = defaultdict(NamedBarrier)
        self.open_copies: dict[int, list[Copy]] = defaultdict(list)
        self.copy_groups: dict[int, list[list[Copy]]] = defaultdict(list)
        self.open_products: dict[int, ProductGroup] = defaultdict(ProductGroup)
        self.product_groups: dict[int, list[ProductGroup]] = defaultdict(list)
        self.waits_for: dict[int, MBarrier] = {}
        self.registers: dict[int, int] = defaultdict(lambda: self.kernel.max_registers)
        self.free_registers = 0
        self.register_log: dict[int, list[int]] = defaultdict(list)
        self._running: dict[int, _Running] = {}
        self._divided: set[int] = set()
        self._ended: list[Warps] = []

    def run(self, index: int, n_blocks: int) -> None:
        """Run block ``index`` of ``n_blocks`` to its end."""
        self.index, self.n_blocks = index, n_blocks
        self.memory.begin_block()
        self._begin()
        self.last_instruction = self.n_instructions + self.conditions.most_instructions
        dice, order = random.Random(self.conditions.seed), self.conditions.order
        rank = {stream: place for place, stream in enumerate(order)}
        running = self._running
        for group in self.groups:
            group.stream = 0 if self.kernel.is_specialised else group.number
            running[group.number] = _Running(group, group.run())
        while running:
            ready = [each for each in running.values() if each.waits is None or each.waits.over()]
            if not ready:
                self._bring_a_copy(dice)
                continue
            chosen = (
                min(ready, key=lambda each: rank.get(each.group.stream, len(rank))) if order else dice.choice(ready)
            )
            try:
                chosen.waits = next(chosen.steps)
            except StopIteration:
                self._end(chosen.group.number)
        self._end_block()

    def _bring_a_copy(self, dice: random.Random) -> None:
        """No warps can go on: one of the copies that some of them wait for takes effect."""
        late = [barrier for number, barrier in self.waits_for.items() if barrier.copies]
        if not late:
            waiting = (f"{each.group.where()} {each.waits.what()}" for each in self._running.values() if each.waits)
            raise DeadlockError(f"no warps can go on: {'; '.join(waiting)}")
        barrier = late[0] if self.conditions.order else dice.choice(late)
        take = barrier.copies.pop(-1 if self.conditions.order else dice.randrange(len(barrier.copies)))
        try:
            take()
        except EmulatorError as problem:
            number = next(number for number, found in self.waits_for.items() if found is barrier)
            raise type(problem)(f"{problem}, by a copy for {self._running[number].group.where()}") from problem

    def _end(self, number: int) -> None:
        group = self._running.pop(number).group
        if any(products.sums for products in (*self.product_groups[number], self.open_products[number])):
            raise RaceError(f"{group.name} end with products at work that they never waited for: {group.where()}")
        if number not in self._divided:
            self._ended.append(group)

    def _end_block(self) -> None:
        if any(barrier.copies for barrier in self.barriers.values()):
            raise RaceError(f"{self.kernel.name}: the block ends with copies on their way")
        for a in self._ended:
            for b in self._ended:
                same_four = a.thread[0] // 128 == b.thread[0] // 128
                if same_four and self.register_log[a.number] != self.register_log[b.number]:
                    raise RaceError(f"{self.kernel.name}: warps of one warp group ask for different registers")

    # ---- partitions

    def divide(self, group: Warps, which: list[int], places: list[int]) -> None:
        """Warps of ``group`` go on apart, neighbours of one partition together.

        Args:
            group: whose own steps end here.
            which: number of each warp's partition, without the default one.
            places: the instruction that each warp goes on with.
        """
        if self.product_groups[group.number] or self.open_copies[group.number] or self.copy_groups[group.number]:
            raise EmulatorError(f"warps part with products or copies at work: no rule for it: {group.where()}")
        self._divided.add(group.number)
        edges = [i for i in range(1, len(which)) if which[i] != which[i - 1]]
        for start, end in zip([0, *edges], [*edges, len(which)], strict=True):
            first, size = int(group.thread[0]) + 32 * start, 32 * (end - start)
            if (first, size) not in self._parts:
                self._parts[first, size] = Warps(self, len(self.groups) + first // 32, first, size, RULES)
            part = self._parts[first, size]
            part.stream = 1 + which[start]
            self.registers[part.number] = self.registers[group.number]
            self.register_log[part.number] = list(self.register_log[group.number])
            values = [value[32 * start : 32 * end] for value in group.values]
            self._running[part.number] = _Running(part, part.run(places[start], values))

    # ---- what groups do together

    def barrier_at(self, address: int, where: str) -> MBarrier:
        """The mbarrier at an address of shared memory."""
        if address not in self.barriers:
            raise EmulatorError(f"no mbarrier at byte {address} of shared memory: {where}")
        return self.barriers[address]

    def publish(self, number: int) -> None:
        """A group has reached a barrier or announced its work."""
        self.shared.states.barrier(number)
        for states in self.memory.watched():
            states.barrier(number)

    def meet(self, group: Warps, instruction: Instruction) -> Iterator[Waiting]:
        """A barrier of the block or of a number of threads."""
        if not all(isinstance(item, Immediate) for item in instruction.operands):
            raise EmulatorError(f"a barrier whose number is in a register: {group.where()}")
        counts = [immediate(item) for item in instruction.operands]
        number, threads = counts[0], counts[1] if len(counts) > 1 else self.kernel.n_threads
        self.publish(group.number)
        group.unsynced = ""
        barrier = self.named[number]
        if barrier.came and barrier.threads != threads:
            raise RaceError(f"{threads} threads meet at barrier {number}, where {barrier.threads} do: {group.where()}")
        barrier.came, barrier.threads = barrier.came + group.n_threads, threads
        if barrier.came > threads:
            raise RaceError(f"more than {threads} threads at barrier {number}: {group.where()}")
        if barrier.came == threads:
            barrier.opened, barrier.came = barrier.opened + 1, 0
            yield None
        else:
            opened = barrier.opened
            yield Wait(lambda: barrier.opened > opened, lambda: f"with {barrier.came} of {threads} threads")

    def change_registers(self, group: Warps, instruction: Instruction) -> Iterator[Waiting]:
        """setmaxnreg: registers given back, or waited for until others have given back enough."""
        held, wanted = self.registers[group.number], immediate(instruction.operands[0])
        if (wanted > held) != ("inc" in instruction.parts) and wanted != held:
            raise RaceError(f"{instruction.text} with {held} registers: {group.where()}")
        need = (wanted - held) * group.n_threads
        if need > self.free_registers:
            yield Wait(
                lambda: need <= self.free_registers, lambda: f"for {need:,} registers, {self.free_registers:,} are free"
            )
        self.free_registers -= need
        self.registers[group.number] = wanted
        self.register_log[group.number].append(wanted)
        yield None
