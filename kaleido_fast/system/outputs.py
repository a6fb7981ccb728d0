"""The rule for everything that is written: checked before any work, and nothing is overwritten unasked.

A run names its outputs, with what it puts beside them, and its inputs. An output that exists is refused unless it is
known to be this run's own or the caller said to overwrite; one that is an input is refused in any case.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from pathlib import Path

from kaleido_fast.errors import InputError
from kaleido_fast.names import IMAGE_SUFFIXES
from kaleido_fast.system.files import check_folder, check_name, check_writable, follow, remove_parts
from kaleido_fast.system.locks import output_lock

Outputs = Mapping[str, Path | None]
"""What a file is to the run, in a word or two, and its path; None for what is not written."""
Inputs = Mapping[str, str | Path | None]
"""The same of what is read; names of built-in models and data are no files and do no harm."""
REMEDY = "give another --out"
STORE = ".zarr"


def check_outputs(
    outputs: Outputs,
    inputs: Inputs | None = None,
    *,
    overwrite: bool = False,
    ours: Collection[Path] = (),
    stores: Collection[Path] = (),
    remedy: str = REMEDY,
) -> None:
    """Refuse outputs that would destroy something or cannot be written.

    Args:
        outputs: all files and stores that the run writes.
        inputs: all that it reads.
        overwrite: whether outputs may replace what is there; never what is read.
        ours: outputs that may exist, because this same run has written them or goes on with them.
        stores: outputs that are folders.
        remedy: what to do instead of overwriting.

    Raises:
        InputError: two outputs are one file, an output is an input, lies in a store or among the pictures that are
            read, exists, or cannot be written.
    """
    wanted = {role: path for role, path in outputs.items() if path is not None}
    for path in wanted.values():
        check_name(path)
    for (first, path), (second, other) in combinations(wanted.items(), 2):
        if is_same(path, other):
            raise InputError(f"{other} would be both the {first} and the {second} of this run: {remedy}")
    for role, path in wanted.items():
        for name, source in (inputs or {}).items():
            if source is not None and "\0" not in str(source):
                _refuse_input(role, path, name, Path(source), remedy)
        if path in stores:
            check_folder(path)
        else:
            check_writable(path)
    if not overwrite:
        _refuse_existing(wanted, ours, remedy)


@contextlib.contextmanager
def claimed(
    outputs: Outputs, inputs: Inputs | None = None, *, overwrite: bool = False, remedy: str = REMEDY
) -> Iterator[None]:
    """Check outputs that are written at once, at the end, and keep other processes from writing them meanwhile.

    Raises:
        InputError: as `check_outputs`, or another process writes one of them.
    """
    check_outputs(outputs, inputs, overwrite=overwrite, remedy=remedy)
    wanted = {role: path for role, path in outputs.items() if path is not None}
    with contextlib.ExitStack() as held:
        for path in wanted.values():
            held.enter_context(output_lock(path))
            remove_parts(path)
        if not overwrite:
            _refuse_existing(wanted, (), remedy)  # one that ended before the lock was ours
        yield


def is_same(path: Path, other: Path) -> bool:
    """Whether two paths are one file, links followed; neither needs to exist."""
    if os.path.realpath(path) == os.path.realpath(other):
        return True
    try:
        return path.samefile(other)  # names that differ in case, where that makes no difference
    except OSError:
        return False


def _refuse_input(role: str, path: Path, name: str, source: Path, remedy: str) -> None:
    if is_same(path, source):
        raise InputError(f"{path} is read by this run ({name}): the {role} would overwrite it; {remedy}")
    if not os.path.isdir(source):  # noqa: PTH112 - false, not an error, for names that are too long
        return
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(source)):
        return
    if source.suffix == STORE or path.suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(
            f"{path} lies in {source}, which this run reads ({name}): the next one would take the {role} for a part of "
            f"it; {remedy}"
        )


def _refuse_existing(outputs: Mapping[str, Path], ours: Collection[Path], remedy: str) -> None:
    for role, path in outputs.items():
        if path not in ours and follow(path).exists():
            raise InputError(
                f"{path} is there already, and this run's {role} would overwrite it: {remedy}, or --overwrite replaces "
                "it"
            )
