"""One block of threads: what its groups of warps share, and in which order they run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from kaleido_kernels.proving.emulation import arithmetic, copies, movement, products
from kaleido_kernels.proving.emulation.copies import Copy, CopyDescriptor, MBarrier
from kaleido_kernels.proving.emulation.errors import DeadlockError, EmulatorError, RaceError
from kaleido_kernels.proving.emulation.memory import GlobalMemory, SharedMemory
from kaleido_kernels.proving.emulation.products import ProductGroup
from kaleido_kernels.proving.emulation.ptx import Immediate, Instruction, Kernel
from kaleido_kernels.proving.emulation.warps import Rule, Waiting, Warps, immediate

RULES: dict[str, Rule] = {**arithmetic.RULES, **movement.RULES, **copies.RULES, **products.RULES}
"""Every instruction that the emulator knows, besides those of `warps.FLOW`."""


@dataclass(frozen=True)
class Conditions:
    """What the machine may choose, as it is chosen for a run.

    Args:
        early_copies: copies take effect when they are issued, not as late as allowed.
        groups: threads of the groups that run apart, in order; empty for all together. Groups of less than 128 threads
            cannot take part in products of warp groups.
        apart: instead of that, the smallest groups that can run apart.
        order: numbers of groups, the most urgent first; empty for ``seed``.
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
        if self.groups or not self.apart:
            return self.groups or (n_threads,)
        size = 128 if any(item.name == "wgmma" for item in kernel.instructions) else 32
        return (size,) * (n_threads // size)


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
        sizes = conditions.sizes(kernel)
        self.n_groups = len(sizes)
        self._begin()
        firsts = np.cumsum((0, *sizes[:-1]))
        self.groups = [
            Warps(self, number, int(first), size, RULES)
            for number, (first, size) in enumerate(zip(firsts, sizes, strict=True))
        ]

    def _begin(self) -> None:
        n_groups = self.n_groups
        self.shared = SharedMemory(self.shared_bytes, self.kernel.uses_async_proxy)
        self.barriers: dict[int, MBarrier] = {}
        self.named: dict[int, tuple[int, int]] = {}  # number of a barrier -> how often it opened, threads that came
        self.open_copies: list[list[Copy]] = [[] for _ in range(n_groups)]
        self.copy_groups: list[list[list[Copy]]] = [[] for _ in range(n_groups)]
        self.open_products = [ProductGroup() for _ in range(n_groups)]
        self.product_groups: list[list[ProductGroup]] = [[] for _ in range(n_groups)]
        self.waits_for: dict[int, MBarrier] = {}
        self.registers = [self.kernel.max_registers] * n_groups
        self.free_registers = 0
        self.register_log: list[list[int]] = [[] for _ in range(n_groups)]

    def run(self, index: int, n_blocks: int) -> None:
        """Run block ``index`` of ``n_blocks`` to its end."""
        self.index, self.n_blocks = index, n_blocks
        self.memory.begin_block()
        self._begin()
        self.last_instruction = self.n_instructions + self.conditions.most_instructions
        dice, order = random.Random(self.conditions.seed), self.conditions.order
        rank = {number: place for place, number in enumerate(order)}
        running: dict[int, tuple[Iterator[Waiting], Waiting]] = {
            group.number: (group.run(), None) for group in self.groups
        }
        while running:
            ready = [number for number, (_, condition) in running.items() if condition is None or condition()]
            if not ready:
                self._bring_a_copy(running, dice)
                continue
            number = min(ready, key=lambda n: rank.get(n, len(rank))) if order else dice.choice(ready)
            try:
                running[number] = (running[number][0], next(running[number][0]))
            except StopIteration:
                self._end(number)
                del running[number]
        self._end_block()

    def _bring_a_copy(self, running: Mapping[int, object], dice: random.Random) -> None:
        """No warps can go on: one of the copies that some of them wait for takes effect."""
        late = [barrier for number, barrier in self.waits_for.items() if number in running and barrier.copies]
        if not late:
            places = "; ".join(self.groups[number].where() for number in running)
            raise DeadlockError(f"no warps can go on: {places}")
        waiting = late[0].copies if self.conditions.order else dice.choice(late).copies
        waiting.pop(-1 if self.conditions.order else dice.randrange(len(waiting)))()

    def _end(self, number: int) -> None:
        if any(group.sums for group in (*self.product_groups[number], self.open_products[number])):
            raise RaceError(f"{self.kernel.name}: warps {number} end with products at work that they never waited for")

    def _end_block(self) -> None:
        if any(barrier.copies for barrier in self.barriers.values()):
            raise RaceError(f"{self.kernel.name}: the block ends with copies on their way")
        for a in self.groups:
            for b in self.groups:
                same_four = a.thread[0] // 128 == b.thread[0] // 128
                if same_four and self.register_log[a.number] != self.register_log[b.number]:
                    raise RaceError(f"{self.kernel.name}: warps of one warp group ask for different registers")

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
        if threads != group.n_threads:
            opened, came = self.named.get(number, (0, 0))
            came += group.n_threads
            if came > threads:
                raise RaceError(f"more than {threads} threads at barrier {number}: {group.where()}")
            self.named[number] = (opened + 1, 0) if came == threads else (opened, came)
            if came != threads:
                yield self._opening(number, opened)
        yield None

    def _opening(self, number: int, opened: int) -> Callable[[], bool]:
        return lambda: self.named[number][0] > opened

    def change_registers(self, group: Warps, instruction: Instruction) -> Iterator[Waiting]:
        """setmaxnreg: registers given back, or waited for until others have given back enough."""
        held, wanted = self.registers[group.number], immediate(instruction.operands[0])
        if (wanted > held) != ("inc" in instruction.parts) and wanted != held:
            raise RaceError(f"{instruction.text} with {held} registers: {group.where()}")
        need = (wanted - held) * group.n_threads
        if need > self.free_registers:
            yield lambda: need <= self.free_registers
        self.free_registers -= need
        self.registers[group.number] = wanted
        self.register_log[group.number].append(wanted)
        yield None
