"""Processes that train one network together: each takes a share of every batch, and gradients are summed.

The batch of a step, its order and its noise are those of one process, whatever the number of workers; only the order
of the sums differs, so that weights agree with those of one process to rounding, and to the bit for one world size.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kaleido_fast.errors import InputError, WorkerError
from kaleido_fast.system.files import remove_parts
from kaleido_fast.system.locks import output_lock, read_token
from kaleido_fast.system.workers import LEAVE, Workers, find_workers

_PATIENCE = datetime.timedelta(minutes=10)  # for a worker that neither answers nor hangs up
# Seconds that the first worker waits after training has failed: for the others, which are late on a busy machine, and
# for the last of them, which may be the one that is lost.
_END = (20.0, 2.0)
_INTERFACE = "GLOO_SOCKET_IFNAME"


class TrainingWorkers:
    """The workers that train one network together; here this process is the only one."""

    rank, size = 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and shows progress."""
        return self.rank == 0

    @contextlib.contextmanager
    def together(
        self, state: Path | None, request: dict[str, Any], batch_size: int, device: torch.device
    ) -> Iterator[bool]:
        """Hold the state file and join the workers; yields whether all go on from that file.

        Args:
            state: the file, which the first worker alone writes; None keeps no state.
            request: what is trained, as plain JSON values: the same for all.
            batch_size: examples of a step, to be shared.
            device: where this process computes.

        Raises:
            InputError: another process writes the state, workers do not see one state file, would train different
                things, are more than there are examples in a batch, or do not reach each other.
        """
        with _lock(state):
            yield state is not None and state.exists()

    def wrap(self, model: nn.Module, example: Tensor) -> nn.Module:
        """The module whose backward pass averages gradients over the workers; ``example`` (1, D) is an input."""
        return model

    def rows(self, n_rows: int) -> slice:
        """Rows of a batch of ``n_rows`` that this worker takes."""
        return slice(self.rank * n_rows // self.size, (self.rank + 1) * n_rows // self.size)

    def agree(self, loss: Tensor, stop: bool) -> tuple[Tensor, bool]:
        """Sum of the shares of a loss, and whether any process wants to stop."""
        return loss, stop

    def broadcast(self, key: str, compute: Callable[[], Any]) -> Any:
        """What the first worker computes, plain JSON, for all workers; ``key`` is new at each call."""
        return compute()

    def lost(self, problem: RuntimeError, text: str) -> InputError | None:
        """What to raise where ``problem`` says that another worker has ended, by default with ``text``; else None."""
        return None


class TorchTrainingWorkers(TrainingWorkers):
    """Workers started by torch's launcher."""

    def __init__(self, workers: Workers) -> None:
        self.workers, self.rank, self.size = workers, workers.rank, workers.size
        self.connected = False

    @contextlib.contextmanager
    def together(
        self, state: Path | None, request: dict[str, Any], batch_size: int, device: torch.device
    ) -> Iterator[bool]:
        if self.size > batch_size:
            raise InputError(
                f"{self.size} workers for batches of {batch_size}: start at most {batch_size}, or raise batch_size"
            )
        if device.type not in ("cpu", "cuda"):
            raise InputError(f"workers train together on cpu or cuda devices, not on {device.type}: run one process")
        facts = json.loads(json.dumps({**request, "device": device.type, "torch": torch.__version__}))
        with _lock(state if self.is_first else None) as token:
            mine = {"facts": facts, "token": token, "digest": _digest(state)}
            first = self.workers.broadcast("training", mine)
            self.workers.confirm(None if self.is_first else _difference(state, mine, first))
            self._connect(device)
            yield first["digest"] is not None

    def _connect(self, device: torch.device) -> None:
        """Open torch's process group; `close` ends it."""
        if torch.distributed.is_initialized():
            raise InputError("this process has a process group already: train before init_process_group, or without it")
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = self.workers.distributed_store()
        try:
            with _reachable_interface():
                torch.distributed.init_process_group(
                    backend, store=store, rank=self.rank, world_size=self.size, timeout=_PATIENCE
                )
        except (RuntimeError, ValueError) as problem:
            self.workers.check()
            text = " ".join(str(problem).split())[:200]
            raise InputError(
                f"workers cannot reach each other: {text}; set {_INTERFACE} (for nccl NCCL_SOCKET_IFNAME) to the "
                "network interface that leads to the others"
            ) from problem
        self.connected = True

    def close(self) -> None:
        """Leave the process group."""
        if self.connected:
            torch.distributed.destroy_process_group()
            self.connected = False

    def wrap(self, model: nn.Module, example: Tensor) -> nn.Module:
        parallel = nn.parallel.DistributedDataParallel(model)
        # After its first backward pass torch puts gradients into other buckets, so the order of sums would depend on
        # when a run began. After this pass, whose gradients are thrown away, a resumed run adds in the same order.
        (parallel(example) * 0).sum().backward()
        model.zero_grad(set_to_none=True)
        return parallel

    def agree(self, loss: Tensor, stop: bool) -> tuple[Tensor, bool]:
        both = torch.stack([loss.detach().double(), torch.tensor(float(stop), dtype=torch.float64, device=loss.device)])
        torch.distributed.all_reduce(both)
        return both[0], bool(both[1] > 0)

    def broadcast(self, key: str, compute: Callable[[], Any]) -> Any:
        return self.workers.broadcast(f"broadcast {key}", compute() if self.is_first else None)

    def lost(self, problem: RuntimeError, text: str) -> InputError | None:
        known = isinstance(problem, torch.distributed.DistError)
        if not known and not any(name in str(problem).lower() for name in ("gloo", "nccl")):
            return None
        try:
            self.workers.check()  # it may have said why
        except WorkerError as reason:
            return WorkerError(text, printed_elsewhere=True) if text in str(reason) else reason
        return WorkerError(text, printed_elsewhere=False)


@contextlib.contextmanager
def find_training_workers(*, alone: bool = False) -> Iterator[TrainingWorkers]:
    """The workers that this process was started with, or ``alone``; see `kaleido_fast.system.workers.find_workers`.

    A problem of one worker ends the others, and is printed once.
    """
    started = find_workers(alone=alone)
    workers = TrainingWorkers() if started.size == 1 else TorchTrainingWorkers(started)
    patience = (LEAVE, LEAVE)
    try:
        with started.failing_together():
            yield workers
    except InputError:
        patience = _END
        raise
    finally:
        if isinstance(workers, TorchTrainingWorkers):
            workers.close()
        started.leave(*patience)


@contextlib.contextmanager
def _lock(state: Path | None) -> Iterator[str | None]:
    if state is None:
        yield None
        return
    with output_lock(state) as token:
        remove_parts(state)
        yield token


def _digest(state: Path | None) -> str | None:
    if state is None or not state.exists():
        return None
    return hashlib.sha256(state.read_bytes()).hexdigest()


def _difference(state: Path | None, mine: dict[str, Any], first: dict[str, Any]) -> str | None:
    """Why this worker cannot train with the first one."""
    for key, value in first["facts"].items():
        if mine["facts"].get(key) != value:
            return f"it would train something other than the first worker: {key} {mine['facts'].get(key)}, not {value}"
    seen = None if state is None else read_token(state)
    if seen != first["token"] or mine["digest"] != first["digest"]:
        where = "no state file" if state is None else state.absolute()
        return f"{where} is not the state that the first worker writes: put it on storage that all workers share"
    return None


@contextlib.contextmanager
def _reachable_interface() -> Iterator[None]:
    """Let gloo use the network interface that leads to the first worker.

    By itself it takes the address that the name of this machine resolves to, which others may not reach.
    """
    name = None if _INTERFACE in os.environ else _interface()
    if name is None:
        yield
        return
    os.environ[_INTERFACE] = name
    try:
        yield
    finally:
        del os.environ[_INTERFACE]


def _interface() -> str | None:
    """Name of that interface; None where it is not known."""
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    target = "127.0.0.1" if one_machine else os.environ["MASTER_ADDR"]
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, int(os.environ["MASTER_PORT"])))  # sends nothing
            address = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # an interface without an address
                    asked = struct.pack("256s", name.encode()[:15])
                    if fcntl.ioctl(probe.fileno(), 0x8915, asked)[20:24] == address:  # SIOCGIFADDR of Linux
                        return name
    except (ImportError, OSError):
        return None
    return None
