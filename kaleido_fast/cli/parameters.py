"""Parameter types shared by commands."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from kaleido_fast import names
from kaleido_fast.errors import unknown_name
from kaleido_fast.planning.options import OPTIONS, OneOf, Option, Real, Switch
from kaleido_fast.system.files import check_name

Command = TypeVar("Command", bound=Callable[..., Any])
SHORT_FLAGS = {"n_chains": "--chains", "n_draws": "--draws"}


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


def flag(name: str) -> str:
    """The flag of an option of a run."""
    return SHORT_FLAGS.get(name, f"--{name.replace('_', '-')}")


def run_option(
    name: str, *, text: str | None = None, otherwise: str | None = None, **settings: Any
) -> Callable[[Command], Command]:
    """An option of a run as the table `kaleido_fast.planning.options.OPTIONS` has it.

    Args:
        name: the option's.
        text, otherwise: this command's own, see `kaleido_fast.planning.options.Option`.
        settings: of `click.option`, where they differ: such as another default.
    """
    option = OPTIONS[name]
    text, otherwise = option.text if text is None else text, option.otherwise if otherwise is None else otherwise
    if otherwise:
        settings = {"default": None, **settings}
        text += f" [default: {otherwise}]"
    if isinstance(option.range, Switch):
        settings["is_flag"] = True
    else:
        settings = {"type": _type(name, option), "show_default": not otherwise, **settings}
    text = _in_flags(text, settings.get("type"))
    return click.option(flag(name), name, **{"default": option.default, "help": f"{text}.", **settings})


def _type(name: str, option: Option) -> click.ParamType | type:
    if isinstance(option.range, OneOf):
        return Name(name, option.range.names)
    return float if isinstance(option.range, Real) else int


def _in_flags(text: str, kind: click.ParamType | type | None) -> str:
    """A text of the table as a command says it: flags for options, its own word for None."""
    words = kind.words if isinstance(kind, NumberOr) else {}
    nothing = next((repr(word) for word, value in words.items() if value is None), "None")
    return re.sub(r"`(\w+)`", lambda found: nothing if found[1] == "None" else flag(found[1]), text)


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
