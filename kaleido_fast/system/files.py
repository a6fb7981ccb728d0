"""Files that appear under their final name only when they are whole.

A name that is a link stays one: what it leads to is written.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from kaleido_fast.errors import InputError

_LONGEST_TAIL = 48  # bytes that `hidden` and `partial` names add at most, with an ending
_LONGEST_INSIDE = 96  # bytes of a path inside a store, with its temporary's tail
_USUAL_LIMIT = 255  # bytes of a name, on file systems that do not say
# What file systems answer that have no such operation: old network mounts, buckets, FUSE.
_NOT_THERE = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM)


def follow(path: Path) -> Path:
    """What a link leads to, whether it exists or not; any other path as it is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def check_writable(path: Path) -> None:
    """Refuse an output path that cannot be written, before any work is done.

    Raises:
        InputError: the path is a folder or a device, its name is too long, its folder does not exist, or one of them
            is not writable.
    """
    if os.path.isdir(path):  # noqa: PTH112 - false, not an error, for names that are too long
        raise InputError(f"output {path} is a folder: give a file name, for example {path / 'samples.npy'}")
    check_folder(path)
    target = follow(path)
    if not target.exists():
        return
    if not target.is_file():  # renaming a file to it would put the file in the place of a device
        raise InputError(f"output {path} is neither a file nor a folder: give a file name")
    if not os.access(target, os.W_OK):
        raise InputError(f"output {path} is read-only: choose another name or make it writable")
    folder, here = target.parent.stat(), os.geteuid() if hasattr(os, "geteuid") else 0
    if folder.st_mode & stat.S_ISVTX and here not in (0, folder.st_uid, target.stat().st_uid):
        raise InputError(f"output {path} is another user's, and only that user may replace it: choose another")


def check_folder(path: Path) -> None:
    """Refuse an output path whose folder does not exist or cannot be written, or whose name is too long.

    Raises:
        InputError: the path is one of these.
    """
    check_name(path)
    target = follow(path)
    if target != path:
        check_name(target)
    folder = target.parent
    if not folder.exists():
        raise InputError(f"output folder {folder} does not exist: create it or write elsewhere")
    if not folder.is_dir():
        raise InputError(f"output folder {folder} is not a folder: give a path inside a folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise write_error(path, problem) from problem


def check_room(path: Path, n_bytes: int) -> None:
    """Refuse an output of ``n_bytes`` that its disk cannot hold now.

    Raises:
        InputError: the disk has less.
    """
    free = shutil.disk_usage(follow(path).parent).free
    if n_bytes > free:
        raise InputError(
            f"output {path} needs {n_bytes:,} bytes, {free:,} are free there: free some or write elsewhere"
        )


def check_name(path: Path) -> None:
    """Refuse a path that the file system cannot hold, also with what is added to it while it is written.

    Raises:
        InputError: the name is too long, or is none.
    """
    if "\0" in str(path):
        raise InputError(f"output {str(path)!r} holds a zero byte: give another name")
    if path.name in ("", ".."):
        raise InputError(f"output {path} is a folder: give a name inside of it")
    size, limit = len(os.fsencode(path.name)), _name_limit(path.parent)
    if size > limit:
        raise InputError(f"the name of output {path} has {size} bytes, {limit} is the most there: give a shorter one")
    try:
        for place in (path, hidden(path, "." * (_LONGEST_TAIL - 1)), path / ("x" * _LONGEST_INSIDE)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                place.lstat()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except OSError as problem:
        if problem.errno == errno.ELOOP:
            raise InputError(f"output {path} is a link that leads to itself: remove it or give another name") from None
        if problem.errno == errno.ENAMETOOLONG:
            size = len(os.fsencode(path.absolute()))
            raise InputError(
                f"the path of output {path} is too long, with {size} bytes: write into a folder nearer to the root"
            ) from None
        raise write_error(path, problem) from problem


def _name_limit(folder: Path) -> int:
    """Most bytes of a name in a folder."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):
        return _USUAL_LIMIT


def hidden(path: Path, tail: str) -> Path:
    """A hidden name beside ``path`` for what lives while it is written: the path's own name with ``tail``, or, where
    that could become too long, a digest of the name."""
    return path.with_name(f".{_short_name(path)}{tail}")


def partial(path: Path) -> Path:
    """A name beside ``path`` for what is kept of it while it is unfinished."""
    return path.with_name(f"{_short_name(path)}.partial")


def _short_name(path: Path) -> str:
    name = os.fsencode(path.name)
    return path.name if len(name) + _LONGEST_TAIL <= _name_limit(path.parent) else hashlib.sha256(name).hexdigest()[:32]


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
    """Yield a temporary path beside ``path``; when the block ends well, flush it to disk and rename it to ``path``.

    On any error the temporary file is removed and an earlier ``path`` is untouched; an `OSError` becomes an
    `InputError`. Where ``path`` is a link, it stays, and what it leads to is written.
    """
    target = follow(path)
    try:
        temporary = _new_file(target)
        mode = stat.S_IMODE(temporary.stat().st_mode)
    except OSError as problem:
        raise write_error(path, problem) from problem
    try:
        yield temporary
        with temporary.open("rb+") as file:
            flush(file.fileno(), target.parent)
        _restore_mode(temporary, mode)
        temporary.replace(target)
    except OSError as problem:
        raise write_error(path, problem) from problem
    finally:
        temporary.unlink(missing_ok=True)


def _new_file(target: Path) -> Path:
    """An empty file with a hidden name beside ``target``, its mode by the umask."""
    while True:
        temporary = hidden(target, f".{secrets.token_hex(4)}.part{_part_suffix(target)}")
        with contextlib.suppress(FileExistsError):
            os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666))
            return temporary


def _restore_mode(path: Path, mode: int) -> None:
    """Undo a change of mode: safetensors makes its files private. Where modes cannot be changed, as in buckets, the
    file system has its own."""
    if stat.S_IMODE(path.stat().st_mode) != mode:
        try:
            path.chmod(mode)
        except OSError as problem:
            if problem.errno not in _NOT_THERE:
                raise


def _part_suffix(target: Path) -> str:
    """The ending of a temporary: programs such as ffmpeg go by it."""
    return target.suffix if len(os.fsencode(target.suffix)) <= 16 else ""


def remove_parts(path: Path) -> None:
    """Remove what writers of ``path`` left that were killed; the caller is its only writer."""
    target = follow(path)
    begin = hidden(target, "").name
    for part in target.parent.glob(f"{glob.escape(begin)}.*.part{glob.escape(_part_suffix(target))}"):
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make names that were added to a folder, or taken from it, last through a power cut, where that can be done."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):
        return  # a folder that may be written and not listed, or a system that opens none
    try:
        flush(handle, folder)
    finally:
        os.close(handle)


def flush(handle: int, folder: Path) -> None:
    """Bring an open file of a folder, or the folder, to disk; where that cannot be done, a warning says so."""
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno not in _NOT_THERE:
            raise
        warnings.warn(
            f"the file system of {folder} does not flush what is written: after a power cut some may be missing",
            stacklevel=2,
        )
