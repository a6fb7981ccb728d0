"""What holds one contestant: builds it, checks it, takes its time. In this process, or in one of its own (`apart`)."""

from __future__ import annotations

import gc
import math
import os
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kaleido_fast.benchmarking import ceiling
from kaleido_fast.benchmarking.cases import BenchNetwork
from kaleido_fast.benchmarking.contest import Contestant, check_contestant, engine_contestant
from kaleido_fast.benchmarking.peers import Peer, Setting, build_peer, forget_compiled
from kaleido_fast.benchmarking.timing import Timed, stopwatch
from kaleido_fast.model import KaleidoMLP

CEILING = "ceiling"
CEILING_SECONDS = 0.3  # of products in one timing on a CPU, where one takes 10 to 200 ms
CEILING_PRODUCTS = 30  # at most


@dataclass(frozen=True)
class Entry:
    """A contestant as plain values, which can be told to another process.

    Args:
        name: in tables.
        precision: of the operands of products.
        peer: None for an engine of this name, and for the ceiling.
    """

    name: str
    precision: str
    peer: Peer | None = None

    @property
    def kind(self) -> str:
        """ "engine", "peer" or "ceiling"."""
        return "peer" if self.peer else CEILING if self.name == CEILING else "engine"


@dataclass(frozen=True)
class Work:
    """What all contestants of a network are given.

    Args:
        network: to build.
        n_chains: rows of every call.
        device: of torch.
        threads: CPU threads that each may use.
        quick: whether to spend little time on finding the best variant.
    """

    network: BenchNetwork
    n_chains: int
    device: str
    threads: int
    quick: bool


@dataclass(frozen=True)
class Built:
    """What is known of a contestant once it is built.

    Args:
        seconds: that building took.
        precision: of its operands; says how much rounding is allowed for.
        proof_request: options of the reference's run that it must reproduce.
        flops: floating-point operations of one timing; of the ceiling only.
    """

    seconds: float
    precision: str
    proof_request: dict[str, Any] = field(default_factory=dict)
    flops: int = 0


class Host:
    """Holds one contestant at a time.

    Args:
        model: the network where this process has it already; else each contestant gets one of its own.
    """

    def __init__(self, model: KaleidoMLP | None = None) -> None:
        self._model = model
        self._device = torch.device("cpu")
        self._contestant: Contestant | None = None
        self._ceiling: Timed | None = None
        self._z0: Tensor | None = None
        self._n_layers = 0

    def build(self, entry: Entry, work: Work) -> Built:
        """Build a contestant in place of the one before."""
        self.forget()
        self._device = torch.device(work.device)
        if torch.get_num_threads() != work.threads:
            torch.set_num_threads(work.threads)
        if entry.kind == CEILING:
            return self._build_ceiling(entry)
        model = self._model
        if model is None:
            model = work.network.model().requires_grad_(False).to(self._device)
        self._n_layers = model.spec.n_layers
        began = time.perf_counter()
        if entry.peer is None:
            self._contestant = engine_contestant(model, entry.name, entry.precision, self._device)
        else:
            forget_compiled([entry.peer])
            setting = Setting(model, work.n_chains, self._device, work.threads, work.quick)
            self._contestant = build_peer(entry.peer, setting)
        seconds = time.perf_counter() - began
        return Built(seconds, self._contestant.precision, dict(self._contestant.proof_request))

    def _build_ceiling(self, entry: Entry) -> Built:
        products = ceiling.repeats(self._device)
        if self._device.type == "cpu":
            one = ceiling.ceiling_run(entry.precision, self._device, products=1)
            one()  # the first one starts threads
            seconds = max(1e-4, stopwatch(self._device)(one))
            products = min(CEILING_PRODUCTS, math.ceil(CEILING_SECONDS / seconds))
        self._ceiling = ceiling.ceiling_run(entry.precision, self._device, products=products)
        self._ceiling()
        return Built(0.0, entry.precision, flops=ceiling.FLOPS * products)

    def check(self, z0: Tensor, expected: list[Tensor]) -> dict[str, Any]:
        """Compare with the reference's states; how far it is from them.

        Args:
            z0: where timings start, (n, D).
            expected: the reference's states of the first of these chains, or of all.

        Raises:
            WrongStatesError: the contestant computes something else.
        """
        assert self._contestant is not None, "check comes after build"
        rows = len(expected[0])
        deviation = check_contestant(self._contestant, z0[:rows], expected, self._n_layers)
        if self._contestant.proof is not None or rows < len(z0):  # what is timed has not run yet
            self._contestant.run(z0, 1)
        self._z0 = z0
        return deviation.record()

    def time(self, n_steps: int) -> float:
        """Seconds of ``n_steps`` steps, or of the products of the ceiling."""
        if self._ceiling is not None:
            return stopwatch(self._device)(self._ceiling)
        assert self._contestant is not None and self._z0 is not None, "time comes after check"
        return stopwatch(self._device)(self._contestant.timed(self._z0, n_steps))

    def forget(self) -> None:
        """Give back what the contestant holds."""
        self._contestant = self._ceiling = self._z0 = None
        gc.collect()

    @property
    def pid(self) -> int:
        """The process that does the work."""
        return os.getpid()

    def close(self) -> None:
        """As `forget`."""
        self.forget()
