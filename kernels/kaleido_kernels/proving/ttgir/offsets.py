"""Offsets into large tensors: 64-bit ones, and how they were made."""

from __future__ import annotations

import re

from kaleido_kernels.proving.ttgir.operations import Operation, Value, constant, origin, read_operations

LARGE_POINTERS = ("draws_ptr", "final_ptr", "start_ptr", "saved_ptr")
"""Tensors of n_chains x ... values: their offsets pass 2**31."""
INTEGER = re.compile(r"(?:^|[ <x])i(\d+)\b")


def narrow_offsets(text: str) -> list[str]:
    """The ``tt.addptr`` lines whose base is one of `LARGE_POINTERS` and whose offset is, or comes from, 32 bits."""
    wrong = []
    for operation in read_operations(text).walk():
        if operation.name != "tt.addptr" or origin(operation.operands[0]).name.lstrip("%") not in LARGE_POINTERS:
            continue
        # On top of a 64-bit offset a column number may well be of 32 bits.
        if not (_is_wide(operation) or _moved(operation.operands[0])) or _widened_product(operation.operands[1]):
            wrong.append(operation.text)
    return wrong


def _is_wide(operation: Operation) -> bool:
    """Whether the offset, the last of the types, has 64 bits."""
    return INTEGER.findall(operation.text.rpartition(" : ")[2])[-1:] == ["64"]


def _moved(pointer: Value) -> bool:
    """Whether a 64-bit offset was added on the way to a pointer."""
    source = pointer.source
    if not isinstance(source, Operation) or not source.operands or origin(pointer) is pointer:
        return False
    return (source.name == "tt.addptr" and _is_wide(source)) or _moved(source.operands[0])


def _widened_product(value: Value) -> bool:
    """Whether a 64-bit value comes from a 32-bit product of two variables that was widened afterwards."""
    waiting = [(value, False)]
    seen: set[tuple[Value, bool]] = set()
    while waiting:
        item = waiting.pop()
        source = item[0].source
        if item in seen or not isinstance(source, Operation):
            continue
        seen.add(item)
        below = item[1] or source.name == "arith.extsi"
        variables = [each for each in source.operands if not _is_constant(each)]
        if below and source.name == "arith.muli" and len(variables) > 1:
            return True
        waiting.extend((each, below) for each in source.operands)
    return False


def _is_constant(value: Value) -> bool:
    return constant(value) is not None or (
        isinstance(value.source, Operation) and "arith.constant" in value.source.text
    )
