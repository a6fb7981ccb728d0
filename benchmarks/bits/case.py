"""What a configuration is, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Note(str):
    """Text for the reader of a line that is no part of its hash."""


Found = list[Any]  # values to hash, and notes


class Case(NamedTuple):
    """A configuration.

    Args:
        name: without spaces.
        run: computes it, in an empty folder; the files it leaves there are hashed too.
        interpreted: whether it runs where Triton's interpreter was asked for.
    """

    name: str
    run: Callable[[], Found]
    interpreted: bool = False


class Line(NamedTuple):
    """A configuration's name, the hash of what came of it, and a text for the reader."""

    name: str
    digest: str
    note: str

    def __str__(self) -> str:
        return f"{self.name}  {self.digest}  {self.note}".rstrip()

    @classmethod
    def parse(cls, text: str) -> Line:
        """Read back one line."""
        name, digest, *note = text.rstrip("\n").split("  ", 2)
        return cls(name, digest, *(note or [""]))
