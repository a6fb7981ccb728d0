"""Threads that run together: registers, and the flow of control from one instruction to the next.

A group of whole warps runs one instruction at a time for all its threads. Where threads part, those at the first
instruction go first and the others wait until they meet again. A group runs on until it waits for others or reaches a
point at which others could run; then the block decides who is next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kaleido_kernels.emulation.errors import DeadlockError, EmulatorError, RaceError, UnknownInstructionError
from kaleido_kernels.emulation.kinds import HELD, KINDS, POISON, Array, Kind, seen
from kaleido_kernels.emulation.memory import PARAMETER_SPACING, PARAMETERS
from kaleido_kernels.emulation.ptx import (
    SHARED,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Negated,
    Operand,
    Register,
    Special,
    Symbol,
    Vector,
)

if TYPE_CHECKING:
    from kaleido_kernels.emulation.block import Block

Mask = Array | None
"""(threads,) bool: who takes part; None for all."""
Handler = Callable[[Mask], None]
Source = Callable[[], Array]
Target = Callable[[Array, Mask], None]
Build = Callable[["Warps", Instruction], Handler]
Waiting = Callable[[], bool] | None
"""What a group waits for; None if it merely lets others go first."""


@dataclass(frozen=True)
class Rule:
    """How an instruction is run: ``section`` of the PTX manual that says what it does, and who makes its handler."""

    section: str
    build: Build


FLOW = {
    "bra": "Control Flow Instructions: bra",
    "brx.idx": "Control Flow Instructions: brx.idx",
    "ret": "Control Flow Instructions: ret",
    "exit": "Control Flow Instructions: exit",
    "trap": "Miscellaneous Instructions: trap",
    "setmaxnreg": "Miscellaneous Instructions: setmaxnreg",
    "bar.sync": "Parallel Synchronization and Communication Instructions: bar{.cta}, barrier{.cta}",
    "barrier.sync": "Parallel Synchronization and Communication Instructions: bar{.cta}, barrier{.cta}",
    "barrier.cta.sync": "Parallel Synchronization and Communication Instructions: bar{.cta}, barrier{.cta}",
    "mbarrier.try_wait": "Parallel Synchronization and Communication Instructions: mbarrier.try_wait",
}
"""Instructions that `Warps.run` itself knows, with their sections."""
LETS_OTHERS_RUN = ("mbarrier.arrive", "cp.async.bulk", "wgmma.commit_group", "wgmma.wait_group", "fence")


def longest_match(instruction: Instruction, table: Mapping[str, object]) -> str | None:
    """The longest run of an opcode's parts that is a key of ``table``."""
    for n in range(len(instruction.parts), 0, -1):
        if ".".join(instruction.parts[:n]) in table:
            return ".".join(instruction.parts[:n])
    return None


class Warps:
    """A group of whole warps of a block.

    Args:
        block: what it shares with the others.
        number: of the group.
        first: number of its first thread.
        n_threads: its threads.
        rules: what each instruction does.
    """

    def __init__(self, block: Block, number: int, first: int, n_threads: int, rules: Mapping[str, Rule]) -> None:
        self.block, self.number, self.n_threads = block, number, n_threads
        self.kernel: Kernel = block.kernel
        self.thread = np.arange(first, first + n_threads, dtype=np.uint32)
        self.lane, self.warp = self.thread % 32, (self.thread - first) // 32
        self.poison = {width: np.full(n_threads, POISON[width], HELD[width]) for width in HELD}
        self.values: list[Array] = []
        self.constants: dict[tuple[int, str], Array] = {}
        self.here = 0
        self.unsynced = ""  # what the group did that others may only be told of after a barrier
        self.flow = [longest_match(item, FLOW) for item in self.kernel.instructions]
        self.handlers = [
            self._handler(item, rules) if flow is None else None
            for item, flow in zip(self.kernel.instructions, self.flow, strict=True)
        ]
        self.yields = [item.opcode.startswith(LETS_OTHERS_RUN) for item in self.kernel.instructions]
        self.guards = [None if item.guard is None else self.predicate(item.guard) for item in self.kernel.instructions]
        self.targets = [
            self._place(item.operands[0]) if flow == "bra" else -1
            for item, flow in zip(self.kernel.instructions, self.flow, strict=True)
        ]

    def _handler(self, instruction: Instruction, rules: Mapping[str, Rule]) -> Handler:
        name = longest_match(instruction, rules)
        if name is None:
            raise UnknownInstructionError(
                f"{instruction.text!r} ({instruction.source}): the emulator has no rule for {instruction.opcode}"
            )
        try:
            return rules[name].build(self, instruction)
        except (KeyError, ValueError, AssertionError, AttributeError, IndexError) as problem:
            raise UnknownInstructionError(
                f"{instruction.text!r} ({instruction.source}): this form of {name} has no rule ({problem!r})"
            ) from problem

    def _place(self, label: Operand) -> int:
        assert isinstance(label, Symbol)
        if label.name not in self.kernel.labels:
            raise UnknownInstructionError(f"a branch to {label.name}, which is nowhere")
        return self.kernel.labels[label.name]

    # ---- operands

    def source(self, operand: Operand, width: str) -> Source:
        """A function that gives an operand's bits, one a thread."""
        if isinstance(operand, Register):
            number = operand.number
            return lambda: self.values[number]
        if isinstance(operand, Immediate):
            if width == "pred":
                chosen = np.full(self.n_threads, bool(operand.bits))
                return lambda: chosen
            constant = self.constant(operand.bits, width)
            return lambda: constant
        if isinstance(operand, Negated):
            inner = self.source(operand.operand, "pred")
            return lambda: ~inner()
        if isinstance(operand, Symbol):
            constant = self.constant(self.symbol_address(operand), width)
            return lambda: constant
        if isinstance(operand, Special):
            return self._special(operand.name)
        raise ValueError(f"operand {operand}")

    def typed(self, operand: Operand, kind: Kind) -> Source:
        """A function that gives an operand's values."""
        bits = self.source(operand, kind.width)
        if kind.seen is HELD[kind.width]:
            return bits
        return lambda: seen(bits(), kind)

    def predicate(self, operand: Operand) -> Source:
        """A function that gives a predicate."""
        return self.source(operand, "pred")

    def target(self, operand: Operand) -> Target:
        """A function that puts bits into a register, for some threads."""
        if operand == Symbol("_"):
            return lambda bits, mask: None
        assert isinstance(operand, Register), operand
        number = operand.number

        def put(bits: Array, mask: Mask) -> None:
            self.values[number] = bits if mask is None else np.where(mask, bits, self.values[number])

        return put

    def constant(self, bits: int, width: str) -> Array:
        """The same bits for every thread."""
        if (bits, width) not in self.constants:
            cut = bits & ((1 << int(width[1:])) - 1)
            self.constants[bits, width] = np.full(self.n_threads, cut, HELD[width])
        return self.constants[bits, width]

    def symbol_address(self, symbol: Symbol) -> int:
        """Address of shared memory or of a parameter."""
        if symbol.name == SHARED:
            return 0
        if symbol.name not in self.kernel.parameters:
            raise ValueError(f"unknown name {symbol.name}")
        return PARAMETERS + PARAMETER_SPACING * self.kernel.parameters.index(symbol.name)

    def addresses(self, operand: Operand) -> Callable[[], Array]:
        """A function that gives the addresses of a memory operand as int64."""
        assert isinstance(operand, Address)
        base, offset = operand.base, operand.offset
        if isinstance(base, Symbol):
            fixed = np.full(self.n_threads, self.symbol_address(base) + offset, np.int64)
            return lambda: fixed
        bits = self.source(base, "b64")
        return lambda: bits().astype(np.int64) + offset

    def _special(self, name: str) -> Source:
        """Chapter "Special Registers"."""
        if name == "%tid.x":
            return lambda: self.thread
        if name == "%laneid":
            return lambda: self.lane
        if name == "%ctaid.x":
            return lambda: self.constant(self.block.index, "b32")
        if name == "%nctaid.x":
            return lambda: self.constant(self.block.n_blocks, "b32")
        if name == "%ntid.x":
            return lambda: self.constant(self.kernel.n_threads, "b32")
        if name in ("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z", "%cluster_ctarank", "%cluster_ctaid.x"):
            return lambda: self.constant(0, "b32")
        raise ValueError(f"unknown special register {name}")

    # ---- flow of control

    def run(self) -> Iterator[Waiting]:
        """Run to the end; yields what the group waits for, or None where others may run first."""
        self.values = [self.poison[register.width] for register in self.kernel.registers]
        self.unsynced = ""
        pc = np.zeros(self.n_threads, np.int64)
        alive, at_barrier = np.ones(self.n_threads, bool), np.zeros(self.n_threads, bool)
        together, here = True, 0
        flow, handlers, guards, block = self.flow, self.handlers, self.guards, self.block
        while True:
            active: Mask = None
            released = False
            if not together:
                if not alive.any():
                    return
                free = alive & ~at_barrier
                if not free.any():
                    self._meet(pc[alive])
                    at_barrier[:] = False
                    free, released = alive.copy(), True
                here = int(pc[free].min())
                active = free & (pc == here)
                if active.all():
                    together, active = True, None
            self.here = here
            block.n_instructions += 1
            mask = active
            guard = guards[here]
            if guard is not None:
                mask = guard() if active is None else guard() & active
                if mask.all():
                    mask = None
            kind = flow[here]
            if kind is None:
                if mask is None or guard is None or mask.any():
                    self._do(handlers[here], mask)
                    if self.yields[here]:
                        yield None
                following = here + 1
            elif kind == "bra":
                following = self.targets[here]
                if following <= here and block.n_instructions > block.last_instruction:
                    raise DeadlockError(f"no end after {block.n_instructions:,} instructions: {self.where()}")
                if mask is not None and guard is not None:  # None of those here, or some of them
                    if together and not mask.any():
                        following = here + 1
                    else:
                        together = False
                        if active is None:
                            pc[:] = here + 1
                        else:
                            pc[active] = here + 1
                        pc[mask] = following
                        continue
            elif kind == "brx.idx":
                following = self._indexed_branch(mask)
            elif kind in ("ret", "exit"):
                if mask is None:
                    return
                alive &= ~mask
                together = False
                following = here + 1
                if active is None:
                    pc[:] = following
                    continue
            elif kind == "trap":
                raise EmulatorError(f"trap: {self.where()}")
            elif kind == "setmaxnreg":
                yield from block.change_registers(self, self.kernel.instructions[here])
                following = here + 1
            elif kind == "mbarrier.try_wait":
                yield from self._wait_at_mbarrier(mask)
                following = here + 1
            else:
                if active is not None and not released and not (active == alive).all():
                    at_barrier |= active
                    continue
                yield from block.meet(self, self.kernel.instructions[here])
                following = here + 1
            if together:
                here = following
            else:
                pc[active] = following

    def _do(self, handler: Handler | None, mask: Mask) -> None:
        assert handler is not None
        try:
            handler(mask)
        except EmulatorError as problem:
            raise type(problem)(f"{problem}: {self.where()}") from problem
        except (ValueError, TypeError, AssertionError) as problem:
            raise EmulatorError(f"the emulator's rule failed ({problem!r}): {self.where()}") from problem

    def where(self) -> str:
        """The instruction that the group is at, for messages."""
        item = self.kernel.instructions[self.here]
        text = item.text if len(item.text) < 120 else item.text[:117] + "..."
        return f"{self.kernel.name}, block {self.block.index}, warps {self.number}, {item.source}: {text}"

    def _meet(self, places: Array) -> None:
        if len(set(places.tolist())) != 1:
            raise DeadlockError(f"threads of one group wait at different barriers: {self.where()}")

    def _indexed_branch(self, mask: Mask) -> int:
        item = self.kernel.instructions[self.here]
        which = np.unique(self.source(item.operands[0], "b32")())
        if len(which) != 1 or mask is not None:
            raise EmulatorError(f"an indexed branch that threads take apart: {self.where()}")
        table = item.operands[1]
        assert isinstance(table, Symbol)
        return self.kernel.labels[self.kernel.branch_tables[table.name][int(which[0])]]

    def _wait_at_mbarrier(self, mask: Mask) -> Iterator[Waiting]:
        item = self.kernel.instructions[self.here]
        addresses = np.unique(chosen(self.addresses(item.operands[1])(), mask))
        parities = np.unique(chosen(self.source(item.operands[2], "b32")(), mask)) & 1
        if len(addresses) != 1 or len(parities) != 1:
            raise EmulatorError(f"threads of one group wait at different mbarriers: {self.where()}")
        barrier, parity = self.block.barrier_at(int(addresses[0]), self.where()), int(parities[0])
        if barrier.phase & 1 == parity:
            self.block.waits_for[self.number] = barrier
            yield lambda: barrier.phase & 1 != parity
            self.block.waits_for.pop(self.number)
        self.target(item.operands[0])(np.ones(self.n_threads, bool), mask)
        yield None


def chosen(values: Array, mask: Mask) -> Array:
    """Values of the threads that take part."""
    return values if mask is None else values[mask]


def vector(operand: Operand) -> tuple[Operand, ...]:
    """The items of a vector operand; one for a scalar."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def only_together(mask: Mask, what: str) -> None:
    """Raises `RaceError` if part of a group is about to do what all its threads must do together."""
    if mask is not None:
        raise RaceError(f"{what} by part of the threads that must do it together")


def kind_of(instruction: Instruction) -> Kind:
    """The type that an instruction's last modifier names."""
    return KINDS[instruction.kind]
