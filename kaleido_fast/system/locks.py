"""One writer an output: an advisory lock that dies with its process and names the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from kaleido_fast.errors import InputError
from kaleido_fast.system.files import flush, follow, hidden, write_error

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def lock_path(path: Path) -> Path:
    """The hidden file that is locked while ``path`` is written: beside it, or beside what it leads to."""
    return hidden(follow(path), ".lock")


@contextlib.contextmanager
def output_lock(path: Path) -> Iterator[str]:
    """Hold the lock of an output; yields a random word that is in the lock's file as long as it is held.

    Raises:
        InputError: another process holds it (it is named), or the folder cannot be written.
    """
    place, token = lock_path(path), secrets.token_hex(8)
    try:
        handle = _acquire(path, place)
    except OSError as problem:
        raise write_error(path, problem) from problem
    try:
        _name_holder(handle, path, place.parent, token)
        yield token
    finally:
        with contextlib.suppress(OSError):
            place.unlink()
        os.close(handle)


def _name_holder(handle: int, path: Path, folder: Path, token: str) -> None:
    """Write into the lock's file which process holds it."""
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "token": token}
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(holder).encode(), 0)
        flush(handle, folder)
    except OSError as problem:
        raise write_error(path, problem) from problem


def read_token(path: Path) -> str | None:
    """The word in the lock's file of ``path`` as this machine sees it; None where there is none."""
    try:
        return str(json.loads(lock_path(path).read_text())["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _acquire(path: Path, place: Path) -> int:
    import fcntl

    while True:
        handle = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = _holder(handle)
            os.close(handle)
            raise InputError(
                f"output {path} is being written by {text}: wait for it, stop it, or write elsewhere"
            ) from None
        except OSError as problem:
            if problem.errno not in _NO_LOCKS:
                os.close(handle)
                raise
            warnings.warn(f"the file system of {path} has no locks: run one process at a time on it", stacklevel=4)
            return handle
        # Its last holder may have removed the file between our opening and our locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(place).st_ino == os.fstat(handle).st_ino:  # noqa: PTH116 - beside fstat
                return handle
        os.close(handle)


def _holder(handle: int) -> str:
    for _ in range(20):
        try:
            facts = json.loads(os.pread(handle, 4096, 0))
            return f"process {facts['pid']} on {facts['host']}"
        except (ValueError, KeyError, TypeError):
            time.sleep(0.05)  # it has the lock, and is about to write its name
    return "another process"
