"""Ctrl-C and SIGTERM during long work: what is whole is kept, and the process ends in order.

Python lets only the main thread handle signals: in other threads nothing here changes anything.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from kaleido_fast.errors import TerminatedError

_DEFAULTS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class StopFlag(threading.Event):
    """Set by a signal, whose number it keeps."""

    number = 0

    @property
    def terminated(self) -> bool:
        """Whether the signal was SIGTERM."""
        return self.number == signal.SIGTERM


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """SIGTERM raises `TerminatedError` as Ctrl-C raises `KeyboardInterrupt`; a second one ends the process at once."""

    def handle(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise TerminatedError

    with _handled(handle, [signal.SIGTERM]):
        yield


@contextlib.contextmanager
def stop_flag(*, several: bool) -> Iterator[StopFlag]:
    """Turn the first Ctrl-C or SIGTERM into a flag: inside an optimiser step it would tear the state.

    A second one raises `KeyboardInterrupt`. Signals that the program around handles itself are left to it.

    Args:
        several: one of several workers, in which no signal raises: their launcher may pass on one that they have got.
    """
    requested = StopFlag()

    def handle(signum: int, frame: Any) -> None:
        if requested.is_set() and not several:
            raise KeyboardInterrupt
        requested.number = signum
        requested.set()

    with _handled(handle, [number for number, default in _DEFAULTS.items() if signal.getsignal(number) is default]):
        yield requested


@contextlib.contextmanager
def _handled(handle: Callable[[int, Any], None], numbers: Iterable[int]) -> Iterator[None]:
    """Handle signals in the main thread, and restore what handled them before."""
    ours = numbers if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handle) for number in ours}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
