"""The thread that writes: all blocks in order, its problems in the caller, nothing begun after the end."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from kaleido_fast.planning.blocks import WAITING_BLOCKS
from kaleido_fast.storing.write_behind import WriteBehind

BLOCKS: list[Any] = list(range(20))  # it looks into none of them


def test_blocks_are_written_in_order_by_another_thread():
    written, threads = [], set()

    def write(block: Any) -> None:
        written.append(block)
        threads.add(threading.current_thread())

    with WriteBehind(write) as writer:
        for block in BLOCKS:
            writer.put(block)
        writer.finish()
        assert written == BLOCKS
    assert threads == {writer.thread} and not writer.thread.is_alive()


def test_no_more_blocks_wait_than_the_plan_counts():
    may_write, seen = threading.Semaphore(0), []

    def write(block: Any) -> None:
        may_write.acquire()
        seen.append(block)

    with WriteBehind(write) as writer:
        for block in BLOCKS[: 1 + WAITING_BLOCKS]:
            writer.put(block)
        putting = threading.Thread(target=writer.put, args=(BLOCKS[-1],), daemon=True)
        putting.start()
        putting.join(0.5)
        assert putting.is_alive(), "a further block was taken"
        may_write.release(2 + WAITING_BLOCKS)
        putting.join()
        writer.finish()
    assert seen == [*BLOCKS[: 1 + WAITING_BLOCKS], BLOCKS[-1]]


@pytest.mark.parametrize("finish", [False, True])
def test_what_the_thread_meets_is_raised_by_the_caller(finish):
    def write(block: Any) -> None:
        raise OSError(28, "full")

    with pytest.raises(OSError, match="full"), WriteBehind(write) as writer:
        writer.put(BLOCKS[0])
        if finish:
            writer.finish()
        for block in BLOCKS:
            writer.put(block)
        pytest.fail("blocks are taken after a problem")


def test_blocks_that_wait_are_dropped_where_the_caller_breaks_off():
    written, begun, may_end = [], threading.Event(), threading.Event()

    def write(block: Any) -> None:
        begun.set()
        may_end.wait(30)
        written.append(block)

    with pytest.raises(KeyboardInterrupt), WriteBehind(write) as writer:
        writer.put(BLOCKS[0])
        assert begun.wait(30)
        writer.put(BLOCKS[1])
        threading.Timer(0.2, may_end.set).start()
        raise KeyboardInterrupt
    assert written == BLOCKS[:1] and not writer.thread.is_alive()
