"""How far work is: what callbacks get."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class SampleProgress:
    """Handed to ``callback``: how far a run is."""

    chains_done: int
    n_chains: int
    chain_steps_done: int
    chain_steps: int
    seconds: float


Callback = Callable[[SampleProgress], None]


class Meter:
    """Counts chain-steps and tells the callback, at most ten times a second."""

    def __init__(self, n_chains: int, n_steps: int, callback: Callback | None, chains_done: int = 0) -> None:
        self.n_chains, self.n_steps, self.callback = n_chains, n_steps, callback
        self.total = n_chains * n_steps
        self.chains_done = chains_done
        self.done = chains_done * n_steps
        self.began = self.reported = time.perf_counter()

    def add(self, chain_steps: int) -> None:
        self.done += chain_steps
        now = time.perf_counter()
        if self.callback is not None and (now - self.reported > 0.1 or self.done >= self.total):
            self.reported = now
            self.callback(SampleProgress(self.chains_done, self.n_chains, self.done, self.total, now - self.began))

    def finish(self, chains: int) -> None:
        """Count this many more chains as done, including the steps that they did not need."""
        self.chains_done += chains
        self.add(self.chains_done * self.n_steps - self.done)

    def seconds(self) -> float:
        return time.perf_counter() - self.began


@dataclass(frozen=True)
class HistoryEntry:
    """One evaluation: ``loss`` is the mean over the training batches since the last one, ``held_out`` the measure by
    which the best weights are kept (`kaleido_fast.training.objective.held_out_measure`)."""

    attempt: int
    step: int
    loss: float
    held_out: float
    learning_rate: float


@dataclass(frozen=True)
class TrainingProgress:
    """What a callback gets after every step; ``last`` is the latest evaluation, if there was one."""

    attempt: int
    step: int
    steps: int
    learning_rate: float
    seconds_left: float
    last: HistoryEntry | None
