"""Files that appear under their final name only when they are whole."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kaleido_fast.errors import InputError


def check_writable(path: Path) -> None:
    """Refuse an output path that cannot be written, before any work is done.

    Raises:
        InputError: the path is a folder, its folder does not exist, or the folder is not writable.
    """
    if path.is_dir():
        raise InputError(f"output {path} is a folder: give a file name, for example {path / 'samples.npy'}")
    check_folder(path)
    if path.exists() and not os.access(path, os.W_OK):
        raise InputError(f"output {path} is read-only: choose another name or make it writable")


def check_folder(path: Path) -> None:
    """Refuse an output path whose folder does not exist or cannot be written.

    Raises:
        InputError: as said.
    """
    folder = path.parent
    if not folder.exists():
        raise InputError(f"output folder {folder} does not exist: create it or write elsewhere")
    if not folder.is_dir():
        raise InputError(f"output folder {folder} is not a folder: give a path inside a folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise write_error(path, problem) from problem


def write_error(path: Path, problem: OSError) -> InputError:
    """One line for a failed write of ``path``."""
    if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InputError(
            f"cannot write {path}: no space left there ({problem.strerror}); free some or write elsewhere"
        )
    if problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return InputError(f"cannot write {path}: {problem.strerror}; write into a folder of yours")
    return InputError(f"cannot write {path}: {problem.strerror or problem}")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; when the block ends well, flush it to disk and rename it to ``path``.

    On any error the temporary file is removed and an earlier ``path`` is untouched; an `OSError` becomes an
    `InputError`.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part" + path.suffix)
        os.close(handle)
    except OSError as problem:
        raise write_error(path, problem) from problem
    temporary = Path(name)
    try:
        yield temporary
        _publish(temporary, path)
    except OSError as problem:
        raise write_error(path, problem) from problem
    finally:
        temporary.unlink(missing_ok=True)


def remove_parts(path: Path) -> None:
    """Remove what writers of ``path`` left that were killed; the caller is its only writer."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part{glob.escape(path.suffix)}"):
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make names that were added to a folder, or taken from it, last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(temporary: Path, path: Path) -> None:
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)  # mkstemp makes private files; an output is an ordinary one
    temporary.replace(path)
