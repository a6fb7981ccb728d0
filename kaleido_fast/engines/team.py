"""Calls of the loops that a team of threads runs together, see `kaleido_fast.engines.loops.team`."""

from __future__ import annotations

import contextlib
import math
import queue
import time
from collections.abc import Callable

import numpy as np

from kaleido_fast.engines.loops.arrays import Tile
from kaleido_fast.system.crew import cores_allowed, current_core, move_to

Call = Callable[[Tile], None]
"""One call of the loops, by the thread that a tile's buffers belong to."""

_GATHER_SECONDS = 2e-4
_FIRST_ALONE = 4  # the first calls find caches cold and threads asleep, and a short run is over by then
_CALLS_ALONE, _MOST_ALONE = 4, 64


class Pace:
    """Whether a team is worth it just now: other programs may use the cores of its members, who wait for each other."""

    def __init__(self) -> None:
        self._calls = self._left = self._failed = 0
        self._alone = math.inf

    def together(self) -> bool:
        """Whether the next call is for the team: all but one by which to judge it, and some after it was slower."""
        return self._left == 0 and self._calls != _FIRST_ALONE

    def brief(self) -> bool:
        """Whether the next call is only to judge by: the first alone, and a team's after others have failed."""
        return self._left == 0 and (self._calls == _FIRST_ALONE or self._failed > 0)

    def add(self, members: int, seconds: float) -> None:
        """Count a call of ``members``, and its seconds a step."""
        self._calls += 1
        self._left = max(0, self._left - 1)
        if members == 1:
            self._alone = min(self._alone, seconds)
        elif seconds > self._alone:
            self._left = min(_CALLS_ALONE << self._failed, _MOST_ALONE)
            self._failed = min(self._failed + 1, 8)
        else:
            self._failed = 0


class Team:
    """The thread that reports leads; others follow for the calls that they come in time for.

    Args:
        tile: the buffers that they share, and the leader's own.
        members: threads, the leader with them.
        pace: of such teams, from this call and those before.
    """

    def __init__(self, tile: Tile, members: int, pace: Pace) -> None:
        self._place = np.array([0, 1, 0], np.int64)
        self._tile = tile._replace(place=self._place)
        self._members, self._core = members, current_core()
        self._calls: queue.SimpleQueue[tuple[Call, np.ndarray, int] | None] = queue.SimpleQueue()
        self._here: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._pace = pace
        self._board = np.zeros(0, np.int64)

    def prepare(self, call: Call) -> None:
        """Compile, or load, the loops of teams by a call that does nothing: within a call others would wait for it."""
        call(self._tile)

    def gather(self) -> None:
        """Wait a moment for others: one that was woken on the leader's core must get it once to go to another."""
        until = time.monotonic() + _GATHER_SECONDS
        with contextlib.suppress(queue.Empty):
            for _ in range(self._members - 1):
                self._here.get(timeout=max(0.0, until - time.monotonic()))

    def cut(self, steps: int) -> int:
        """Steps of the next call, in place of ``steps``: fewer where it is only to judge by."""
        return max(1, steps // 4) if self._pace.brief() else steps

    def lead(self, call: Call, steps: int) -> None:
        """Run a call of so many steps with all who come."""
        began = time.perf_counter()
        if self._pace.together():
            self._lead(call)
        else:
            self._place[:] = (0, 1, 0)
            call(self._tile)
        self._pace.add(int(self._place[1]), (time.perf_counter() - began) / max(1, steps))

    def _lead(self, call: Call) -> None:
        from kaleido_fast.engines.loops.packing import make_board

        # A board of its own: a member of the call before may still be looking at that call's.
        self._board = make_board()
        self._place[:] = (0, self._members, self._board.ctypes.data)
        core = current_core()
        for _ in range(self._members - 1):
            self._calls.put((call, self._board, core))
        call(self._tile)

    def follow(self) -> None:
        """Take part in calls until the team is stopped."""
        # numba takes half a second to import: only a program that samples pays for it.
        from kaleido_fast.engines.loops.packing import member_tile

        place = np.array([-1, 0, 0], np.int64)
        own, cores = member_tile(self._tile, place), cores_allowed()
        _keep_off(self._core, cores)
        self._here.put(None)
        while (given := self._calls.get()) is not None:
            call, board, core = given
            _keep_off(core, cores)
            place[:] = (-1, 0, board.ctypes.data)
            call(own)
        move_to(cores)

    def stop(self) -> None:
        """Let all who follow leave; also those who wait for a call that the leader never came to."""
        from kaleido_fast.engines.loops.team import SIZE, STOPPED

        if len(self._board) and not self._board[SIZE]:
            self._board[SIZE] = STOPPED
        for _ in range(self._members - 1):
            self._calls.put(None)


def _keep_off(core: int, cores: set[int] | None) -> None:
    """Leave the leader's core: the system would let two that wait for each other take turns on it."""
    if cores is not None:
        move_to(cores - {core} or cores)
