"""Main memory: how much of it is free, and whether it ran out."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def available_memory() -> int:
    """Bytes of main memory that a new allocation can have without swapping, inside the limits of a container."""
    free = _meminfo_available() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = _read_number("/sys/fs/cgroup/memory.max"), _read_number("/sys/fs/cgroup/memory.current")
    return min(free, limit - used) if limit is not None and used is not None else free


def is_lack_of_memory(problem: BaseException) -> bool:
    """Whether memory ran out: torch has no type of its own for that on a CPU, and CUDA's libraries have others."""
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(problem, (torch.OutOfMemoryError, MemoryError)) or any(
        text in str(problem).lower() for text in texts
    )


def _meminfo_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _read_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such control group, or "max"
        return None
