"""A contestant in a process of its own, which uses no core between its turns.

Libraries keep their threads spinning after a call, ONNX Runtime's for some 20 ms. Their process is stopped (SIGSTOP) as
soon as it has answered, and goes on (SIGCONT) when it is asked again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kaleido_fast.benchmarking.environment import child_environment
from kaleido_fast.benchmarking.host import Built, Entry, Work
from kaleido_fast.errors import InputError

CAN_STOP = hasattr(signal, "SIGSTOP") and hasattr(os, "killpg")
_MODULE = "kaleido_fast.benchmarking.child"
_START_SECONDS = 120.0
_END_SECONDS = 5.0


class LostError(InputError):
    """The process of a contestant has ended, or did not answer in time; it was then ended."""


class StateFiles:
    """Tensors in files of a folder, one for each.

    Args:
        folder: which its owner removes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: list[tuple[Tensor, Path]] = []

    def path(self, states: Tensor) -> Path:
        """The file of a tensor, written when it is first asked for."""
        for known, path in self._held:
            if known is states:
                return path
        path = self._folder / f"states{len(self._held)}.pt"
        torch.save(states.contiguous().clone(), path)  # of a slice the whole would be written
        self._held.append((states, path))
        return path

    def clear(self) -> None:
        """Remove all."""
        for _, path in self._held:
            path.unlink(missing_ok=True)
        self._held = []


class Apart:
    """A `kaleido_fast.benchmarking.host.Host` in another process: the same calls.

    The process is started at once and loads its libraries while others do; the first call waits for it.

    Args:
        name: of the contestant.
        folder: for its error output.
        files: of states that it is to read.
        seconds: after which an answer is no longer waited for, and the process ended.
    """

    def __init__(self, name: str, folder: Path, files: StateFiles, seconds: float) -> None:
        self.name, self._files, self._seconds = name, files, seconds
        self._errors = folder / f"{name}.{os.urandom(4).hex()}.errors"
        self._answers: queue.Queue[tuple[bool, Any] | None] = queue.Queue()
        self._ready = self._closed = False
        with self._errors.open("wb") as errors:  # a file: nobody reads it until the end, and a full pipe blocks
            self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=child_environment({"NPROC": str(torch.get_num_threads())}),  # JAX asks nobody else for its threads
                start_new_session=True,  # what it starts is stopped and ended with it; Ctrl-C is not told to it
            )
        threading.Thread(target=self._listen, name=f"answers of {name}", daemon=True).start()

    @property
    def pid(self) -> int:
        """The process that does the work."""
        return self._process.pid

    def wait(self) -> None:
        """Until the process has loaded its libraries; it is stopped from then on."""
        if not self._ready and not self._closed:
            self._receive(_START_SECONDS)
            self._ready = True

    def build(self, entry: Entry, work: Work) -> Built:
        """See `Host`."""
        return self._ask("build", entry, work)

    def check(self, z0: Tensor, expected: list[Tensor]) -> dict[str, Any]:
        """See `Host`."""
        return self._ask("check", self._files.path(z0), [self._files.path(states) for states in expected])

    def time(self, n_steps: int) -> float:
        """See `Host`."""
        return self._ask("time", n_steps)

    def forget(self) -> None:
        """See `Host`; nothing where the process is gone."""
        with contextlib.suppress(LostError):
            self._ask("forget")

    def close(self) -> None:
        """End the process and all that it started."""
        if self._closed:  # its number may be another process's by now
            return
        self._closed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if CAN_STOP:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # of what it no longer read
            self._process.stdin.close()

    def _ask(self, what: str, *args: Any) -> Any:
        self.wait()
        if self._closed:
            raise LostError(self._obituary())
        self._signal("SIGCONT")
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: `_listen` notices too
            pickle.dump((what, args), self._process.stdin)  # some hundred bytes: never more than a pipe holds
            self._process.stdin.flush()
        return self._receive(self._seconds)

    def _receive(self, seconds: float) -> Any:
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise LostError(f"gave no answer for {seconds:g} s: its process was ended") from None
        if answer is None:
            self._let_end(_END_SECONDS)  # how it ended by itself is the reason to be told
            self.close()
            raise LostError(self._obituary())
        self._signal("SIGSTOP")
        right, value = answer
        if not right:
            raise InputError(value)
        return value

    def _let_end(self, seconds: float) -> None:
        """Give the process time to end; it is not reaped, so that its number stays its own until `close`."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if hasattr(os, "waitid") and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.01)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            while True:
                try:
                    self._answers.put(pickle.load(answers))
                except Exception:  # the end of the pipe, in the middle of an answer too
                    self._answers.put(None)
                    return

    def _signal(self, name: str) -> None:
        if CAN_STOP and not self._closed:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has just ended: the pipe tells
                os.killpg(self._process.pid, getattr(signal, name))

    def _obituary(self) -> str:
        status = self._process.returncode
        how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return f"its process ended {how}" + (f": {lines[-1].strip()}" if lines else "")
