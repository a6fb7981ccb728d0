"""Threads that help with a call and stay for the next one.

A new thread takes 50 microseconds to begin, and on a machine with other work one in ten takes 3 ms, as it waits behind
whatever runs; one that waits for work begins within 13 (measured on two cores, load 3). None is started by an import.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

_MOST = 4096  # more than are ever wanted: no call waits for the threads of another


class _Crew:
    """The threads of this process; a forked process has none of them and starts its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Let a waiting thread do ``work``, or a new one where none waits."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_MOST, thread_name_prefix="helper-kaleido", initializer=_neutral)
            return self._pool.submit(work)


_crew = _Crew()


def _forget() -> None:
    global _crew
    _crew = _Crew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def helped(work: Callable[[], None], helpers: int) -> Iterator[Callable[[], None]]:
    """Run ``work`` in some threads while the block does its own part, on the cores that the calling thread may use.

    The block gets a function that waits for the threads and raises what one of them raised; it is called at the latest
    when the block is left. Threads that have not begun by then never do: nothing may be left to take. Where the system
    gives no more threads, fewer help.

    Args:
        work: the same in each thread; it returns when there is nothing left, and soon after the block has failed.
        helpers: number of threads.
    """
    mask = _mask()

    def placed() -> None:
        _move_to(mask)
        work()

    others: list[Future[None]] = []

    def finish() -> None:
        begun = [other for other in others if not other.cancel()]
        wait(begun)
        for other in begun:
            other.result()

    try:
        with contextlib.suppress(RuntimeError):  # no new thread can be started
            for _ in range(helpers):
                others.append(_crew.submit(placed))
        yield finish
    except BaseException:
        wait([other for other in others if not other.cancel()])
        raise
    finish()


def _neutral() -> None:
    """A thread begins with its parent's handling of tiny numbers, which may be any by chance: keep them."""
    torch.set_flush_denormal(False)


def _mask() -> set[int] | None:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def _move_to(mask: set[int] | None) -> None:
    if mask is not None and mask != _mask():
        with contextlib.suppress(OSError):  # a core that was taken away meanwhile
            os.sched_setaffinity(0, mask)
