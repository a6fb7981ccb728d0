"""Cost of the first call and peak memory, each measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaleido_fast.benchmarking.environment import child_environment
from kaleido_fast.errors import InputError

_CACHES = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
_TIMEOUT_SECONDS = 900


@dataclass(frozen=True)
class FirstCall:
    """What a new process pays before and in its first call.

    Args:
        import_seconds: importing the library, torch included.
        compile_seconds: first call over the second one: loading or compiling device code, starting threads.
        pack_seconds: preparing the weights, paid by every call.
        peak_bytes: most memory that the process ever held (main memory; on a GPU that of the device).
        idle_bytes: what it held before the network was made (main memory).
        cached: whether compiled code of an earlier process was there.
    """

    import_seconds: float
    compile_seconds: float
    pack_seconds: float
    peak_bytes: int
    idle_bytes: int
    cached: bool


def measure_first_call(task: dict[str, Any], caches: Path | None = None) -> FirstCall:
    """Run a task (see `main`) in a new Python process.

    Args:
        task: name, network, path, n_chains, engine, precision, device, threads: plain values.
        caches: folder for compiled code; an empty one makes a cold start, None uses the user's own.

    Raises:
        InputError: the process failed; with its last line of error text.
    """
    cached = caches is None or any(caches.iterdir())
    environment = child_environment(None if caches is None else dict.fromkeys(_CACHES, str(caches)))
    command = [sys.executable, "-m", "kaleido_fast.benchmarking.cold"]
    try:
        result = subprocess.run(
            command, input=json.dumps(task), capture_output=True, text=True, env=environment, timeout=_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as problem:
        raise InputError(f"the first call took more than {_TIMEOUT_SECONDS} s") from problem
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise InputError(f"the first call failed in a new process: {lines[-1]}")
    return FirstCall(**json.loads(result.stdout.strip().splitlines()[-1]), cached=cached)


def cold_and_cached(task: dict[str, Any]) -> tuple[FirstCall, FirstCall]:
    """(cold, cached): with no compiled code on disk, and with what the cold process left there."""
    with tempfile.TemporaryDirectory(prefix="kaleido-fast-") as caches:
        return measure_first_call(task, Path(caches)), measure_first_call(task, Path(caches))


def main() -> None:
    """Read a task from standard input, run its engine twice for one step, print the figures as JSON."""
    task = json.loads(sys.stdin.read())
    began = time.perf_counter()
    import torch

    from kaleido_fast.benchmarking import cases, contest

    import_seconds = time.perf_counter() - began
    idle = _memory("VmRSS")
    torch.set_num_threads(task["threads"])
    device = torch.device(task["device"])
    model = cases.BenchNetwork(task["name"], task["network"], task["path"]).model()
    z0 = contest.start_states(model, task["n_chains"], device)
    run = contest.EngineRun(model, task["engine"], task["precision"], device)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        run(z0, 1)
        seconds.append(time.perf_counter() - began)
    figures = {
        "import_seconds": import_seconds,
        "compile_seconds": max(0.0, seconds[0] - seconds[1]),
        "pack_seconds": run.setup_seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _memory("VmHWM"),
        "idle_bytes": idle,
    }
    print(json.dumps(figures))


def _memory(field: str) -> int:
    """A field of the status of this process, in bytes; 0 where the system has none.

    Not `resource.getrusage`: its maximum starts from the size of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


if __name__ == "__main__":
    main()
