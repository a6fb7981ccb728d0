"""Reads PTX text into instructions. Plain Python.

Chapters "Syntax", "State Spaces, Types, and Variables", "Instruction Operands" and "Directives" of the PTX manual, as
far as Triton's output goes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from kaleido_kernels.proving.emulation.errors import UnknownInstructionError

WIDTHS = {"pred": "pred", "b16": "b16", "b32": "b32", "b64": "b64", "f32": "b32", "f64": "b64", "u32": "b32"}
WIDTHS |= {"s32": "b32", "u64": "b64", "s64": "b64", "u16": "b16", "s16": "b16", "f16": "b16"}
"""Register type as declared -> how it is held."""
SKIPPED = (".reg", ".pragma", ".local", ".shared", ".file", ".maxnreg", ".alias")
SHARED = "global_smem"
"""Name of the shared memory that Triton's kernels use, at address 0."""


@dataclass(frozen=True)
class Register:
    """A register of every thread; ``number`` is its place among all registers of the kernel."""

    name: str
    width: str
    number: int


@dataclass(frozen=True)
class Special:
    """A predefined register, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant, as its bits."""

    bits: int


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter or shared memory."""

    name: str


@dataclass(frozen=True)
class Vector:
    """Several operands in braces."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """Two results, written ``value|predicate``."""

    value: Operand
    predicate: Operand


@dataclass(frozen=True)
class Address:
    """``[base + offset]``, or with coordinates that of a piece of a tensor."""

    base: Operand
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Negated:
    """A predicate taken the other way round."""

    operand: Operand


Operand = Register | Special | Immediate | Symbol | Vector | Pair | Address | Negated


def registers_of(operand: Operand | None) -> frozenset[int]:
    """Numbers of the registers that an operand names."""
    if isinstance(operand, Register):
        return frozenset((operand.number,))
    inner: tuple[Operand, ...] = ()
    if isinstance(operand, Vector):
        inner = operand.items
    elif isinstance(operand, Pair):
        inner = (operand.value, operand.predicate)
    elif isinstance(operand, Address):
        inner = (operand.base, *operand.coordinates)
    elif isinstance(operand, Negated):
        inner = (operand.operand,)
    return frozenset().union(*map(registers_of, inner))


@dataclass(frozen=True)
class Instruction:
    """One statement: ``parts`` is its opcode split at dots; ``guard`` the predicate that lets a thread take part."""

    guard: Operand | None
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str
    source: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.parts[0]

    @property
    def opcode(self) -> str:
        """The whole opcode."""
        return ".".join(self.parts)

    @property
    def kind(self) -> str:
        """The last modifier, mostly the type."""
        return self.parts[-1]


@dataclass(eq=False)
class Kernel:
    """One entry of a PTX module, which nothing changes once it is read.

    Args:
        name: of the kernel.
        parameters: their names in order.
        n_threads: threads of a block.
        max_registers: registers of a thread when it starts; 0 where the text does not say.
        instructions: in order.
        labels: name -> place of the instruction that follows.
        branch_tables: label -> the labels that an indexed branch may go to.
        registers: all of them.
    """

    name: str
    parameters: list[str]
    n_threads: int
    max_registers: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_tables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    registers: list[Register] = field(default_factory=list)

    @property
    def uses_async_proxy(self) -> bool:
        """Whether something reads shared memory by another way than ordinary loads."""
        return any(item.opcode.startswith(("wgmma.mma", "cp.async.bulk")) for item in self.instructions)

    @property
    def is_specialised(self) -> bool:
        """Whether an indexed branch sends warps to partitions, each with a program of its own."""
        return bool(self.branch_tables)


def parse_kernel(text: str) -> Kernel:
    """The first entry of a PTX module.

    Raises:
        UnknownInstructionError: text without an entry, for another target than sm_90, or that cannot be read.
    """
    target = re.search(r"^\.target\s+(\w+)", text, re.M)
    if target is None or target[1] not in ("sm_90", "sm_90a"):
        raise UnknownInstructionError(f"PTX for {target[1] if target else 'no target'}: the emulator knows sm_90 only")
    entry = re.search(r"\.visible\s+\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", text, re.S)
    if entry is None:
        raise UnknownInstructionError("PTX without an entry: pass the text of a compiled kernel")
    threads = re.search(r"\.reqntid\s+(\d+)\s*(,\s*1\s*)*(?=[^,\d\s]|$)", entry[3])
    registers = re.search(r"\.maxnreg\s+(\d+)", entry[3])
    if threads is None or int(threads[1]) % 32 or not int(threads[1]):
        raise UnknownInstructionError(
            f"{entry[1]} does not say how many whole warps it has in one dimension (.reqntid)"
        )
    parameters = re.findall(r"\.param[^,]*?([\w$]+)(?:\[\d+\])?\s*(?:,|$)", entry[2].strip() + "\n")
    kernel = Kernel(entry[1], parameters, int(threads[1]), int(registers[1]) if registers else 0)
    _Body(kernel).read(text[entry.end() :])
    return kernel


@dataclass
class _Scope:
    """Names between braces: registers and labels declared there hide those outside."""

    outer: _Scope | None
    number: int
    registers: dict[str, Register] = field(default_factory=dict)
    labels: set[str] = field(default_factory=set)

    def register(self, name: str) -> Register | None:
        found = self.registers.get(name)
        return found if found is not None or self.outer is None else self.outer.register(name)

    def label(self, name: str) -> str | None:
        """The label's name, made unique."""
        if name in self.labels:
            return f"{name}@{self.number}" if self.number else name
        return self.outer.label(name) if self.outer is not None else None


class _Body:
    """Reads the statements of one kernel: first all labels and registers, then the operands."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.statements: list[tuple[str, _Scope, str]] = []  # text, scope, line of the source

    def read(self, text: str) -> None:
        scopes, source = [_Scope(None, 0)], ""
        n_scopes = 0
        for piece in _pieces(text):
            if piece == "{":
                n_scopes += 1
                scopes.append(_Scope(scopes[-1], n_scopes))
            elif piece == "}":
                scopes.pop()
                if not scopes:
                    break
            elif piece.startswith("//"):
                source = piece[2:]
            elif piece.endswith(":"):
                self._label(piece[:-1], scopes[-1])
            else:
                self._statement(piece, scopes[-1], source)
        for statement in self.statements:
            try:
                self.kernel.instructions.append(self._instruction(*statement))
            except ValueError as problem:
                raise UnknownInstructionError(f"{statement[0]!r} cannot be read: {problem}") from problem
        if not self.kernel.instructions or self.kernel.instructions[-1].name not in ("ret", "exit", "trap", "bra"):
            raise UnknownInstructionError(f"{self.kernel.name} does not end with ret")

    def _label(self, name: str, scope: _Scope) -> None:
        if name in scope.labels:
            raise UnknownInstructionError(f"label {name} stands twice")
        scope.labels.add(name)
        unique = scope.label(name)
        assert unique is not None
        self.kernel.labels[unique] = len(self.statements)

    def _statement(self, text: str, scope: _Scope, source: str) -> None:
        if text.startswith(".reg"):
            self._declare(text, scope)
        elif text.startswith(".branchtargets"):
            here = len(self.statements)
            names = tuple(name.strip() for name in text[len(".branchtargets") :].split(","))
            for label in [label for label, place in self.kernel.labels.items() if place == here]:
                self.kernel.branch_tables[label] = names
        elif not text.startswith(SKIPPED):
            self.statements.append((text, scope, source))

    def _declare(self, text: str, scope: _Scope) -> None:
        found = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
        if found is None or found[1] not in WIDTHS:
            raise UnknownInstructionError(f"declaration {text!r}")
        for item in found[2].split(","):
            several = re.fullmatch(r"(%?\w+)<(\d+)>", item.strip())
            names = [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [item.strip()]
            for name in names:
                register = Register(name, WIDTHS[found[1]], len(self.kernel.registers))
                self.kernel.registers.append(register)
                scope.registers[name] = register

    def _instruction(self, text: str, scope: _Scope, source: str) -> Instruction:
        guarded = re.match(r"@(!?)(%?[\w$]+)\s+(.*)", text, re.S)
        guard: Operand | None = None
        body = text
        if guarded:
            guard, body = self._operand(guarded[2], scope), guarded[3]
            guard = Negated(guard) if guarded[1] else guard
        opcode, _, rest = body.partition(" ")
        operands = tuple(self._operand(token, scope) for token in _tokens(rest))
        return Instruction(guard, tuple(opcode.split(".")), operands, text, source)

    def _operand(self, token: str, scope: _Scope) -> Operand:
        if token.startswith("{"):
            return Vector(tuple(self._operand(item, scope) for item in _tokens(token[1:-1])))
        if token.startswith("["):
            return self._address(token[1:-1].strip(), scope)
        if token.startswith("!"):
            return Negated(self._operand(token[1:], scope))
        if "|" in token:
            value, predicate = token.split("|")
            return Pair(self._operand(value, scope), self._operand(predicate, scope))
        register = scope.register(token)
        if register is not None:
            return register
        if token.startswith("%"):
            return Special(token)
        if re.match(r"-?\d", token):
            return Immediate(_constant(token))
        return Symbol(scope.label(token) or token)

    def _address(self, text: str, scope: _Scope) -> Address:
        tokens = list(_tokens(text))
        if len(tokens) > 1 and tokens[1].startswith("{"):
            pieces = self._operand(tokens[1], scope)
            assert isinstance(pieces, Vector)
            return Address(self._operand(tokens[0], scope), 0, pieces.items)
        found = re.fullmatch(r"([%$\w]+)\s*(?:\+\s*(-?\d+))?", text)
        if found is None:
            raise UnknownInstructionError(f"address [{text}]")
        return Address(self._operand(found[1], scope), int(found[2] or 0))


def _pieces(text: str) -> Iterator[str]:
    """Statements without their semicolon, labels with their colon, braces of scopes, and ``//file:line`` marks."""
    text = re.sub(r"^\s*\.loc\b[^\n]*?(?://\s*(\S+?:\d+)\b[^\n]*)?$", lambda m: f";//{m[1] or ''};", text, flags=re.M)
    text = re.sub(r"//(?![\w./\\-]*(?::\d+)?;)[^\n]*", "", text)
    pending = ""
    for piece in re.split(r"([;{}])", text):
        pending += piece if piece != ";" else ""
        while label := re.match(r"\s*([$\w]+:)(?!:)", pending):
            yield label[1]
            pending = pending[label.end() :]
        if piece == ";":
            if pending.strip():
                yield " ".join(pending.split())
            pending = ""
        elif piece == "{" and pending.strip() == "{":
            yield "{"
            pending = ""
        elif piece == "}" and pending.count("}") > pending.count("{"):
            yield "}"
            pending = ""


def _tokens(text: str) -> Iterator[str]:
    """Operands: at commas outside of brackets."""
    yield from re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text)


def _constant(token: str) -> int:
    """The bits of a constant: 0f and 0d give those of a floating-point number (chapter "Constants")."""
    if token.startswith("0f"):
        return int(token[2:], 16)
    if token.startswith("0d"):
        return int.from_bytes(struct.pack(">Q", int(token[2:], 16)), "big")
    digits = token.rstrip("U")
    return int(digits, 8 if re.match(r"-?0\d", digits) else 0)
