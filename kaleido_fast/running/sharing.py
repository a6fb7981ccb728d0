"""Several GPUs in one process: threads that take blocks of chains from one list and hand them to the first GPU."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from kaleido_fast.progress import Meter
from kaleido_fast.running.blocks import Run, run_blocks, split
from kaleido_fast.running.engine import build_phases
from kaleido_fast.running.phases import Phase
from kaleido_fast.running.result import ChainArrays
from kaleido_fast.system.devices import on_device

_POLL = 0.05  # seconds; a wait without end could not be interrupted on every system


def run_shared(run: Run, phases: list[Phase], meter: Meter, whole: ChainArrays, z0: Tensor | None) -> int:
    """Compute the chains of a run on all its devices at once; any division gives the bits of one device.

    Args:
        run: what to compute; ``run.device`` is the first device.
        phases: the engines of the first device.
        meter: counts progress, in the calling thread only.
        whole: filled; on the first device.
        z0: (n_chains, D) start states there, or None.

    Returns:
        The chain-steps run.
    """
    devices = (run.device, *run.others)
    engines = [phases, *(build_phases(run.subject, run.request, run.plan, device) for device in run.others)]
    shared = _SharedWork(run, whole, z0, _spans(run, len(devices)))
    threads = [
        threading.Thread(target=shared.work, args=(device, theirs), name=f"kaleido {device}", daemon=True)
        for device, theirs in zip(devices, engines, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        at_work = len(threads)
        while at_work:
            with contextlib.suppress(queue.Empty):
                counted = shared.done.get(timeout=_POLL)
                if counted is None:
                    at_work -= 1
                    continue
                meter.chains_done += counted[0]
                meter.add(counted[1])
    finally:
        shared.stopped = True
        for thread in threads:
            thread.join()
    shared.raise_failure()
    return shared.chain_steps


def _spans(run: Run, n_devices: int) -> Iterator[slice]:
    """Chains in parts of nearly equal size, at most a block each, as many for every device."""
    n = run.request.n_chains
    rounds = -(-n // (n_devices * run.plan.block_chains))
    return split(n, -(-n // (n_devices * rounds)))


class _StopError(Exception):
    """Unwinds a thread that is to stop."""


class _SharedWork:
    """What the threads share."""

    def __init__(self, run: Run, whole: ChainArrays, z0: Tensor | None, spans: Iterator[slice]) -> None:
        self.run, self.whole, self.z0 = run, whole, z0
        self.done: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()  # chains, steps; None at an end
        self.stopped = False
        self.chain_steps = 0
        self._spans, self._lock = spans, threading.Lock()
        self._failure: BaseException | None = None
        # Threads start with torch's defaults; these are the caller's.
        self._inference = torch.is_inference_mode_enabled()
        self._n_threads = torch.get_num_threads()
        devices = (run.device, *run.others)
        self._streams = [torch.cuda.current_stream(device) for device in devices if device.type == "cuda"]

    def work(self, device: torch.device, phases: list[Phase]) -> None:
        """One thread: take spans until there are none."""
        try:
            torch.set_num_threads(self._n_threads)
            with torch.inference_mode(self._inference), contextlib.ExitStack() as streams:
                for stream in self._streams:
                    streams.enter_context(torch.cuda.stream(stream))
                self._work_here(device, phases)
        except _StopError:
            pass
        except BaseException as problem:
            with self._lock:
                self._failure = self._failure or problem
            self.stopped = True
        finally:
            self.done.put(None)

    def _work_here(self, device: torch.device, phases: list[Phase]) -> None:
        here, relay = replace(self.run, device=device, others=()), _Relay(self)
        with on_device(device):
            for block in run_blocks(here, phases, self._take(), relay, z0=self.z0):
                for field in fields(ChainArrays):  # torch lets both devices' streams wait for a copy between them
                    getattr(self.whole, field.name)[block.rows].copy_(getattr(block.chains, field.name))
                with self._lock:
                    self.chain_steps += block.chain_steps

    def _take(self) -> Iterator[slice]:
        while not self.stopped:
            with self._lock:
                span = next(self._spans, None)
            if span is None:
                return
            yield span

    def raise_failure(self) -> None:
        """The first thread's error, in the caller's thread; not kept here, or it would keep itself alive."""
        failure, self._failure = self._failure, None
        try:
            if failure is not None:
                raise failure
        finally:
            del failure


class _Relay(Meter):
    """Counts for one thread, and passes the counts on to the caller's."""

    def __init__(self, shared: _SharedWork) -> None:
        super().__init__(shared.run.request.n_chains, shared.run.request.schedule.n_steps, None)
        self.shared = shared

    def add(self, chain_steps: int) -> None:
        if self.shared.stopped:
            raise _StopError
        super().add(chain_steps)
        self.shared.done.put((0, chain_steps))

    def finish(self, chains: int) -> None:
        super().finish(chains)
        self.shared.done.put((chains, 0))
