"""Numbers as callers write them: Python's own, numpy's, or arrays and tensors that hold a single one."""

from __future__ import annotations

import numbers
from typing import Any

from kaleido_fast.errors import InputError


def plain_number(value: Any) -> Any:
    """A number of any library as Python's ``int``, ``float`` or ``bool``; anything else is returned as it is.

    Whole numbers stay whole. Truth values stay truth values: checks refuse them where a number is asked for.
    """
    if type(value) in (int, float, bool):
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # np.bool_, arrays and tensors of one number
        held = value.item()
        return held if type(held) in (int, float, bool) else value
    return value


def plain_fields(record: Any) -> None:
    """Make the numbers in the fields of a (frozen) dataclass plain, also those in tuples, lists and arrays of them."""
    for name, value in list(vars(record).items()):
        plain = plain_numbers(value)
        if plain is not value:
            object.__setattr__(record, name, plain)


def plain_numbers(value: Any) -> Any:
    """`plain_number`; of a tuple, list, range or 1-D array of numbers a tuple of plain ones."""
    if isinstance(value, (tuple, list, range)) or getattr(value, "ndim", None) == 1:
        return tuple(plain_number(entry) for entry in value)
    return plain_number(value)


def json_number(value: Any) -> Any:
    """For ``json.dumps(default=...)``: numbers of other libraries; anything else raises `InputError`."""
    plain = plain_number(value)
    if plain is value:
        raise InputError(f"{value!r} of type {type(value).__name__} cannot be written as JSON: give plain values")
    return plain


def whole_number(name: str, value: Any, least: int, most: int) -> int:
    """``value`` as an int.

    Raises:
        InputError: it is no whole number from ``least`` to ``most``, or a truth value.
    """
    plain = plain_number(value)
    if isinstance(plain, bool) or not isinstance(plain, int) or not least <= plain <= most:
        raise InputError(f"{name} is {value!r}: it must be a whole number from {least:,} to {most:,}")
    return plain


def real_number(value: Any) -> float | None:
    """``value`` as a float; None where it is no number; truth values are no numbers here."""
    plain = plain_number(value)
    return None if isinstance(plain, bool) or not isinstance(plain, (int, float)) else float(plain)


def refuse_truth_values(**values: Any) -> None:
    """Refuse True and False, of any library, where numbers belong: `InputError` with the name."""
    for name, value in values.items():
        if isinstance(plain_number(value), bool):
            raise InputError(f"{name} is {value!r}: it must be a number, not a truth value")
