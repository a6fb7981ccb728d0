"""Workers that share a run: processes joined by the key-value store of torch's launcher (`torchrun`).

Rank 0, the first worker, prepares the output, shows progress and prints the results.

There are no collective operations, and no scheduler of our own: a counter in the launcher's store hands out blocks, so
that fast devices take more. A worker that dies is left to the launcher, which starts all anew (``--max-restarts``).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kaleido_fast.errors import InputError, WorkerError

if TYPE_CHECKING:
    from torch.distributed import Store

_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_POLL = 0.05  # seconds
_GATHER = 300.0  # seconds that workers wait for each other at the start
LEAVE = 60.0  # seconds that the first worker waits at the end until the others have left


@dataclass(frozen=True)
class Totals:
    """What all workers have done since they started."""

    blocks: int = 0
    chains: int = 0
    chain_steps: int = 0


class Workers:
    """This process among the workers of a run; here it is the only one, and takes all blocks in order."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self._totals = Totals()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def broadcast(self, key: str, value: Any) -> Any:
        """The value of rank 0, plain JSON, for all ranks; the others wait for it."""
        return value

    def confirm(self, problem: str | None) -> None:
        """Say whether this worker is ready; raises in all workers if one is not."""
        if problem:
            raise InputError(problem)

    def take(self, blocks: Sequence[int]) -> Iterator[int]:
        """Blocks for this worker, one at a time, until none is left for any worker."""
        yield from blocks

    def gather(self, key: str, value: Any) -> list[Any]:
        """The values, plain JSON, of all workers for rank 0, which waits for them; an empty list for the others."""
        return [value]

    def count(self, chains: int, chain_steps: int) -> None:
        """Another block of this worker, of so many chains, is durably whole."""
        sums = self._totals
        self._totals = Totals(sums.blocks + 1, sums.chains + chains, sums.chain_steps + chain_steps)

    def totals(self) -> Totals:
        """What all workers together have done."""
        return self._totals

    def fail(self, text: str) -> bool:
        """Tell the others that this worker cannot go on, and why; True if another one has said the same before."""
        return False

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Tell the others why this worker ends; a problem that another worker has reported is printed there alone."""
        try:
            yield
        except InputError as problem:
            if self.fail(str(problem)):
                raise WorkerError(str(problem), printed_elsewhere=True) from problem
            raise
        except KeyboardInterrupt:
            self.fail("it was interrupted")
            raise

    def check(self) -> None:
        """Raises if another worker has said that it cannot go on."""

    def wait(self) -> None:
        """Pause between two looks at `totals`; raises if another worker cannot go on."""

    def distributed_store(self) -> Store:
        """A store for torch's process groups; only where there are several workers."""
        raise InputError("one process has no process group")

    def leave(self, patience: float = LEAVE, last: float = LEAVE) -> None:
        """Part from the others. Rank 0 leaves last, because the store may live in its process.

        Args:
            patience: seconds that it waits for the others.
            last: of these, seconds for the last one when all others have left: it may be lost.
        """


class TorchWorkers(Workers):
    """A worker that was started by torch's launcher, or by hand with the same environment variables."""

    store: Store

    def __init__(self) -> None:
        super().__init__()
        self.confirmed = 0
        import torch.distributed

        if not torch.distributed.is_available():
            raise InputError("this torch has no torch.distributed: run one process, without torchrun")
        try:
            store, self.rank, self.size = next(torch.distributed.rendezvous("env://"))
        except (ValueError, RuntimeError, OSError) as problem:
            text = " ".join(str(problem).split())[:200]
            raise InputError(
                f"the launcher's store cannot be reached: {text}; start the workers with torchrun"
            ) from None
        self.hosts_store = self.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.store = torch.distributed.PrefixStore("kaleido-fast", store)
        with _reaching():
            self.store = torch.distributed.PrefixStore(self._meet(), self.store)
        size = self.broadcast("size", self.size)
        if size != self.size:
            self.confirm(f"it was started with WORLD_SIZE {self.size}, the first worker with {size}")

    def _meet(self) -> str:
        """A word that the workers of this start have in common: a store may still hold keys of an earlier one.

        Each says hello under its rank with a word of its own. Rank 0 answers each hello with its own word, until all
        have thanked for just that answer, which workers of an earlier start cannot.
        """
        mine, until = secrets.token_hex(8), time.monotonic() + _GATHER
        store, others = self.store, set(range(1, self.size))
        if not self.is_first:
            store.set(f"hello {self.rank}", mine)
            while not store.check([f"welcome {mine}"]):
                self._check_patience(until, {0})
            word = store.get(f"welcome {mine}").decode()
            store.set(f"thanks {mine} {word}", "1")
            return word
        while others:
            for rank in sorted(others):
                if store.check([f"hello {rank}"]):
                    word = store.get(f"hello {rank}").decode()
                    store.set(f"welcome {word}", mine)
                    if store.check([f"thanks {word} {mine}"]):
                        others.discard(rank)
            if others:
                self._check_patience(until, others)
        return mine

    def _check_patience(self, until: float, missing: set[int]) -> None:
        if time.monotonic() > until:
            ranks = ", ".join(map(str, sorted(missing)))
            raise InputError(f"worker {ranks} of {self.size} has not come within {_GATHER:.0f} s: are all started?")
        time.sleep(_POLL)

    def broadcast(self, key: str, value: Any) -> Any:
        if not self.is_first:
            self._wait(key)
        with _reaching():
            if self.is_first:
                self.store.set(key, json.dumps(value))
            return json.loads(self.store.get(key))

    def confirm(self, problem: str | None) -> None:
        if problem:
            self.fail(problem)
            raise InputError(problem)
        self.confirmed += 1
        key = f"ready {self.confirmed}"
        with _reaching():
            if self.store.add(key, 1) == self.size:
                self.store.set(f"all {key}", "1")
        self._wait(f"all {key}")

    def take(self, blocks: Sequence[int]) -> Iterator[int]:
        while True:
            self.check()
            with _reaching():
                place = self.store.add("next", 1) - 1
            if place >= len(blocks):
                return
            yield blocks[place]

    def gather(self, key: str, value: Any) -> list[Any]:
        with _reaching():
            self.store.set(f"{key} {self.rank}", json.dumps(value))
        places = [f"{key} {rank}" for rank in range(self.size)] if self.is_first else []
        for place in places:
            self._wait(place)
        with _reaching():
            return [json.loads(self.store.get(place)) for place in places]

    def count(self, chains: int, chain_steps: int) -> None:
        with _reaching():
            self.store.add("chains", chains)
            self.store.add("chain_steps", chain_steps)
            self.store.add("done", 1)

    def totals(self) -> Totals:
        with _reaching():
            return Totals(*(self.store.add(name, 0) for name in ("done", "chains", "chain_steps")))

    def fail(self, text: str) -> bool:
        facts = {"text": text, "rank": self.rank, "host": socket.gethostname()}
        try:
            first = json.loads(self.store.compare_set("failed", "", json.dumps(facts)))
        except RuntimeError:
            return False  # no other worker can be reached
        return first["rank"] != self.rank and first["text"] == text

    def distributed_store(self) -> Store:
        import torch.distributed

        return torch.distributed.PrefixStore("process group", self.store)

    def check(self) -> None:
        if self._has("failed"):
            with _reaching():
                facts = json.loads(self.store.get("failed"))
            where = "" if facts["rank"] == 0 else f"worker {facts['rank']} on {facts['host']}: "
            raise WorkerError(f"{where}{facts['text']}", printed_elsewhere=not self.is_first)

    def wait(self) -> None:
        self.check()
        time.sleep(_POLL)

    def leave(self, patience: float = LEAVE, last: float = LEAVE) -> None:
        try:
            missing = self.size - self.store.add("gone", 1)
            until = time.monotonic() + patience
            while self.hosts_store and missing > 0 and time.monotonic() < until:
                if missing == 1:
                    until = min(until, time.monotonic() + last)
                time.sleep(_POLL)
                missing = self.size - self.store.add("gone", 0)
        except RuntimeError:
            return

    def _wait(self, key: str) -> None:
        while not self._has(key):
            self.wait()

    def _has(self, key: str) -> bool:
        with _reaching():
            return self.store.check([key])


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    """The launcher, or the first worker where there is none, may be gone."""
    try:
        yield
    except RuntimeError as problem:
        text = "the other workers cannot be reached any more: the launcher or the first worker has ended"
        raise WorkerError(text, printed_elsewhere=False) from problem


def is_first_worker(*, alone: bool = False) -> bool:
    """Whether this process is rank 0 of those that were started together, or alone: by the environment only."""
    return alone or started_together() == 1 or os.environ["RANK"].strip() == "0"


def started_together() -> int:
    """Number of processes that were started together, by the environment alone; 1 without a launcher.

    Raises:
        InputError: a rank that so many workers do not have: the others would wait for one that never comes.
    """
    rank, size = (os.environ.get(name, "").strip() for name in ("RANK", "WORLD_SIZE"))
    if not rank or not size:
        return 1
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise InputError(f"RANK is {rank!r} and WORLD_SIZE {size!r}: ranks are 0 to WORLD_SIZE - 1; torchrun sets both")
    return int(size)


def refuse_workers(what: str, remedy: str) -> None:
    """Refuse what several processes started together would each do anew: `InputError`, which rank 0 prints."""
    size = started_together()
    if size > 1:
        raise WorkerError(f"{size} workers cannot share {what}: {remedy}", printed_elsewhere=not is_first_worker())


def find_workers(*, alone: bool = False) -> Workers:
    """The workers that this process was started with: `torchrun` sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Args:
        alone: this process has a run of its own, and waits for none of the others.

    Raises:
        InputError: one of several processes that cannot find each other.
    """
    size = 1 if alone else started_together()
    missing = [name for name in _ADDRESS if name not in os.environ]
    if size > 1 and missing:
        raise InputError(
            f"WORLD_SIZE is {size} and there is no {missing[0]}, by which workers find each other: start them with "
            "torchrun, or pass alone (--alone) for a run of its own in each process"
        )
    return TorchWorkers() if size > 1 else Workers()


def local_device(device: str | None) -> str | None:
    """Give each worker of a machine its own GPU where none was named."""
    rank = os.environ.get("LOCAL_RANK", "")
    if device not in (None, "auto") or not rank.isdecimal() or "MASTER_ADDR" not in os.environ:
        return device
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{int(rank) % count}" if count else device
