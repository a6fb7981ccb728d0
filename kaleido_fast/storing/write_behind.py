"""Blocks are written by a thread of their own while the next ones are computed."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

from kaleido_fast.planning.blocks import WAITING_BLOCKS
from kaleido_fast.running.blocks import Block


class WriteBehind:
    """A thread that writes blocks as they come, at most `WAITING_BLOCKS` behind.

    Args:
        write: writes one block.
    """

    def __init__(self, write: Callable[[Block], None]) -> None:
        self.write = write
        self.queue: queue.Queue[Block | None] = queue.Queue(WAITING_BLOCKS)  # None is the end
        self.problem: BaseException | None = None
        self.dropped = False
        self.thread = threading.Thread(target=self._run, name="kaleido-writer", daemon=True)

    def __enter__(self) -> WriteBehind:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the block at hand; blocks that wait are dropped, unless `finish` was called before."""
        self.dropped = True
        self._end()

    def put(self, block: Block) -> None:
        """Hand over a block; raises what the thread met."""
        while True:
            if self.problem is not None:
                raise self.problem
            with contextlib.suppress(queue.Full):
                return self.queue.put(block, timeout=0.1)

    def finish(self) -> None:
        """Wait until all that was handed over is written; raises what the thread met."""
        self._end()
        if self.problem is not None:
            raise self.problem

    def _end(self) -> None:
        while self.thread.is_alive():
            with contextlib.suppress(queue.Full):
                self.queue.put(None, timeout=0.1)
                self.thread.join()

    def _run(self) -> None:
        try:
            while (block := self.queue.get()) is not None:
                if not self.dropped:
                    self.write(block)
        except BaseException as problem:
            self.problem = problem
