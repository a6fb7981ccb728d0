"""What the emulator says when it cannot go on, or must not."""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """Base of all; the text names the instruction and where in the kernel it stands."""


class UnknownInstructionError(EmulatorError):
    """PTX that the emulator has no rule for."""


class AccessError(EmulatorError):
    """An access outside of every tensor or of shared memory, or one that is not aligned."""


class RaceError(EmulatorError):
    """Something used before it is certain to be there, or overwritten while it is in use."""


class DeadlockError(EmulatorError):
    """Warps wait for something that can no longer happen."""
