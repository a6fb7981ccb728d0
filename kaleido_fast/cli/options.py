"""Parameter types shared by commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kaleido_fast import names
from kaleido_fast.errors import unknown_name
from kaleido_fast.system.files import check_name


class Output(click.Path):
    """The path of a file or store to be written."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value)
        check_name(path)  # before other names are made of it
        return super().convert(path, param, ctx)


overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is there under the names of outputs.")


class Name(click.ParamType):
    """One of a closed list of names; the error for an unknown one names the nearest."""

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


class Shape(click.ParamType):
    """The shape of one picture: HEIGHT,WIDTH, or HEIGHT,WIDTH,3 for colour."""

    name = "HEIGHT,WIDTH[,3]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            shape = tuple(int(part) for part in value.split(","))
        except ValueError:
            shape = ()
        if len(shape) not in (2, 3) or shape[2:] not in ((), (3,)) or min(shape) < 2:
            self.fail(f"{value!r}: give two whole numbers from 2 on, such as 28,28, or 32,32,3 for colour", param, ctx)
        return shape


BACKGROUND = click.option(
    "--background",
    default=names.BACKGROUND,
    show_default=True,
    help="What transparent pictures are laid over: the name of a colour, or #rrggbb.",
)
CHANNELS = click.option(
    "--channels",
    type=Name("channels", names.CHANNELS),
    help="Where arrays of pictures have their colours; none: nowhere [default: found out].",
)
