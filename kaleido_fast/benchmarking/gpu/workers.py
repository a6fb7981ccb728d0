"""Processes that do jobs, one after the other: one that crashes or hangs costs its job, not the report."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import kaleido_fast
import kaleido_kernels
from kaleido_fast.benchmarking.gpu.dispatch import attempt
from kaleido_fast.benchmarking.gpu.jobs import Emit, Job

VALUE, END = "value", "end"
END_SECONDS = 10.0  # for a process to end
LAUNCHES = ("run", "emulate", "compile")
"""Launches of kernels run (on a GPU or in Triton's interpreter), run in the emulator, or are only compiled."""
AnyJob = TypeVar("AnyJob", bound=Job)
Finished = Callable[[AnyJob, dict[str, Any], str], None]
"""Called with a job, what it gave (what it had so far, if it failed) and why it failed."""


class Worker(Protocol):
    """Something that does a job at a time."""

    def run(self, job: Job, seconds: float, emit: Emit) -> str:
        """Do a job within some seconds; returns why it failed, or nothing."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class HereWorker:
    """Does jobs in this process, for tests."""

    def run(self, job: Job, seconds: float, emit: Emit) -> str:
        """See `Worker`; the time is not enforced."""
        return attempt(job, emit)

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class _Started:
    """A process that runs, what it answers line by line (None: no more), and where its errors go."""

    process: subprocess.Popen[str]
    answers: queue.Queue[str | None]
    errors: IO[str]

    def read(self) -> None:
        """Take its answers until it ends; runs in a thread."""
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                self.answers.put(line)
        finally:
            self.answers.put(None)
            self.process.stdout.close()

    def status(self) -> str:
        """How it ended; one that does not end has only stopped to answer."""
        try:
            return f"the process ended with status {self.process.wait(END_SECONDS)}"
        except subprocess.TimeoutExpired:
            return "the process gave no answer that can be read"

    def last_words(self) -> str:
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        return f": {lines[-1][:200]}" if lines else ""

    def end(self) -> None:
        """Kill it and what it started, compilers above all; one that the driver holds is left after some seconds."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.errors.close()


class ProcessWorker:
    """Does jobs in a process of its own, which is started when needed and replaced after any problem.

    After an illegal access every later call of CUDA fails in the process that made it, whatever it is asked to do.
    The process leads a group of its own, so that what it starts ends with it.

    Args:
        environment: variables to set there.
        launches: one of `LAUNCHES`: what becomes of launches of kernels there.
    """

    def __init__(self, environment: Mapping[str, str], launches: str = "run") -> None:
        folders = [str(Path(module.__file__ or "").parent.parent) for module in (kaleido_fast, kaleido_kernels)]
        paths = [*folders, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)}
        self.launches = launches
        self._started: _Started | None = None
        self._lock = threading.Lock()  # held to start or end a process: `close` may come from another thread than `run`

    def run(self, job: Job, seconds: float, emit: Emit) -> str:
        """See `Worker`."""
        until = time.monotonic() + seconds
        started = self._running()
        assert started.process.stdin is not None
        try:
            started.process.stdin.write(json.dumps(job) + "\n")
            started.process.stdin.flush()
        except (OSError, ValueError):  # ValueError: `close` came first
            return self._crash(started)
        while True:
            try:
                line = started.answers.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                self.close()
                return f"stopped after {seconds:.0f} s"
            message = _message(line)
            if message is None:
                return self._crash(started)
            if END in message:
                if message[END]:
                    self.close()
                return str(message[END])
            emit(message[VALUE])

    def close(self) -> None:
        """End the process and all that it started; a job at work fails."""
        with self._lock:
            if self._started is not None:
                self._started.end()
                self._started = None

    def _running(self) -> _Started:
        with self._lock:
            if self._started is None:
                errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with the process
                process = subprocess.Popen(
                    [sys.executable, "-m", __name__, self.launches],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    errors="replace",
                    env=self.environment,
                    start_new_session=True,
                )
                self._started = _Started(process, queue.Queue(), errors)
                threading.Thread(target=self._started.read, daemon=True).start()
            return self._started

    def _crash(self, started: _Started) -> str:
        with self._lock:
            if self._started is not started:
                return "its worker was closed"
            problem = started.status() + started.last_words()
            started.end()
            self._started = None
            return problem


def _message(line: str | None) -> dict[str, Any] | None:
    """What a process answered; None if that cannot be read, as of one that died in the middle of a line."""
    try:
        message = json.loads(line or "")
    except ValueError:
        return None
    return message if isinstance(message, dict) and message.keys() & {END, VALUE} else None


def run_jobs(
    jobs: Sequence[AnyJob], workers: Sequence[Worker], until: float, finished: Finished[AnyJob], seconds: float = 150.0
) -> None:
    """Share jobs out among workers.

    Args:
        jobs: in the order of their start.
        workers: each does one at a time; they are closed at the end.
        until: `time.monotonic` when no further job is started, and those at work are stopped.
        finished: called for every job, by one thread at a time.
        seconds: most for one job.

    Raises:
        BaseException: whatever ``finished`` or a worker raised, or KeyboardInterrupt. No further job was started or
            reported, and the workers are closed.
    """
    waiting = deque(jobs)
    telling, stopped = threading.Lock(), threading.Event()
    ended: queue.Queue[BaseException | None] = queue.Queue()

    def work(worker: Worker) -> None:
        while not stopped.is_set():
            try:
                job = waiting.popleft()
            except IndexError:
                return
            last: dict[str, Any] = {}
            left = until - time.monotonic()
            problem = worker.run(job, min(left, seconds), last.update) if left > 0 else "not reached in time"
            with telling:
                if not stopped.is_set():
                    finished(job, last, problem)

    def work_to_the_end(worker: Worker) -> None:
        try:
            work(worker)
        except BaseException as problem:  # a thread has no caller: it is raised below
            stopped.set()
            ended.put(problem)
        else:
            ended.put(None)

    threads = [threading.Thread(target=work_to_the_end, args=(worker,), daemon=True) for worker in workers[: len(jobs)]]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            problem = _get(ended)
            if problem is not None:
                raise problem
    finally:
        stopped.set()
        _close(workers, threads)


def _get(ended: queue.Queue[BaseException | None]) -> BaseException | None:
    """The next one, looked for now and then: a wait without a limit slept through Ctrl-C on a busy machine."""
    while True:
        with contextlib.suppress(queue.Empty):
            return ended.get(timeout=0.2)


def _close(workers: Sequence[Worker], threads: Sequence[threading.Thread]) -> None:
    """Close workers until no thread is left: one that had just taken its job may start a process after the first time.

    A worker that cannot be closed is waited for.
    """
    while True:
        for worker in workers:
            worker.close()
        if not any(thread.is_alive() for thread in threads):
            return
        time.sleep(0.05)


def _launching(how: str) -> contextlib.AbstractContextManager[object]:
    """Within it, launches of kernels are treated as ``how``, one of `LAUNCHES`, says."""
    if how == "run":
        return contextlib.nullcontext()
    from kaleido_kernels.proving.emulation.driver import CompileOnly, Emulator, emulated

    return emulated(Emulator() if how == "emulate" else CompileOnly())


def main(launches: str) -> None:
    """Read jobs from standard input, one a line, and write their answers to what was standard output.

    When standard input ends, so does this process, in the middle of a job too.
    """
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print to standard output
    lines: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_take, args=(lines,), daemon=True).start()

    def tell(message: dict[str, Any]) -> None:
        told.write(json.dumps(message) + "\n")
        told.flush()

    with _launching(launches):
        while True:
            tell({END: attempt(json.loads(lines.get()), lambda value: tell({VALUE: value}))})


def _take(lines: queue.Queue[bytes]) -> None:
    """Take jobs; when the process that gives them has ended, end this one and what it started."""
    with open(0, "rb", buffering=0, closefd=False) as given:  # a buffer's lock would be held in what peers fork
        for line in given:
            lines.put(line)
    if os.getpgrp() == os.getpid():  # as `ProcessWorker` starts it
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
