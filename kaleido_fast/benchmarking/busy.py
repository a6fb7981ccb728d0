"""How much of this machine other processes use: what they take, a table would call slowness."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kaleido_fast.errors import InputError

MOST = 0.2  # of the time of the cores that this process may use
LOOK_SECONDS = 1.0
_PROC = Path("/proc")


@dataclass(frozen=True)
class Reading:
    """Seconds since some fixed moment.

    Args:
        clock: of the wall.
        used: by anybody (other machines on the same processor too) on the allowed cores, summed over them.
        own: by this process, the children that it has seen end, and those of its children that it names.
        known: all of the cores' seconds, idle ones too; a system that counts none says nothing.
    """

    clock: float
    used: float
    own: float
    known: float


def allowed_cores() -> set[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def read(pids: Iterable[int] = ()) -> Reading | None:
    """A reading now; None where the system has no /proc/stat. ``pids``: children whose use is our own."""
    try:
        lines = (_PROC / "stat").read_text().splitlines()
        tick = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    names = {f"cpu{core}" for core in allowed_cores()}
    used = known = 0.0
    for name, *fields in (line.split() for line in lines if line.startswith("cpu")):
        if name in names:
            user, nice, system, idle, waiting, *rest = (int(value) / tick for value in fields[:8])
            used += user + nice + system + sum(rest)  # interrupts; time that the host gave to others
            known += user + nice + system + sum(rest) + idle + waiting
    own = sum(os.times()[:4]) + sum(_seconds_of(pid, tick) for pid in pids)
    return Reading(time.monotonic(), used, own, known)


def _seconds_of(pid: int, tick: int) -> float:
    """CPU seconds of a child and of the children that it has seen end; 0 where it is gone: then they are ours."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return sum(int(value) for value in fields[11:15]) / tick
    return 0.0


def others_share(before: Reading | None, after: Reading | None, cores: int) -> float | None:
    """Share of the cores' time between two readings that was used, and not by us; None where it cannot be told."""
    if before is None or after is None or after.known <= before.known or after.clock <= before.clock:
        return None
    others = (after.used - before.used) - (after.own - before.own)
    return min(1.0, max(0.0, others / ((after.clock - before.clock) * cores)))


def share_now(pause: Callable[[float], None] = time.sleep) -> float | None:
    """Share that others use at this moment; by the load average where nothing better is known, else None."""
    cores, before = len(allowed_cores()), read()
    pause(LOOK_SECONDS)
    share = others_share(before, read(), cores)
    if share is None and hasattr(os, "getloadavg"):
        with contextlib.suppress(OSError):
            share = min(1.0, os.getloadavg()[0] / cores)
    return share


def is_busy(share: float | None) -> bool:
    """Whether others use so much that timings are not to be quoted."""
    return share is not None and share > MOST


def refuse_busy(share: float | None) -> None:
    """Refuse to measure beside others: `InputError`."""
    if share is not None and is_busy(share):
        raise InputError(
            f"other processes use {share:.0%} of the {len(allowed_cores())} cores: timings would be wrong; wait until "
            "they end (`top` shows them), or give --busy to measure all the same, which the table will say"
        )
