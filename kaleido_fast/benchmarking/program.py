"""How the programs in ``benchmarks/`` end: for bad input one line and an exit status, never a traceback."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from kaleido_fast.errors import InputError

REFUSED, INTERRUPTED = 2, 130


def run_program(command: click.Command, name: str, kept: str) -> NoReturn:
    """Run a command line and end this process with its exit status.

    Bad input ends it with status 2, Ctrl-C with 130, each after one line on standard error. Where its output is no
    longer read, click ends it with status 1.

    Args:
        command: what to run; an int that it returns is the exit status.
        name: of the program, the first word of that line.
        kept: what an interruption leaves, such as "what was measured is written".
    """
    try:
        status = command.main(standalone_mode=False)
    except (click.ClickException, InputError) as problem:
        text = problem.format_message() if isinstance(problem, click.ClickException) else str(problem)
        click.echo(f"{name}: {' '.join(text.split())}", err=True)
        sys.exit(REFUSED)
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"{name}: interrupted; {kept}", err=True)
        sys.exit(INTERRUPTED)
    sys.stdout.flush()
    sys.exit(status if isinstance(status, int) else os.EX_OK)
