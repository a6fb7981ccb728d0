"""Flow of control: the instructions that steer it, and what of a kernel's text is the same for all of its warps."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kaleido_kernels.proving.emulation.errors import UnknownInstructionError
from kaleido_kernels.proving.emulation.ptx import Instruction, Kernel, Operand, Symbol, registers_of

CONTROL = "Control Flow Instructions"
BARRIER = "Parallel Synchronization and Communication Instructions: bar{.cta}, barrier{.cta}"
FLOW = {
    "bra": (f"{CONTROL}: bra", r"bra(\.uni)?"),
    "brx.idx": (f"{CONTROL}: brx.idx", r"brx\.idx(\.uni)?"),
    "ret": (f"{CONTROL}: ret", r"ret(\.uni)?"),
    "exit": (f"{CONTROL}: exit", "exit"),
    "trap": ("Miscellaneous Instructions: trap", "trap"),
    "setmaxnreg": ("Miscellaneous Instructions: setmaxnreg", r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32"),
    "bar.sync": (BARRIER, r"bar\.sync"),
    "barrier.sync": (BARRIER, r"barrier\.sync(\.aligned)?"),
    "barrier.cta.sync": (BARRIER, r"barrier\.cta\.sync(\.aligned)?"),
    "mbarrier.try_wait": (
        "Parallel Synchronization and Communication Instructions: mbarrier.try_wait",
        r"mbarrier\.try_wait\.parity(\.acquire\.cta)?(\.shared(::cta)?)?\.b64",
    ),
}
"""Instructions that `warps.Warps.run` itself knows: their sections, and the forms that it covers."""
WRITES_NOTHING = ("st", "stmatrix", "bra", "brx", "bar", "barrier", "cp", "fence", "setmaxnreg", "ret", "exit")
"""Instructions whose first operand is not a result."""
LETS_OTHERS_RUN = ("mbarrier.arrive", "cp.async.bulk", "wgmma.commit_group", "wgmma.wait_group", "fence")


@dataclass(frozen=True)
class Wait:
    """What warps wait for.

    Args:
        over: whether they can go on.
        what: says it in a message.
    """

    over: Callable[[], bool]
    what: Callable[[], str]


Waiting = Wait | None
"""None if warps merely let others go first."""


def longest_match(instruction: Instruction, table: Mapping[str, object]) -> str | None:
    """The longest run of an opcode's parts that is a key of ``table``."""
    for n in range(len(instruction.parts), 0, -1):
        if ".".join(instruction.parts[:n]) in table:
            return ".".join(instruction.parts[:n])
    return None


def check_form(instruction: Instruction, forms: str | None) -> None:
    """Raises `UnknownInstructionError` unless the opcode has one of the forms."""
    if forms is None or not re.fullmatch(forms, instruction.opcode):
        known = "no rule" if forms is None else "no rule for this form"
        raise UnknownInstructionError(
            f"{instruction.text!r} ({instruction.source}): the emulator has {known} of {instruction.opcode}"
        )


def place_of(kernel: Kernel, label: Operand) -> int:
    """The instruction that a label names.

    Raises:
        UnknownInstructionError: it is no label of the kernel.
    """
    if not isinstance(label, Symbol) or label.name not in kernel.labels:
        raise UnknownInstructionError(f"a branch to {getattr(label, 'name', label)}, which is no label")
    return kernel.labels[label.name]


class Outline:
    """A kernel's text as every group of its warps needs it.

    Args:
        kernel: whose text it is.
        forms: instruction -> the forms that have a rule, of those that `FLOW` does not name.

    Attributes:
        flow: of each instruction, its key in `FLOW`; None for others.
        rules: of each instruction, its key in ``forms``; "" for those that `FLOW` names.
        touched, written: numbers of the registers that each instruction names, and of those that it fills.
        yields: whether others may run after it.
        targets: where a branch goes; -1 for other instructions.
        is_known: whether the operands of every instruction were found to have a rule, too.

    Raises:
        UnknownInstructionError: an instruction, or a form of one, that has no rule.
    """

    def __init__(self, kernel: Kernel, forms: Mapping[str, str]) -> None:
        self.flow: list[str | None] = []
        self.rules: list[str] = []
        self.touched: list[frozenset[int]] = []
        self.written: list[frozenset[int]] = []
        self.yields: list[bool] = []
        self.targets: list[int] = []
        self.is_known = False
        for item in kernel.instructions:
            flow = longest_match(item, FLOW)
            rule = longest_match(item, forms) if flow is None else None
            check_form(item, FLOW[flow][1] if flow else None if rule is None else forms[rule])
            self.flow.append(flow)
            self.rules.append(rule or "")
            self.touched.append(frozenset().union(*map(registers_of, (item.guard, *item.operands))))
            first = item.operands[0] if item.operands and item.name not in WRITES_NOTHING else None
            self.written.append(registers_of(first))
            self.yields.append(item.opcode.startswith(LETS_OTHERS_RUN))
            self.targets.append(place_of(kernel, item.operands[0]) if flow == "bra" else -1)
