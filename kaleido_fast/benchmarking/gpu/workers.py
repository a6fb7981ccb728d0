"""Processes that do jobs, one after the other: one that crashes or hangs costs its job, not the report."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import kaleido_fast
import kaleido_kernels
from kaleido_fast.benchmarking.gpu.jobs import Emit, Job, attempt

END = "end"
LAUNCHES = ("run", "emulate", "compile")
"""Launches of kernels run (on a GPU or in Triton's interpreter), run in the emulator, or are only compiled."""
Finished = Callable[[Job, dict[str, Any], str], None]
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


class ProcessWorker:
    """Does jobs in a process of its own, which is started when needed and replaced after any problem.

    After an illegal access every later call of CUDA fails in the process that made it, whatever it is asked to do.

    Args:
        environment: variables to set there.
        launches: one of `LAUNCHES`: what becomes of launches of kernels there.
    """

    def __init__(self, environment: Mapping[str, str], launches: str = "run") -> None:
        folders = [str(Path(module.__file__ or "").parent.parent) for module in (kaleido_fast, kaleido_kernels)]
        paths = [*folders, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)}
        self.launches = launches
        self.process: subprocess.Popen[str] | None = None

    def run(self, job: Job, seconds: float, emit: Emit) -> str:
        """See `Worker`."""
        until = time.monotonic() + seconds
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        except OSError:
            return self._crash()
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                self.close()
                return f"stopped after {seconds:.0f} s"
            if line is None:
                return self._crash()
            message = json.loads(line)
            if END in message:
                if message[END]:
                    self.close()
                return str(message[END])
            emit(message["value"])

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._errors.close()
            self.process = None

    def _running(self) -> subprocess.Popen[str]:
        if self.process is None:
            self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with the process
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, self.launches],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=self.environment,
            )
            self._lines: queue.Queue[str | None] = queue.Queue()
            threading.Thread(target=_read, args=(self.process, self._lines), daemon=True).start()
        return self.process

    def _crash(self) -> str:
        assert self.process is not None
        status = self.process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        self.close()
        return f"the process ended with status {status}" + (f": {lines[-1][:200]}" if lines else "")


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def run_jobs(
    jobs: Sequence[Job], workers: Sequence[Worker], until: float, finished: Finished, seconds: float = 150.0
) -> None:
    """Share jobs out among workers.

    Args:
        jobs: in the order of their start.
        workers: each does one at a time; they are closed at the end.
        until: `time.monotonic` when no further job is started, and those at work are stopped.
        finished: called for every job, by one thread at a time.
        seconds: most for one job.
    """
    waiting: queue.Queue[Job] = queue.Queue()
    for job in jobs:
        waiting.put(job)
    telling = threading.Lock()

    def work(worker: Worker) -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            last: dict[str, Any] = {}
            left = until - time.monotonic()
            problem = worker.run(job, min(left, seconds), last.update) if left > 0 else "not reached in time"
            with telling:
                finished(job, last, problem)

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers[: len(jobs)]]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for worker in workers:
            worker.close()


def _launching(how: str) -> contextlib.AbstractContextManager[object]:
    """Within it, launches of kernels are treated as ``how``, one of `LAUNCHES`, says."""
    if how == "run":
        return contextlib.nullcontext()
    from kaleido_kernels.emulation.driver import CompileOnly, Emulator, emulated

    return emulated(Emulator() if how == "emulate" else CompileOnly())


def main(launches: str) -> None:
    """Read jobs from standard input, one a line, and tell what they give on what was standard output."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print to standard output

    def tell(message: dict[str, Any]) -> None:
        told.write(json.dumps(message) + "\n")
        told.flush()

    with _launching(launches):
        for line in sys.stdin:
            tell({END: attempt(json.loads(line), lambda value: tell({"value": value}))})


if __name__ == "__main__":
    main(sys.argv[1])
