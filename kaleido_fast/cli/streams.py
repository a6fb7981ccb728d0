"""Standard output and standard error as they may be: closed, full, a pipe without a reader, of any encoding."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from typing import Any, TextIO

ESCAPED = "kaleido_fast.escaped"


def prepare_streams() -> None:
    """Let the standard streams print every name, and keep the numbers of closed ones from other files.

    The first file that is opened after ``>&-`` would have number 1: whatever a library prints would go into it. Writing
    to what stands there now fails, as writing to a closed file does.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            _open_null(number, mode)
    codecs.register_error(ESCAPED, _escape)
    out = sys.stdout
    if out is None:
        sys.stdout = _text_of(_Output(), "utf-8")
    elif isinstance(out, io.TextIOWrapper) and out is sys.__stdout__ and not out.isatty():
        out.flush()
        sys.stdout = _text_of(_Output(), out.encoding)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # click takes ASCII for a mistake, and writes UTF-8 with question marks instead.
            is_ascii = codecs.lookup(stream.encoding).name == "ascii"
            errors = ESCAPED if _is_file(stream) else "backslashreplace"
            stream.reconfigure(encoding="utf-8" if is_ascii else None, errors=errors)


def _is_file(stream: TextIO) -> bool:
    """Whether bytes leave this process: a program that captures text in memory reads characters."""
    try:
        return stream.fileno() >= 0
    except OSError:
        return False


class _Output(io.FileIO):
    """Standard output that remembers its failures: with PYTHONUNBUFFERED a second flush would not fail again."""

    def __init__(self) -> None:
        super().__init__(1, "wb", closefd=False)
        self.problem: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as problem:
            self.problem = problem
            raise


def _text_of(output: _Output, encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(output), encoding=encoding)


def lost_output() -> OSError | None:
    """Why standard output has not taken what was printed; None if it has.

    Nothing that could not be written is held any longer: Python would try it once more at the end of the process, and
    report the failure there.
    """
    _flush(sys.stderr)
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return _flush(sys.stdout) or (raw.problem if isinstance(raw, _Output) else None)


def _flush(stream: TextIO | None) -> OSError | None:
    if stream is None:
        return None
    try:
        stream.flush()
    except OSError as problem:
        with contextlib.suppress(OSError):
            _open_null(stream.fileno(), os.O_WRONLY)
            stream.flush()
        return problem
    return None


def explain_lost(problem: OSError) -> str:
    """One line on it; empty where the reader has gone, which ``| head`` does on purpose."""
    if problem.errno in (errno.EPIPE, errno.ECONNRESET):
        return ""
    return f"standard output cannot be written: {problem.strerror}"


def _open_null(number: int, mode: int) -> None:
    opened = os.open(os.devnull, mode)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)


def _escape(problem: UnicodeError) -> tuple[Any, int]:
    """Bytes of a name that are in no encoding as they are; other characters that cannot be shown as ``\\u1234``."""
    assert isinstance(problem, UnicodeEncodeError)
    part = problem.object[problem.start : problem.end]
    if all(0xDC80 <= ord(character) <= 0xDCFF for character in part):
        return codecs.lookup_error("surrogateescape")(problem)
    return "".join(f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}" for c in part), problem.end
