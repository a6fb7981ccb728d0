"""Runs that torch's launcher starts, on one machine or on two, and whose workers are killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--standalone", "--max-restarts", "3"]
ADDRESSES = ("10.213.77.1", "10.213.77.2")  # of two machines


def workers_of(launcher: subprocess.Popen) -> list[int]:
    """Process ids of the workers that a launcher has started."""
    listed = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
    return sorted(map(int, listed.stdout.split()))


@contextlib.contextmanager
def two_machines() -> Iterator[list[list[str]]]:
    """Commands before others, for two machines that see one disk: each has its own network and a name of its own that
    resolves to nothing. The test is skipped where this process may not make them."""
    names = [f"kf{os.getpid()}{side}" for side in "ab"]
    link = ["ip", "link", "add", names[0], "netns", names[0], "type", "veth", "peer", names[1], "netns", names[1]]
    steps = [["ip", "netns", "add", name] for name in names] + [link]
    for i, name in enumerate(names):
        steps.append(["ip", "-n", name, "addr", "add", f"{ADDRESSES[i]}/24", "dev", name])
        steps += [["ip", "-n", name, "link", "set", device, "up"] for device in ("lo", name)]
    commands = []
    for name in names:
        named = f'hostname {name} && exec "$@"'
        commands.append(["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", named, "sh"])
    try:
        try:
            for step in [*steps, *([*command, "true"] for command in commands)]:
                subprocess.run(step, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as problem:
            pytest.skip(f"no network namespaces here: {getattr(problem, 'stderr', '') or problem}")
        yield commands
    finally:
        with contextlib.suppress(OSError):
            for name in names:
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


def launch_apart(machines: list[list[str]], folder: Path, *args: str) -> list[subprocess.Popen]:
    """A launcher with two workers on each machine."""
    nodes = ("--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--max-restarts", "3")
    launchers = []
    for i, machine in enumerate(machines):
        place = ("--rdzv-endpoint", f"{ADDRESSES[0]}:29400", "--rdzv-conf", f"is_host={int(i == 0)}")
        at = (*place, "--local-addr", ADDRESSES[i])
        command = [*machine, sys.executable, "-m", "torch.distributed.run", *nodes, *at, "-m", "kaleido_fast", *args]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        launchers.append(subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True))
    return launchers


def kill_one_apart(launchers: list[subprocess.Popen], victim: int) -> None:
    """Kill a worker of the second machine, and wait for the end of all."""
    os.kill(workers_of(launchers[1])[victim], signal.SIGKILL)
    told = [launcher.communicate(timeout=300)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], told
    assert "exitcode: -9" in told[1] or "Signal 9" in told[1], told[1]
