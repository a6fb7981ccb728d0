"""Which threads of a group run, and masks of those that take part in an instruction."""

from __future__ import annotations

import numpy as np

from kaleido_kernels.proving.emulation.errors import DeadlockError, EmulatorError
from kaleido_kernels.proving.emulation.kinds import Array

Mask = Array | None
"""(threads,) bool: who takes part; None for all."""


class Threads:
    """Where the threads of a group are: all at one instruction, or apart; then those at the first one run first."""

    def __init__(self, n_threads: int) -> None:
        self.places = np.zeros(n_threads, np.int64)  # meaningful while threads are apart
        self.alive, self.waiting = np.ones(n_threads, bool), np.zeros(n_threads, bool)
        self.together, self.here = True, 0
        self.active: Mask = None  # those at ``here``; None for all
        self.released = False  # whether they are at a barrier to which all have come

    def step(self) -> bool:
        """Choose who runs next; false when all threads have ended."""
        if self.together:
            return True
        if not self.alive.any():
            return False
        free = self.alive & ~self.waiting
        self.released = not free.any()
        if self.released:
            if len(set(self.places[self.alive].tolist())) != 1:
                raise DeadlockError("threads of one group wait at different barriers")
            self.waiting[:] = False
            free = self.alive.copy()
        self.here = int(self.places[free].min())
        self.active = free & (self.places == self.here)
        if self.active.all():
            self.together, self.active = True, None
        return True

    def go_to(self, place: int) -> None:
        """Those who ran go on at ``place``."""
        if self.together:
            self.here = place
        else:
            self.places[self.active] = place

    def go_on(self) -> None:
        """Those who ran go on at the next instruction."""
        self.go_to(self.here + 1)

    def part(self, taken: Array, place: int) -> None:
        """Some of those who ran go to ``place``, the others on."""
        self._separate()
        self.go_on()
        self.places[taken] = place

    def end(self, mask: Mask) -> None:
        """Some of those who ran end, the others go on."""
        self._separate()
        self.alive &= ~mask if mask is not None else False
        self.go_on()

    def _separate(self) -> None:
        if self.together:
            self.together, self.active = False, np.ones(len(self.places), bool)

    def all_here(self) -> bool:
        """Whether all that have not ended have come to the same place."""
        return self.active is None or self.released or bool((self.active == self.alive).all())

    def wait_for_the_others(self) -> None:
        """Those who ran wait until all have come."""
        self.waiting |= self.active


def chosen(values: Array, mask: Mask) -> Array:
    """Values of the threads that take part."""
    return values if mask is None else values[mask]


def only_together(mask: Mask, what: str) -> None:
    """Raises `EmulatorError` if part of a group is about to do what the emulator knows for all of them only."""
    if mask is not None:
        raise EmulatorError(f"{what} by part of a group of warps: no rule for it")


def all_of_their_warps(mask: Mask, what: str) -> Array:
    """(warps,) bool of those that take part, each as a whole.

    Raises:
        EmulatorError: part of a warp.
    """
    if mask is None:
        return np.ones(1, bool)
    some, whole = (test(mask.reshape(-1, 32), axis=1) for test in (np.any, np.all))
    if not (some == whole).all():
        raise EmulatorError(f"{what} by part of a warp: no rule for it")
    return whole
