"""Threads that help with a call and stay for the next one.

A new thread takes 50 microseconds to begin, and on a machine with other work one in ten takes 3 ms, as it waits behind
whatever runs; one that waits for work begins within 13 (measured on two cores, load 3). None is started by an import.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass

import torch


class _Worker:
    """A thread that does what is put into its own slot, one piece after the other, and waits in between."""

    def __init__(self, rest: Callable[[_Worker], None]) -> None:
        self._rest = rest
        self._slot: queue.SimpleQueue[tuple[Future[None], Callable[[], None]]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="helper-kaleido", daemon=True).start()

    def take(self, future: Future[None], work: Callable[[], None]) -> None:
        """Do ``work`` next."""
        self._slot.put((future, work))

    def _serve(self) -> None:
        torch.set_flush_denormal(False)  # a thread begins with its parent's handling of tiny numbers: any by chance
        while True:
            self._do(*self._slot.get())

    def _do(self, future: Future[None], work: Callable[[], None]) -> None:
        if not future.set_running_or_notify_cancel():  # who cancelled it has let this thread rest already
            return
        problem: BaseException | None = None
        try:
            work()
        except BaseException as raised:  # it is told to whoever waits
            problem = raised
        self._rest(self)  # before the caller hears of the end: its next call finds this thread
        if problem is None:
            future.set_result(None)
        else:
            future.set_exception(problem)


class _Crew:
    """The threads of this process; a forked process has none of them and starts its own."""

    def __init__(self) -> None:
        self._resting: list[_Worker] = []  # a list's append and pop are one step of the interpreter each

    def submit(self, work: Callable[[], None]) -> _Job:
        """Let a waiting thread do ``work``, or a new one where none waits.

        Raises:
            RuntimeError: the system gives no more threads; nothing is left behind.
        """
        try:
            worker = self._resting.pop()
        except IndexError:
            worker = _Worker(self._resting.append)
        job = _Job(Future(), worker, self._resting.append)
        worker.take(job.future, work)
        return job


@dataclass(frozen=True)
class _Job:
    """Work that a thread was given.

    Args:
        future: its end.
        worker: the thread.
        rest: takes a thread that has nothing to do.
    """

    future: Future[None]
    worker: _Worker
    rest: Callable[[_Worker], None]

    def has_begun(self) -> bool:
        """Whether it has; else it never will, and the thread may be given other work before it has woken up."""
        if not self.future.cancel():
            return True
        self.rest(self.worker)
        return False


_crew = _Crew()


def _forget() -> None:
    global _crew
    _crew = _Crew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def helped(
    work: Callable[[], None], helpers: int, stop: Callable[[], None] = lambda: None
) -> Iterator[Callable[[], None]]:
    """Run ``work`` in some threads while the block does its own part, on the cores that the calling thread may use.

    The block gets a function that waits for the threads and raises what one of them raised; it is called at the latest
    when the block is left. Threads that have not begun by then never do: nothing may be left to take. Where the system
    gives no more threads, fewer help.

    Args:
        work: the same in each thread; it returns when there is nothing left, and soon after ``stop``.
        helpers: number of threads.
        stop: called where the block fails, or is interrupted before it begins.
    """
    mask = cores_allowed()

    def placed() -> None:
        move_to(mask)
        work()

    given: list[_Job] = []
    begun: list[_Job] = []

    def ended() -> list[_Job]:
        while given:
            job = given.pop()
            if job.has_begun():
                begun.append(job)
        wait([job.future for job in begun])
        return begun

    def finish() -> None:
        for job in ended():
            job.future.result()

    try:
        with contextlib.suppress(RuntimeError):  # no new thread can be started
            for _ in range(helpers):
                given.append(_crew.submit(placed))
        yield finish
    except BaseException:
        stop()
        ended()
        raise
    finish()


def cores_allowed() -> set[int] | None:
    """Cores that the calling thread may use; None where the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def current_core() -> int:
    """The core that the calling thread runs on; -1 where the system does not say."""
    if sys.platform != "linux":
        return -1
    return int(ctypes.CDLL(None).sched_getcpu())


def move_to(mask: set[int] | None) -> None:
    """Let the calling thread use these cores; None changes nothing."""
    if mask is not None and mask != cores_allowed():
        with contextlib.suppress(OSError):  # a core that was taken away meanwhile
            os.sched_setaffinity(0, mask)
