"""Who holds the contestants of a run: on a CPU a process for each, elsewhere this process for all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from kaleido_fast.benchmarking.apart import Apart, LostError, StateFiles
from kaleido_fast.benchmarking.faults import DeviceLostError, device_answers
from kaleido_fast.benchmarking.host import Built, Entry, Host, Work
from kaleido_fast.model import KaleidoMLP

PATIENCE = {True: 180.0, False: 1200.0}  # by quick: seconds for one answer, such as building or a timing


class Holder(Protocol):
    """Holds one contestant: see `kaleido_fast.benchmarking.host.Host`."""

    @property
    def pid(self) -> int: ...

    def build(self, entry: Entry, work: Work) -> Built: ...

    def check(self, z0: Tensor, expected: list[Tensor]) -> dict[str, Any]: ...

    def time(self, n_steps: int) -> float: ...

    def forget(self) -> None: ...

    def close(self) -> None: ...


class Crew:
    """Holders by the name of their contestant; leaving it ends every process.

    On a GPU the contestants share this process: what its threads do between turns takes nothing from the GPU, and each
    process would hold some hundred megabytes of its memory.

    Args:
        device: of the contestants.
        apart: whether each has a process of its own.
        patience: seconds after which an answer is no longer waited for.
    """

    def __init__(self, device: torch.device, *, apart: bool, patience: float) -> None:
        self._device, self._apart, self._patience = device, apart, patience
        self._holders: dict[str, Holder] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="kaleido-fast-bench-"))
        self._files = StateFiles(self._folder)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: object, trace: TracebackType | None) -> None:
        try:
            for holder in self._holders.values():
                holder.close()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, names: Iterable[str]) -> None:
        """Start processes that load their libraries beside each other, and wait for all."""
        if not self._apart:
            return
        begun = [self._start(name) for name in names]
        for one in begun:
            with contextlib.suppress(LostError):  # told to whoever asks it
                one.wait()

    def _start(self, name: str) -> Apart:
        holder = Apart(name, self._folder, self._files, self._patience)
        self._holders[name] = holder
        return holder

    def holder(self, name: str, model: KaleidoMLP | None) -> Holder:
        """The holder of a contestant, started where there is none."""
        if not self._apart:
            self._holders.setdefault(name, Host(model))
        elif name not in self._holders:
            self._start(name)
        return self._holders[name]

    def pids(self) -> list[int]:
        """Processes beside this one."""
        return [holder.pid for holder in self._holders.values()] if self._apart else []

    def blame(self, name: str, problem: Exception) -> None:
        """After a contestant failed: end its process if it is lost.

        Raises:
            DeviceLostError: it took the device with it; all that follows would fail too, and would be blamed for it.
        """
        if isinstance(problem, LostError):
            self._holders.pop(name).close()
        elif not self._apart and not device_answers(self._device):
            raise DeviceLostError(name, problem) from problem

    def forget(self) -> None:
        """Before another network: no contestant is held any more."""
        for holder in self._holders.values():
            holder.forget()
        if not self._apart:
            self._holders.clear()  # they hold the model
        self._files.clear()
