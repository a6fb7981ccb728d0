"""Signals are handled while work goes on, in the main thread only, and given back afterwards."""

from __future__ import annotations

import signal
import threading

import pytest

from kaleido_fast.errors import TerminatedError
from kaleido_fast.system.signals import stop_flag, stop_signals

BOTH = (signal.SIGINT, signal.SIGTERM)


def handlers() -> list[object]:
    """What handles the two signals now."""
    return [signal.getsignal(number) for number in BOTH]


def test_a_sigterm_raises_and_its_handler_is_given_back():
    before = handlers()
    with pytest.raises(TerminatedError), stop_signals():
        assert handlers()[0] is before[0], "Ctrl-C raises by itself"
        signal.raise_signal(signal.SIGTERM)
    assert handlers() == before


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("several", [False, True])
def test_the_first_signal_is_kept_and_a_second_one_raises_unless_a_launcher_passes_them_on(number, several):
    before = handlers()
    with stop_flag(several=several) as requested:
        signal.raise_signal(number)
        assert requested.is_set()
        assert requested.terminated is (number == signal.SIGTERM)
        if several:
            signal.raise_signal(number)
        else:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    assert handlers() == before


def test_a_signal_that_the_program_handles_is_left_to_it():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("theirs"))
    try:
        with stop_flag(several=False) as requested:
            signal.raise_signal(signal.SIGTERM)
        assert seen == ["theirs"]
        assert not requested.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("make", [stop_signals, lambda: stop_flag(several=False)])
def test_other_threads_handle_nothing(make):
    before, seen = handlers(), []

    def work() -> None:
        with make():
            seen.append(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
