"""The command line: one file a command, loaded when it is used."""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from pathlib import Path
from typing import NoReturn

import click

from kaleido_fast.cli.output import tell
from kaleido_fast.cli.streams import explain_lost, lost_output, prepare_streams
from kaleido_fast.errors import InputError, TerminatedError, unknown_name
from kaleido_fast.system.versions import find_kernels, package_version
from kaleido_fast.system.workers import refuse_workers

COMMANDS = (
    "sample",
    "join",
    "train",
    "attractors",
    "show",
    "animate",
    "evaluate",
    "bench",
    "tune",
    "reproduce",
    "info",
    "doctor",
)
BY_WORKERS = ("sample", "train", "info", "doctor")  # that processes started together share, or that write nothing
INTERRUPTED = 130  # the shell's status of a program ended by Ctrl-C
TERMINATED = 143  # and by SIGTERM
UNHEARD = 1  # standard output is full, or its reader has gone
LINE_BREAKS = re.compile(r"\s*[\r\n]+\s*")


class LazyGroup(click.Group):
    """Finds commands in the modules of this package, so that ``--help`` loads none but the one it needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            raise unknown_name("command", cmd_name, COMMANDS)
        return importlib.import_module(f"kaleido_fast.cli.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        found = super().resolve_command(ctx, args)
        if found[0] not in BY_WORKERS:
            refuse_workers(f"'{found[0]}'", "run it in one process, without torchrun")
        return found

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:  # click would print an empty line and drop the text
            _end_interrupted(stop)
        except EOFError as problem:  # click would call it an interruption
            raise InputError(f"a file ends too early: {problem or 'it is cut off or empty'}") from problem


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"kaleido-fast, version {package_version()}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,  # by itself click takes that for an error, whose lines become one
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(  # click's own would look the version up (2 ms) at each start
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Sample generative kaleidoscopic networks: one deep MLP iterated over 100,000 chains at once.

    Begin with: kaleido-fast sample --chains 100000
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """Run the command line; bad input ends in one line on standard error and exit status 2.

    What was printed and has not arrived, because standard output is full or closed, ends with 1.
    """
    prepare_streams()
    find_kernels()
    warnings.formatwarning = _format_warning
    # Before torch is loaded: a worker that has lost the first one says so in a line, not with stacks of its store.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        status = cli.main(standalone_mode=False)
    except click.ClickException as problem:
        _end(problem.format_message(), 2)
    except InputError as problem:
        _end("" if getattr(problem, "printed_elsewhere", False) else str(problem), 2)
    except (click.Abort, KeyboardInterrupt) as stop:
        _end_interrupted(stop)
    except OSError as problem:
        lost = lost_output()
        if lost is not None:
            _end(explain_lost(lost), UNHEARD)
        if problem.filename is None:
            raise
        _end(f"{os.fsdecode(problem.filename)}: {problem.strerror}; give a path that can be used here", 2)
    _end("", status if isinstance(status, int) else 0)


_format_any_warning = warnings.formatwarning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of this package in one line; Python would show the place in the code as well."""
    package = __name__.partition(".")[0]
    if Path(filename).is_relative_to(Path(__file__).parent.parent) or category.__module__.partition(".")[0] == package:
        return f"kaleido-fast: {message}\n"
    return _format_any_warning(message, category, filename, lineno, line)


def _end_interrupted(stop: BaseException) -> NoReturn:
    status = TERMINATED if getattr(stop, "terminated", isinstance(stop, TerminatedError)) else INTERRUPTED
    printed_elsewhere = getattr(stop, "printed_elsewhere", False)
    _end("" if printed_elsewhere else str(stop) or "interrupted; nothing was written", status)


def _end(text: str, status: int) -> NoReturn:
    """Say why, if there is something to say, and end; what was printed and did not arrive is a failure too."""
    lost = lost_output()
    if lost is not None and status == 0:
        text, status = explain_lost(lost), UNHEARD
    if text:
        tell(f"kaleido-fast: {LINE_BREAKS.sub(' ', text.strip())}")
        lost_output()
    sys.exit(status)
