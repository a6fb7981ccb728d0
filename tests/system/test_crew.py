"""Threads that stay: they help, they wait for nobody, they survive forks, and failures are told."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from kaleido_fast.system import crew
from kaleido_fast.system.crew import helped


def test_threads_help_and_are_taken_again():
    for _ in range(20):
        together = threading.Barrier(4)
        threads = set()

        def work(together: threading.Barrier = together, threads: set[int] = threads) -> None:
            together.wait(10)
            threads.add(threading.get_ident())

        with helped(work, 3):
            work()
        assert len(threads) == 4
    staying = [thread for thread in threading.enumerate() if thread.name.startswith("helper-kaleido")]
    assert 3 <= len(staying) < 20


def test_calls_do_not_wait_for_the_threads_of_others():
    go, begun = threading.Event(), threading.Event()

    def long() -> None:
        begun.set()
        assert go.wait(10)

    with helped(long, 1):
        assert begun.wait(10)
        done = threading.Event()
        with helped(done.set, 1):
            assert done.wait(10), "another thread does it"
        go.set()


def test_who_has_not_begun_by_the_end_never_does(monkeypatch):
    done = []
    with monkeypatch.context() as changed:
        changed.setattr(crew._Worker, "take", lambda worker, future, work: None)
        with helped(lambda: done.append(1), 3):
            pass
    assert not done


def test_short_calls_start_no_more_threads_than_they_use():
    """Thousands of them, whose helpers mostly come too late or end at once."""
    for helpers in (1, 3):
        for _ in range(3000):
            with helped(lambda: None, helpers) as finish:
                finish()
    assert len([thread for thread in threading.enumerate() if thread.name.startswith("helper-kaleido")]) < 20


def test_without_more_threads_the_caller_does_it_all_and_nothing_is_left_behind(monkeypatch):
    """Work whose thread cannot be started must not be done later, by the thread of another call."""
    done, tried = [], itertools.count()

    def refuse(thread: threading.Thread) -> None:
        next(tried)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(crew, "_crew", crew._Crew())
    with monkeypatch.context() as changed:
        changed.setattr(threading.Thread, "start", refuse)
        with helped(lambda: done.append("lost"), 3):
            pass
        assert next(tried) == 1
    begun = threading.Event()
    for _ in range(50):
        with helped(begun.set, 2):
            assert begun.wait(10)
    assert not done


def test_an_interruption_while_threads_are_called_stops_those_that_began(monkeypatch):
    stopped, begun, ended = threading.Event(), threading.Event(), []
    submit, calls = crew._crew.submit, itertools.count()

    def work() -> None:
        begun.set()
        assert stopped.wait(10)
        ended.append(1)

    def interrupted(placed: Callable[[], None]) -> object:
        if next(calls):
            assert begun.wait(10)
            raise KeyboardInterrupt
        return submit(placed)

    monkeypatch.setattr(crew._crew, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt), helped(work, 2, stopped.set):
        raise AssertionError("the block must not begin")
    assert ended == [1]


def test_what_a_thread_raises_is_told():
    begun = threading.Event()

    def work() -> None:
        begun.set()
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), helped(work, 1):
        assert begun.wait(10)
    begun.clear()
    with pytest.raises(ValueError, match="broken"), helped(work, 1) as finish:
        assert begun.wait(10)
        with pytest.raises(ValueError, match="broken"):
            finish()
    with pytest.raises(KeyError), helped(work, 1):  # the block's own comes first
        raise KeyError


def test_a_failing_block_waits_for_its_threads():
    begun, stopped, ended = threading.Event(), threading.Event(), []

    def work() -> None:
        begun.set()
        stopped.wait(10)
        ended.append(1)

    with pytest.raises(KeyboardInterrupt), helped(work, 1):
        assert begun.wait(10)
        stopped.set()
        raise KeyboardInterrupt
    assert ended == [1]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="masks of this system cannot be set")
def test_threads_run_where_the_caller_may_run():
    before = os.sched_getaffinity(0)

    def masks() -> list[set[int]]:
        found: list[set[int]] = []
        begun = threading.Event()

        def work() -> None:
            found.append(os.sched_getaffinity(0))
            begun.set()

        with helped(work, 1):
            assert begun.wait(10)
        return found

    try:
        for mask in (before, {min(before)}, before):
            os.sched_setaffinity(0, mask)
            assert masks() == [mask]
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_starts_its_own():
    program = """
import os, threading
from kaleido_fast.system.crew import helped
def once():
    begun = threading.Event()
    with helped(begun.set, 1):
        assert begun.wait(20)
once()
child = os.fork()
once()
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
