"""Parameter types shared by commands."""

from __future__ import annotations

from typing import Any

import click

from kaleido_fast.errors import unknown_name


class Name(click.ParamType):
    """One of a closed list of names; an unknown one is answered with the nearest."""

    name = "name"

    def __init__(self, kind: str, known: tuple[str, ...]) -> None:
        self.kind, self.known = kind, known

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(self.known)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.known:
            raise unknown_name(self.kind, value, self.known)
        return str(value)


class NumberOr(click.ParamType):
    """A number, or one of a few words that stand for something else."""

    def __init__(self, kind: type[int] | type[float], **words: Any) -> None:
        self.kind, self.words = kind, words
        self.name = "|".join(["integer" if kind is int else "float", *words])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self.words or value is None:
            return self.words.get(value)
        try:
            return self.kind(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor one of {', '.join(self.words)}", param, ctx)
