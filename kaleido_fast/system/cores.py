"""How many threads can compute at once here: torch's number, but no more than there are cores to run them.

Threads beyond the cores take turns on them, and whoever waits for the slowest waits longer. Torch counts cores when it
is imported, not the limit of a container on processor time, and takes any number that it is told.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch


def useful_threads() -> int:
    """``torch.get_num_threads()``, or the number of cores at hand where that is less; at least 1.

    A number that was given to ``torch.set_num_threads`` is never exceeded.
    """
    return max(1, min(torch.get_num_threads(), cores_at_hand()))


def cores_at_hand() -> int:
    """Cores that the calling thread, and threads that it starts, may use at the same time; a part of one counts as one.

    Where OpenMP pins threads (``OMP_PROC_BIND``), what the main thread starts shares its single core.
    """
    # The mask of a thread is read each time, as programs change it between calls; limits of containers hardly change.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = _share_of_this_process()
    return cores if share is None else min(cores, max(1, math.ceil(share)))


@functools.cache
def _share_of_this_process() -> float | None:
    return processor_share()


def processor_share(root: Path = Path("/")) -> float | None:
    """Processor time that control groups allow this process, in cores; None for no limit.

    Args:
        root: of the file system; replaced in tests.
    """
    shares = [share for folder in _groups(root) if (share := _share_in(folder)) is not None]
    return min(shares, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups that limit this process: its own and those around it.

    A container may see only its own group, at the top, and yet be told the path that it has outside.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        names = ("cpu", "cpu,cpuacct", controllers) if controllers else ("", "unified")
        for name in dict.fromkeys(names):
            top = root / "sys/fs/cgroup" / name
            inside = [part for part in path.split("/") if part and part != ".."]
            for depth in range(len(inside) + 1):
                yield top.joinpath(*inside[:depth])


def _share_in(folder: Path) -> float | None:
    """The limit that a group sets itself: ``cpu.max`` of version 2, else the two files of version 1."""
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # no such files, or "max"
        return None
    return share if share > 0 else None  # -1 is no limit


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
