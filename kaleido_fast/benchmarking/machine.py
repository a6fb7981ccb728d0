"""Where and from what a measurement was made."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import kaleido_fast
from kaleido_fast.benchmarking.busy import allowed_cores
from kaleido_fast.engines.available import instruction_set
from kaleido_fast.system.devices import cpu_name
from kaleido_fast.system.memory import available_memory
from kaleido_fast.system.versions import library_versions

PEER_LIBRARIES = ("numba", "triton", "jax", "onnxruntime", "openvino")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, memory, load and the device, as plain values."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(allowed_cores()),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_free_bytes": available_memory(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else [],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["gpu_memory_bytes"] = properties.total_memory
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["cuda"] = torch.version.cuda
    return facts


GPU_STATE = (
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit"),
    *("temperature.gpu", "utilization.gpu", "memory.used", "clocks_throttle_reasons.active", "pstate"),
)


def gpu_state(device: torch.device) -> dict[str, str]:
    """Clocks (MHz), power (W), temperature (deg C) of a GPU at this moment, by nvidia-smi; {} without it."""
    if device.type != "cuda":
        return {}
    query = ("nvidia-smi", f"--query-gpu={','.join(GPU_STATE)}", "--format=csv,noheader,nounits")
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    text = (_output(*query, f"--id=GPU-{uuid}") if uuid else None) or _output(*query)
    values = [value.strip() for value in (text or "").splitlines()[:1] for value in value.split(",")]
    return dict(zip(GPU_STATE, values, strict=False)) if values else {}


def describe_run(device: torch.device) -> dict[str, Any]:
    """All that a table of results needs beside its numbers: date, command, commit, machine, versions."""
    commit, dirty = source_commit(Path(kaleido_fast.__file__).parent)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(sys.argv),
        "commit": commit,
        "dirty": dirty,
        "machine": describe_machine(device),
        "versions": library_versions(*PEER_LIBRARIES),
    }


def command_line(argv: list[str]) -> str:
    """The command as one can type it again."""
    name = Path(argv[0]).name
    program = "kaleido-fast" if name in ("__main__.py", "kaleido-fast") else name
    return shlex.join([program, *argv[1:]])


def source_commit(package: Path) -> tuple[str | None, bool | None]:
    """(commit, whether files differ from it) of the repository that tracks this package; (None, None) for a wheel.

    An installed package may lie inside another repository, which does not track it: that commit is not ours.
    """
    if _output("git", "-C", str(package), "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    commit = _output("git", "-C", str(package), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(package), "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
