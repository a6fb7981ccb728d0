"""Arithmetic on the integers of a kernel, as far as they are known without running it."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

from kaleido_kernels.proving.ttgir.operations import Operation, Value, constant

Numbers = dict[Value, int | None]
ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.andi": operator.and_,
    "arith.ori": operator.or_,
    "arith.xori": operator.xor,
    "arith.minsi": min,
    "arith.maxsi": max,
    "arith.divsi": lambda a, b: int(a / b) if b else 0,
    "arith.remsi": lambda a, b: a - b * int(a / b) if b else 0,
    "arith.divui": lambda a, b: a // b if b else 0,
    "arith.remui": lambda a, b: a % b if b else 0,
}
COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def number_of(value: Value, known: Numbers) -> int | None:
    """A value's number; None where it is not known."""
    return known[value] if value in known else constant(value)


def compute(operation: Operation, known: Numbers) -> int | None:
    """The number that an operation makes; None where that is not known."""
    numbers = [number_of(each, known) for each in operation.operands]
    if operation.name == "arith.constant":
        return constant(operation.results[0])
    if operation.name == "arith.select" and numbers[0] is not None:
        return numbers[1] if numbers[0] else numbers[2]
    if len(numbers) == 1 and operation.name in ("arith.extui", "arith.extsi", "arith.trunci", "arith.bitcast"):
        return numbers[0]
    if len(numbers) != 2 or numbers[0] is None or numbers[1] is None:
        return None
    if operation.name in ARITHMETIC:
        return ARITHMETIC[operation.name](numbers[0], numbers[1])
    found = re.search(r"arith\.cmpi (?:s|u)?(eq|ne|lt|le|gt|ge),", operation.text)
    return int(COMPARISONS[found[1]](numbers[0], numbers[1])) if found else None
