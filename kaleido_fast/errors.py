"""Errors that the user can act on."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable


class InputError(ValueError):
    """Something that was passed in cannot be used.

    The text is one line: what was given, what is allowed, what to do. The command line prints it and exits with 2.
    """


class GeneralModuleWarning(UserWarning):
    """A module is run as it is, by the reference engine, because it is not understood exactly; the text says why."""


class SamplerWarning(UserWarning):
    """A checkpoint is sampled by another sampler than its card recommends; the text says what it recommends."""


class WorkerError(InputError):
    """Another worker of the same run failed; ``printed_elsewhere``: another process prints it."""

    def __init__(self, text: str, *, printed_elsewhere: bool) -> None:
        super().__init__(text)
        self.printed_elsewhere = printed_elsewhere


class TerminatedError(KeyboardInterrupt):
    """SIGTERM: like Ctrl-C, with another exit status."""


class StreamInterruptedError(KeyboardInterrupt):
    """Ctrl-C or SIGTERM while blocks were written; it says what is kept and how to go on.

    Args:
        text: what is kept and how to go on.
        terminated: whether it was SIGTERM.
    """

    def __init__(self, text: str, *, terminated: bool) -> None:
        super().__init__(text)
        self.terminated = terminated


class SamplingInterruptedError(KeyboardInterrupt):
    """Ctrl-C during sampling; ``done`` of ``n_chains`` chains were complete. A `KeyboardInterrupt` to its caller."""

    def __init__(self, done: int, n_chains: int) -> None:
        super().__init__(f"interrupted: {done:,} of {n_chains:,} chains were complete; nothing was written")
        self.done = done
        self.n_chains = n_chains


class SamplingMemoryError(InputError):
    """A device ran out of memory during sampling, although the plan's estimate fitted; the run holds none of it now.

    Args:
        text: what to do.
        block_chains: the value of that option to try next.
    """

    def __init__(self, text: str, *, block_chains: int) -> None:
        super().__init__(text)
        self.block_chains = block_chains


def unknown_name(kind: str, name: object, known: Iterable[str]) -> InputError:
    """The error for a name outside a closed list: lists the known names and suggests the nearest."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return InputError(f"unknown {kind} {name!r}: known are {', '.join(names)}{hint}")


def warn_caller(text: str, category: type[Warning]) -> None:
    """Warn at the line outside of this package that led here, so that Python shows it once for that line."""
    level, frame = 1, sys._getframe()
    # torch and contextlib wrap our functions: their frames lie between ours.
    inside = (__name__.partition(".")[0], "torch", "contextlib")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)
