"""What this machine has: the only place that asks."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import kaleido_kernels
from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.plan import DeviceFacts
from kaleido_fast.versions import library_versions
from kaleido_kernels.tiles import read_tuned

TUNED = Path(kaleido_kernels.__file__).parent / "tuned"


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; None and "auto" take the first CUDA device if there is one, else the CPU.

    Raises:
        InputError: unknown kind, or a device that this machine does not have.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as problem:
        raise unknown_name("device", device, ("auto", "cpu", "cuda", "cuda:0")) from problem
    if resolved.type not in ("cpu", "cuda"):
        raise unknown_name("device", device, ("auto", "cpu", "cuda", "cuda:0"))
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use device='cpu'"
        )
    return resolved


def device_facts(device: torch.device) -> DeviceFacts:
    """Facts about a device, for the plan."""
    has_triton, has_numba = _importable("triton"), _importable("numba")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return DeviceFacts(
            kind="cuda",
            name=properties.name,
            memory=torch.cuda.mem_get_info(device)[0],
            has_triton=has_triton,
            has_numba=has_numba,
            capability=(properties.major, properties.minor),
            n_sm=properties.multi_processor_count,
            shared_memory=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
            tuned=tuned_tiles(properties.name),
        )
    return DeviceFacts(
        kind="cpu",
        name=cpu_name(),
        memory=available_memory(),
        has_triton=has_triton,
        has_numba=has_numba,
        has_bf16="avx512_bf16" in _cpu_field("flags").split(),
        interpreter=os.environ.get("TRITON_INTERPRET") == "1",
    )


def tuned_tiles(gpu: str, folders: Sequence[Path] | None = None) -> dict[str, Any]:
    """Tiles measured best on a GPU, from table NAME.json of each folder that has one, the first folder winning.

    A table that is malformed, or of another GPU or Triton, is passed over with one line of warning.

    Args:
        gpu: name of the GPU.
        folders: None for the person's own tables and then the shipped ones.
    """
    triton = library_versions("triton")["triton"]
    tiles: dict[str, Any] = {}
    for folder in reversed([user_data() / "tuned", TUNED] if folders is None else folders):
        path = folder / table_name(gpu)
        if not path.is_file():
            continue
        try:
            tiles |= read_tuned(path, gpu, triton)
        except ValueError as problem:
            warnings.warn(f"ignored: {problem}", stacklevel=2)
    return tiles


def table_name(gpu: str) -> str:
    """File name of a GPU's tuned table."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", gpu) + ".json"


def user_data() -> Path:
    """The folder for what the program keeps for a person, after each platform's custom; it need not exist."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - does not fail where there is no home
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    else:  # XDG Base Directory Specification: a relative path there is to be ignored
        given = Path(os.environ.get("XDG_DATA_HOME", ""))
        base = given if given.is_absolute() else home / ".local" / "share"
    return base / "kaleido-fast"


def available_memory() -> int:
    """Bytes of main memory that a new allocation can have without swapping, inside the limits of a container."""
    free = _meminfo_available() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = _read_number("/sys/fs/cgroup/memory.max"), _read_number("/sys/fs/cgroup/memory.current")
    return min(free, limit - used) if limit is not None and used is not None else free


def cpu_name() -> str:
    """The processor as the system calls it."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_field(name: str) -> str:
    """A field of the first processor in /proc/cpuinfo; empty where there is none."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(name):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return ""


def _importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


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
