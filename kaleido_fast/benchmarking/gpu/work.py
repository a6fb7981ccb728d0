"""A network at work: the time that is left, what is known, what failed."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

import torch

from kaleido_fast.benchmarking.contest import one_line
from kaleido_fast.benchmarking.faults import DeviceLostError, device_answers
from kaleido_fast.benchmarking.gpu.jobs import Emit, NetworkJob
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.planning.facts import DeviceFacts

NO_TIME = "no time was left for it"


@dataclass
class Work:
    """One network on one device, and what is known of it so far.

    Args:
        job: what was asked.
        record: what is known, also from a process before this one; ``at_work`` in it names what a process that dies
            was doing, ``failed`` what is not begun again.
        emit: hands the record on.
    """

    job: NetworkJob
    model: KaleidoMLP
    device: torch.device
    facts: DeviceFacts
    began: float
    record: dict[str, Any]
    emit: Emit

    @property
    def n_chains(self) -> int:
        return int(self.job["n_chains"])

    def left(self, share: float = 1.0) -> float:
        """Seconds until a share of the job's time is over."""
        return self.began + share * self.job["seconds"] - time.monotonic()

    def begin(self, what: str) -> None:
        """Note what is begun, in case this process dies in it; "" when it is done."""
        self.record["at_work"] = what
        self.emit(self.record)

    def fail(self, what: str, problem: BaseException) -> None:
        """Keep why something failed, so that it is not begun again.

        Raises:
            DeviceLostError: this process can do no more; another one shall go on.
        """
        self.record["at_work"] = what
        self.record["failed"][what] = one_line(problem)
        if not device_answers(self.device):
            self.emit(self.record)
            raise DeviceLostError(what, problem) from problem


def release(device: torch.device) -> None:
    """Return memory to the device: plans ask the device, not torch, what is free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
