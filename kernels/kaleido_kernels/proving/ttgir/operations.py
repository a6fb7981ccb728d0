"""The text of a module as a tree: operations, their blocks, and the values that these define and use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

NAME = re.compile(r"%[\w.$-]+(?:#\d+)?")
TYPE = re.compile(r"(%[\w.$-]+): ((?:[^,()<>]|<(?:[^<>]|<(?:[^<>]|<[^<>]*>)*>)*>)+)")
"""An argument and its type."""
PASSES_ON = ("ttg.memdesc_index", "ttg.memdesc_subslice", "ttg.memdesc_trans", "ttg.memdesc_reinterpret")
"""Operations that name a part of what their first operand names."""
PASSES_POINTER_ON = ("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "ttg.convert_layout", "tt.reshape")


@dataclass(eq=False)
class Value:
    """A value: result number ``index`` of an operation, or argument number ``index`` of a block."""

    name: str
    source: Operation | Block
    index: int
    kind: str = ""


@dataclass(eq=False)
class Block:
    """A region of an operation: its name ("default", "partition0", "do", "else" or ""), and its warps."""

    name: str
    parent: Operation | None
    warps: int = 0
    arguments: list[Value] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)

    def walk(self) -> Iterator[Operation]:
        """All operations inside in the order of the text, those of inner blocks behind the operation around them."""
        for operation in self.operations:
            yield operation
            for block in operation.blocks:
                yield from block.walk()


@dataclass(eq=False)
class Operation:
    """One operation: ``text`` is its line without location."""

    name: str
    text: str
    block: Block
    operands: list[Value] = field(default_factory=list)
    results: list[Value] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    def number(self, attribute: str, otherwise: int = 0) -> int:
        """An attribute's number, as in ``{pendings = 1 : i32}``."""
        found = re.search(rf"\b{attribute} = (-?\d+)", self.text)
        return int(found[1]) if found else otherwise

    @property
    def around(self) -> Iterator[Operation]:
        """The operations that this one is inside of, from within outwards."""
        parent = self.block.parent
        while parent is not None:
            yield parent
            parent = parent.block.parent

    @property
    def partition(self) -> str:
        """The partition of a warp-specialised kernel that runs this; "" outside of them."""
        block: Block | None = self.block
        while block is not None:
            if block.parent is None or block.parent.name == "ttg.warp_specialize":
                return block.name
            block = block.parent.block
        return ""


class _Reader:
    """Reads line by line: one operation a line, braces at the ends of lines."""

    def __init__(self, text: str) -> None:
        self.module = Block("", None)
        self.block = self.module
        self.scopes: list[dict[str, Value]] = [{}]
        for line in text.splitlines():
            self._read(line.strip())

    def _read(self, line: str) -> None:
        if line.startswith("}"):
            self._leave(line)
        elif line.startswith("^"):
            self._define_arguments(line)
        elif re.match(r"(default|partition\d+\(.*) ?\{$", line):
            self._open_partition(line)
        elif line.endswith("{") and not line.startswith("{-#"):
            self._open(line)
        elif line and not line.startswith(("#", "//", "{-#", "#-}")):
            self._operation(line.partition(" loc(")[0])

    def _operation(self, code: str) -> Operation:
        named, _, rest = code.partition(" = ") if code.startswith("%") else ("", "", code)
        name = re.split(r"[ ({]", rest.replace('"', ""), maxsplit=1)[0]
        operation = Operation(name, code, self.block, self._values(rest))
        self.block.operations.append(operation)
        for result in named.split(", ") if named else []:  # one name, one for several (%x:2), or several
            base, _, several = result.partition(":")
            for name in [f"{base}#{number}" for number in range(int(several))] if several else [base]:
                operation.results.append(self._define(name, operation, len(operation.results)))
        return operation

    def _open(self, line: str) -> None:
        operation = self._operation(line)
        loop = re.search(r"scf\.for (?:unsigned )?(%\S+) = (%\S+) to (%\S+) step (%\S+)", line)
        carried = re.search(r"(?:iter_args|scf\.while )\(([^)]*)\)", line)
        pairs = re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", carried[1]) if carried else []
        if loop or carried:
            bounds = " ".join(loop.groups()[1:]) if loop else ""
            operation.operands = self._values(bounds + " " + " ".join(first for _, first in pairs))
        self._enter(Block("", operation))
        if loop:
            self._argue(loop[1])
        for name, _ in pairs:
            self._argue(name)
        if operation.name in ("tt.func", "func.func"):
            self._define_arguments(line)

    def _open_partition(self, line: str) -> None:
        """A line that opens one of the blocks that follow ``ttg.warp_specialize`` on lines of their own."""
        operation = self.block.operations[-1]
        assert operation.name == "ttg.warp_specialize", line
        warps = re.search(r"num_warps\((\d+)\)", line)
        self._enter(Block(line.split("(")[0].split(" ")[0], operation, int(warps[1]) if warps else 0))
        self._define_arguments(line)

    def _enter(self, block: Block) -> None:
        assert block.parent is not None
        block.parent.blocks.append(block)
        self.block = block
        self.scopes.append({})

    def _leave(self, line: str) -> None:
        self.scopes.pop()
        operation = self.block.parent
        assert operation is not None, line
        self.block = operation.block
        if line.endswith("{"):  # "} else {" and "} do {"
            self._enter(Block(line.strip("{} "), operation))

    def _define_arguments(self, line: str) -> None:
        for name, kind in TYPE.findall(re.sub(r" loc\([^()]*(\([^()]*\)[^()]*)*\)", "", line)):
            self._argue(name, kind.strip())

    def _argue(self, name: str, kind: str = "") -> None:
        self.block.arguments.append(self._define(name, self.block, len(self.block.arguments), kind))

    def _define(self, name: str, source: Operation | Block, index: int, kind: str = "") -> Value:
        self.scopes[-1][name] = Value(name, source, index, kind)
        return self.scopes[-1][name]

    def _values(self, text: str) -> list[Value]:
        """The values that a text names, but within quotes: inline assembly has names of its own."""
        return [self._value(name) for name in NAME.findall(re.sub(r'"[^"]*"', "", text))]

    def _value(self, name: str) -> Value:
        found = next((scope[name] for scope in reversed(self.scopes) if name in scope), None)
        return found or Value(name, self.module, -1)  # defined nowhere: a piece of a module


def read_operations(text: str) -> Block:
    """The module's block of a text as Triton prints it."""
    return _Reader(text).module


def partitions(module: Block) -> list[Block]:
    """The partitions of a warp-specialised kernel, the default one first; empty for other kernels."""
    return [
        block for operation in module.walk() if operation.name == "ttg.warp_specialize" for block in operation.blocks
    ]


def origin(value: Value) -> Value:
    """What a value is a part of: an allocation's result, a kernel's argument, or where it cannot be followed further.

    Followed are parts of shared memory, pointers with offsets, captures of partitions and first values of loops.
    """
    while True:
        source = value.source
        if isinstance(source, Operation):
            if source.name not in (*PASSES_ON, *PASSES_POINTER_ON) or not source.operands:
                return value
            value = source.operands[0]
        else:
            outer = _handed_in(source, value.index)
            if outer is None:
                return value
            value = outer


def _handed_in(block: Block, index: int) -> Value | None:
    """What an argument of a block is at first: a partition's capture, or what a loop begins with."""
    parent = block.parent
    if parent is None or parent.name in ("tt.func", "func.func"):
        return None
    first = {"scf.for": 2}.get(parent.name, 0)
    place = index + first
    if parent.name == "scf.for" and index == 0:
        return None
    return parent.operands[place] if place < len(parent.operands) else None


def slot_of(value: Value) -> tuple[Value, Value | None]:
    """The memory that a part belongs to, and the number of the part in it: None where it is the whole."""
    source = value.source
    number = None
    if isinstance(source, Operation) and source.name == "ttg.memdesc_index":
        number = source.operands[1]
    return origin(value), number


def constant(value: Value) -> int | None:
    """The number that a value is, if it is a constant."""
    source = value.source
    if not isinstance(source, Operation) or source.name != "arith.constant":
        return None
    if re.search(r"constant (true|false)\b", source.text):
        return int("constant true" in source.text)
    found = re.search(r"constant (-?\d+) :", source.text)
    return int(found[1]) if found else None
