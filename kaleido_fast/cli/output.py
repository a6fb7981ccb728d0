"""What commands print: names whole and as they are, JSON that every reader takes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from kaleido_fast.system.valid_json import json_text

if TYPE_CHECKING:
    from rich.table import Table

WIDEST = 1_000_000  # columns of a file or a pipe, which has no width


def say_json(facts: Any) -> None:
    """Print one JSON object in one line, numbers that are not finite as null."""
    click.echo(json_text(facts))


def say_facts(rows: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns; long values go on below on a terminal, and are one line elsewhere."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    say_table(table)


def say_table(table: Table) -> None:
    """Print a table, with square brackets as they are: in the width of a terminal, else without line breaks."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if sys.stdout.isatty():
        for column in table.columns:
            column.overflow = "fold"
        console.print(table)
        return
    console.width = WIDEST
    console.width = max(1, console.measure(table).maximum)
    with console.capture() as printed:
        console.print(table)
    for line in printed.get().splitlines():
        click.echo(line.rstrip())


def tell(text: str) -> None:
    """Print a line on standard error; a failure to write it is no reason to end."""
    with contextlib.suppress(OSError):
        click.echo(text, err=True)
