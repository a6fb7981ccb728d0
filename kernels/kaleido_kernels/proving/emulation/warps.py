"""Threads that run together: registers, and the flow of control from one instruction to the next.

A group of whole warps runs one instruction at a time for all its threads. Where threads part, those at the first
instruction go first and the others wait until they meet again. A group runs on until it waits for others or reaches a
point at which others could run; then the block decides who is next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from kaleido_kernels.proving.emulation.errors import DeadlockError, EmulatorError, RaceError, UnknownInstructionError
from kaleido_kernels.proving.emulation.flow import Wait, Waiting, place_of
from kaleido_kernels.proving.emulation.kinds import HELD, KINDS, POISON, Array, Kind, seen
from kaleido_kernels.proving.emulation.memory import PARAMETER_SPACING, PARAMETERS
from kaleido_kernels.proving.emulation.ptx import (
    SHARED,
    Address,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Register,
    Special,
    Symbol,
    Vector,
)
from kaleido_kernels.proving.emulation.surroundings import Surroundings
from kaleido_kernels.proving.emulation.threads import Mask, Threads, chosen

Handler = Callable[[Mask], None]
Source = Callable[[], Array]
Target = Callable[[Array, Mask], None]
Build = Callable[["Warps", Instruction], Handler]


@dataclass(frozen=True)
class Rule:
    """How an instruction is run.

    Args:
        section: of the PTX manual, which says what it does.
        forms: what the whole opcode must match: a modifier that has no rule must not be passed over.
        build: makes its handler.
    """

    section: str
    forms: str
    build: Build


class Warps:
    """A group of whole warps of a block.

    Args:
        block: what it shares with the others.
        number: of the group.
        first: number of its first thread.
        n_threads: its threads.
        rules: what each instruction does.

    Attributes:
        stream: by which `block.Conditions.order` knows the group: its number; where warps are specialised, that of the
            partition to which an indexed branch sends it first, 0 until then.
    """

    def __init__(self, block: Surroundings, number: int, first: int, n_threads: int, rules: Mapping[str, Rule]) -> None:
        self.block, self.number, self.n_threads, self.rules = block, number, n_threads, rules
        self.kernel, self.outline = block.kernel, block.outline
        self.stream = 0 if block.kernel.is_specialised else number
        last = (first + n_threads) // 32 - 1
        self.name = f"warps {first // 32} to {last}" if last > first // 32 else f"warp {last}"
        self.thread = np.arange(first, first + n_threads, dtype=np.uint32)
        self.lane, self.warp = self.thread % 32, (self.thread - first) // 32
        self.poison = {width: np.full(n_threads, POISON[width], HELD[width]) for width in HELD}
        self.values: list[Array] = []
        self.constants: dict[tuple[int, str], Array] = {}
        self.here = 0
        self.unsynced = ""  # what the group did that it may announce to others only after a barrier
        self.handlers: list[Handler | None] = [None] * len(self.kernel.instructions)
        self.guards = [None if item.guard is None else self.predicate(item.guard) for item in self.kernel.instructions]

    def build_handlers(self) -> None:
        """Make all handlers now, not each when it is first needed.

        Raises:
            UnknownInstructionError: operands that a rule does not cover.
        """
        for place, flow in enumerate(self.outline.flow):
            if flow is None:
                self._build(place)

    def _build(self, place: int) -> Handler:
        instruction, name = self.kernel.instructions[place], self.outline.rules[place]
        try:
            handler = self.handlers[place] = self.rules[name].build(self, instruction)
        except (KeyError, ValueError, AssertionError, AttributeError, IndexError) as problem:
            raise UnknownInstructionError(
                f"{instruction.text!r} ({instruction.source}): this form of {name} has no rule ({problem!r})"
            ) from problem
        return handler

    # ---- operands

    def source(self, operand: Operand, width: str, *, wider: bool = False) -> Source:
        """A function that gives an operand's bits, one a thread; ``wider`` takes a register of more bits as it is."""
        if isinstance(operand, Register):
            if operand.width != width and not wider:
                raise ValueError(f"{operand.name} holds {operand.width}, not {width}")
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

    def target(self, operand: Operand, width: str) -> Target:
        """A function that puts bits into a register of this width, for some threads."""
        if operand == Symbol("_"):
            return lambda bits, mask: None
        assert isinstance(operand, Register), operand
        if operand.width != width:
            raise ValueError(f"{operand.name} holds {operand.width}, not {width}")
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
        bits = self.source(base, "b64", wider=True)  # shared memory has 32-bit addresses
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

    def run(self, place: int = 0, values: list[Array] | None = None) -> Iterator[Waiting]:
        """Run to the end; yields what the group waits for, or None where others may run first.

        Args:
            place: the instruction to begin with.
            values: of all registers; without it nothing was written yet.
        """
        self.values = values or [self.poison[register.width] for register in self.kernel.registers]
        self.unsynced = ""
        self.sums_in_flight, self.operands_in_flight = frozenset[int](), frozenset[int]()
        threads = Threads(self.n_threads)
        threads.go_to(place)
        guards, block = self.guards, self.block
        flow, yields = self.outline.flow, self.outline.yields
        while self._step(threads):
            here = self.here = threads.here
            block.n_instructions += 1
            mask, guard = threads.active, guards[here]
            if guard is not None:
                mask = guard() if mask is None else guard() & mask
                mask = None if mask.all() else mask
            kind = flow[here]
            if self.sums_in_flight:
                self._refuse_early_use()
            if kind is None:
                if guard is None or mask is None or mask.any():
                    self._do(here, mask)
                    if yields[here]:
                        yield None
                threads.go_on()
            elif kind == "bra":
                self._branch(threads, mask)
            elif kind in ("ret", "exit"):
                threads.end(mask)
            elif mask is not None and not mask.any():
                threads.go_on()
            elif kind == "brx.idx":
                which, places = self._indexed_branch(mask)
                if len(set(which)) > 1:
                    block.divide(self, which, places)
                    return
                self.stream = self.stream or 1 + which[0]
                threads.go_to(places[0])
            elif kind == "trap":
                raise EmulatorError(f"trap: {self.where()}")
            elif kind == "setmaxnreg":
                yield from block.change_registers(self, self.kernel.instructions[here])
                threads.go_on()
            elif kind == "mbarrier.try_wait":
                yield from self._wait_at_mbarrier(mask)
                threads.go_on()
            else:
                if guard is not None and mask is not None:
                    raise EmulatorError(f"a barrier with a guard that holds for some threads: {self.where()}")
                if not threads.all_here():
                    threads.wait_for_the_others()
                    continue
                yield from block.meet(self, self.kernel.instructions[here])
                threads.go_on()

    def _refuse_early_use(self) -> None:
        """Registers of products that were not waited for may not be used, nor operands in them overwritten."""
        here = self.here
        if self.kernel.instructions[here].name == "wgmma":
            return
        outline = self.outline
        early = self.sums_in_flight & outline.touched[here] | self.operands_in_flight & outline.written[here]
        if early:
            names = ", ".join(self.kernel.registers[number].name for number in sorted(early)[:3])
            raise RaceError(f"{names} of a product that is at work is used before a wait: {self.where()}")

    def _step(self, threads: Threads) -> bool:
        try:
            return threads.step()
        except DeadlockError as problem:
            raise DeadlockError(f"{problem}: {self.where()}") from problem

    def _branch(self, threads: Threads, taken: Mask) -> None:
        to = self.outline.targets[self.here]
        if to <= self.here and self.block.n_instructions > self.block.last_instruction:
            raise DeadlockError(f"no end after {self.block.n_instructions:,} instructions: {self.where()}")
        if taken is None or taken is threads.active:
            threads.go_to(to)
        elif not taken.any():
            threads.go_on()
        else:
            threads.part(taken, to)

    def _do(self, place: int, mask: Mask) -> None:
        handler = self.handlers[place] or self._build(place)
        try:
            handler(mask)
        except EmulatorError as problem:
            raise type(problem)(f"{problem}: {self.where()}") from problem
        except (ValueError, TypeError, AssertionError, KeyError, IndexError) as problem:
            raise EmulatorError(f"the emulator's rule failed ({problem!r}): {self.where()}") from problem

    def where(self) -> str:
        """The instruction that the group is at, for messages."""
        item = self.kernel.instructions[self.here]
        text = item.text if len(item.text) < 120 else item.text[:117] + "..."
        return f"{self.kernel.name}, block {self.block.index}, {self.name}, {item.source}: {text}"

    def _indexed_branch(self, mask: Mask) -> tuple[list[int], list[int]]:
        """Number in the branch's table, and the instruction there, for each warp of the group."""
        item = self.kernel.instructions[self.here]
        which = self.source(item.operands[0], "b32")().reshape(-1, 32)
        if (which != which[:, :1]).any() or mask is not None:
            raise EmulatorError(f"an indexed branch that threads of a warp take apart: {self.where()}")
        table = item.operands[1]
        labels = self.kernel.branch_tables.get(table.name, ()) if isinstance(table, Symbol) else ()
        if int(which.max()) >= len(labels):
            raise EmulatorError(f"an indexed branch to number {int(which.max())} of {len(labels)}: {self.where()}")
        numbers: list[int] = which[:, 0].tolist()
        return numbers, [place_of(self.kernel, Symbol(labels[number])) for number in numbers]

    def _wait_at_mbarrier(self, mask: Mask) -> Iterator[Waiting]:
        item = self.kernel.instructions[self.here]
        addresses = np.unique(chosen(self.addresses(item.operands[1])(), mask))
        parities = np.unique(chosen(self.source(item.operands[2], "b32")(), mask)) & 1
        if len(addresses) != 1 or len(parities) != 1:
            raise EmulatorError(f"threads of one group wait at different mbarriers: {self.where()}")
        barrier, parity = self.block.barrier_at(int(addresses[0]), self.where()), int(parities[0])
        if barrier.phase & 1 == parity:
            self.block.waits_for[self.number] = barrier
            yield Wait(lambda: barrier.phase & 1 != parity, lambda: f"at byte {addresses[0]}: {barrier}")
            self.block.waits_for.pop(self.number)
        self.target(item.operands[0], "pred")(np.ones(self.n_threads, bool), mask)
        yield None


def vector(operand: Operand) -> tuple[Operand, ...]:
    """The items of a vector operand; one for a scalar."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def immediate(operand: Operand) -> int:
    """The value of an operand that must be a constant."""
    if not isinstance(operand, Immediate):
        raise ValueError(f"{operand} is no constant")
    return operand.bits


def kind_of(instruction: Instruction) -> Kind:
    """The type that an instruction's last modifier names."""
    return KINDS[instruction.kind]
