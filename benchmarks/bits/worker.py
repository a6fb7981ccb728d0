"""``python -m benchmarks.bits.worker plain|interpreted SHARE PATTERN``: configurations of a process.

Prints a line each; the last one says that all were run.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import itertools
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.bits.case import Case, Line, Note
from benchmarks.bits.digest import feed, feed_files
from benchmarks.bits.files import command_cases, file_cases
from benchmarks.bits.sampling import host_cases, module_cases, op_cases, refused_cases, triton_cases

KINDS = (host_cases, triton_cases, module_cases, op_cases, refused_cases, file_cases, command_cases)
END = "all were run"


def chosen(interpreted: bool, share: int, pattern: str) -> Iterator[Case]:
    """Of each kind every ``share``-th configuration, of these the ones whose names fit."""
    for kind in KINDS:
        for case in itertools.islice(kind(), 0, None, share):
            if case.interpreted == interpreted and fnmatch.fnmatchcase(case.name, pattern):
                yield case


def judged(case: Case) -> Line:
    """Run a configuration in a folder of its own; a refusal is a result like any other."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder, inside(folder), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = case.run()
        except Exception as problem:
            text = f"{type(problem).__name__}: {problem}"
            found = [text, Note(text)]
        feed(digest, found)
        feed_files(digest, Path(folder))
    notes = [value for value in found if isinstance(value, Note)]
    ours = [warning.message for warning in told if type(warning.message).__module__.startswith("kaleido_fast")]
    notes += [Note(f"warned: {message}") for message in ours]
    return Line(case.name, digest.hexdigest(), " ".join("; ".join(filter(None, notes)).split()))


@contextlib.contextmanager
def inside(folder: str) -> Iterator[None]:
    """Work in a folder, so that texts hold relative paths alone."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main() -> None:
    which, share, pattern = sys.argv[1:]
    torch.set_num_threads(1)
    for case in chosen(which == "interpreted", int(share), pattern):
        print(judged(case), flush=True)
    print(END)


if __name__ == "__main__":
    main()
