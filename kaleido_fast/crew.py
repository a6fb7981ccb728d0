"""Workers that share the blocks of a run, joined by the key-value store of torch's launcher (`torchrun`).

No collective operations, and no scheduler of our own: a counter in the launcher's store hands out blocks, so that fast
devices take more; a worker that dies is the business of the launcher, which starts all anew (``--max-restarts``).
Each start of the workers has keys of its own.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kaleido_fast.errors import CrewError, InputError

if TYPE_CHECKING:
    from torch.distributed import Store

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL = 0.05  # seconds
_LEAVE = 60.0  # seconds that the leader waits for the others to hang up


@dataclass(frozen=True)
class Totals:
    """What all workers have done since they started."""

    blocks: int = 0
    chain_steps: int = 0


class Crew:
    """One worker alone: it leads, and takes all blocks in order."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self._totals = Totals()

    @property
    def leads(self) -> bool:
        """Whether this worker prepares the output, shows progress and prints the end."""
        return self.rank == 0

    def share(self, key: str, value: Any) -> Any:
        """The leader's value, plain JSON, for everybody; the others wait for it."""
        return value

    def confirm(self, problem: str | None) -> None:
        """Tell whether this worker is ready; raises everywhere if one is not."""
        if problem:
            raise InputError(problem)

    def take(self, blocks: Sequence[int]) -> Iterator[int]:
        """Blocks for this worker, one at a time, until none is left for anybody."""
        yield from blocks

    def count(self, chain_steps: int) -> None:
        """Another block of this worker is durably whole."""
        self._totals = Totals(self._totals.blocks + 1, self._totals.chain_steps + chain_steps)

    def totals(self) -> Totals:
        """What all workers together have done."""
        return self._totals

    def fail(self, text: str) -> None:
        """Tell the others that this worker cannot go on, and why."""

    def wait_for_all(self, n_blocks: int) -> None:
        """The leader waits until ``n_blocks`` are whole."""

    def leave(self) -> None:
        """Say good-bye: the leader is last, because the store may live in its process."""


class TorchCrew(Crew):
    """A worker that was started by torch's launcher, or by hand with the same environment variables."""

    store: Store

    def __init__(self) -> None:
        super().__init__()
        import torch.distributed

        if not torch.distributed.is_available():
            raise InputError("this torch has no torch.distributed: run one process, without torchrun")
        try:
            self.store, self.rank, self.size = next(torch.distributed.rendezvous("env://"))
        except (ValueError, RuntimeError, OSError) as problem:
            text = " ".join(str(problem).split())[:200]
            raise InputError(
                f"the launcher's store cannot be reached: {text}; start the workers with torchrun"
            ) from None

    def share(self, key: str, value: Any) -> Any:
        if self.leads:
            self.store.set(key, json.dumps(value))
            return value
        self._wait(key)
        return json.loads(self.store.get(key))

    def confirm(self, problem: str | None) -> None:
        if problem:
            self.fail(problem)
            raise InputError(problem)
        if self.store.add("ready", 1) == self.size:
            self.store.set("all ready", "1")
        self._wait("all ready")

    def take(self, blocks: Sequence[int]) -> Iterator[int]:
        while True:
            self._check()
            place = self.store.add("next", 1) - 1
            if place >= len(blocks):
                return
            yield blocks[place]

    def count(self, chain_steps: int) -> None:
        self.store.add("chain_steps", chain_steps)
        self.store.add("done", 1)

    def totals(self) -> Totals:
        return Totals(self.store.add("done", 0), self.store.add("chain_steps", 0))

    def fail(self, text: str) -> None:
        facts = {"text": text, "rank": self.rank, "host": socket.gethostname()}
        try:
            self.store.set("failed", json.dumps(facts))
        except RuntimeError:
            return  # nobody is left to be told

    def wait_for_all(self, n_blocks: int) -> None:
        while self.leads and self.totals().blocks < n_blocks:
            self._check()
            time.sleep(_POLL)

    def leave(self) -> None:
        try:
            gone = self.store.add("gone", 1)
            until = time.monotonic() + _LEAVE
            while self.leads and gone < self.size and time.monotonic() < until:
                time.sleep(_POLL)
                gone = self.store.add("gone", 0)
        except RuntimeError:
            return

    def _wait(self, key: str) -> None:
        while not self.store.check([key]):
            self._check()
            time.sleep(_POLL)

    def _check(self) -> None:
        """Stop when another worker has failed."""
        if self.store.check(["failed"]):
            facts = json.loads(self.store.get("failed"))
            where = "" if facts["rank"] == 0 else f"worker {facts['rank']} on {facts['host']}: "
            raise CrewError(f"{where}{facts['text']}", told=not self.leads)


def find_crew() -> Crew:
    """The crew that this process was started in: `torchrun` sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
    return TorchCrew() if all(name in os.environ for name in _LAUNCHED) else Crew()


def local_device(device: str | None) -> str | None:
    """Give each worker of a machine its own GPU where none was named."""
    rank = os.environ.get("LOCAL_RANK", "")
    if device not in (None, "auto") or not rank.isdecimal() or "MASTER_ADDR" not in os.environ:
        return device
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{int(rank) % count}" if count else device
