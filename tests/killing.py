"""Runs in processes that are killed, to be compared with runs that were not.

Processes come from a fork server that has loaded the library, so that a run takes its own time and not that of imports.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from folders import contents

from kaleido_fast import sample_to
from kaleido_fast.cli import main

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command does before it loads torch
SERVER = multiprocessing.get_context("forkserver")
LIBRARY = (
    "kaleido_fast.storing.sample_to",
    "kaleido_fast.training.trainer",
    "kaleido_fast.engines.cpu",
    "kaleido_fast.engines.loops.choice",
    "kaleido_fast.cli.train",
    "torch._dynamo",  # loaded by torch at the first step of its optimisers
)
SERVER.set_forkserver_preload([*LIBRARY, "zarr", "pytest"])
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")


def sample_run(folder: Path, name: str, options: dict[str, Any]) -> None:
    """Sample the checkpoint of the folder into ``name``."""
    sample_to(folder / name, folder.parent / "m.safetensors", **options)


def command_run(folder: Path, name: str, options: dict[str, Any]) -> None:
    """``kaleido-fast ARGS --out NAME``; ends the process."""
    os.chdir(folder)
    sys.argv = ["kaleido-fast", *options["args"], "--out", name]
    main()


def train_task(name: str, *args: str) -> Task:
    """Train the points, with a state after every step."""
    fixed = ("train", "--data", "points2d", "--bound", "sigmoid", "--batch-size", "16", "--noise", "0.1", "--no-curve")
    common = ("--device", "cpu", "--quiet", "--save-every", "0")
    return Task(command_run, name, {"args": (*fixed, *common, *args)})


def with_args(task: Task, *args: str) -> Task:
    """The task of a command with more arguments."""
    return replace(task, options={"args": (*task.options["args"], *args)})


def start_workers(
    task: Task, folders: Sequence[Path], *, each: Sequence[dict[str, str]] = (), tasks: Sequence[Task] = ()
) -> list[Any]:
    """Start a worker in each of the folders, without a launcher; what they print goes to `errors_of`.

    Args:
        task: what all do.
        folders: where.
        each: more environment variables of each.
        tasks: what each does, instead of ``task``.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(len(folders)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = []
    for rank, folder in enumerate(folders):
        env = {**common, "RANK": str(rank), **(each[rank] if each else {})}
        doing = tasks[rank] if tasks else task
        workers.append(doing.start(folder, env=env, errors=errors_of(folder, rank)))
    return workers


def wait_until(ready: Callable[[], bool]) -> None:
    """Until something is there."""
    until = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.005)


def errors_of(folder: Path, rank: int) -> Path:
    """Where the errors of a worker are written: beside its folder."""
    return folder.with_name(f"{folder.name}.errors{rank}")


@dataclass(frozen=True)
class Task:
    """A run that can be started again.

    Args:
        run: called in a process of its own with a folder, ``name`` and ``options``.
        name: of the output.
        options: of the run.
    """

    run: Callable[[Path, str, dict[str, Any]], None]
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def start(
        self,
        folder: Path,
        *,
        dies_at: int | None = None,
        env: dict[str, str] | None = None,
        errors: Path | None = None,
    ) -> Any:
        """Start a process.

        Args:
            folder: where it writes.
            dies_at: it kills itself before its change of this number to the file system.
            env: more environment variables.
            errors: a file for its standard error.
        """
        process = SERVER.Process(target=_act, args=(self, folder, dies_at, env or {}, errors))
        process.start()
        return process

    def finish(self, folder: Path) -> dict[str, bytes]:
        """Run to the end; what is then in the folder."""
        process = self.start(folder)
        process.join()
        assert process.exitcode == 0, f"{self.name} ended with {process.exitcode}"
        return contents(folder)


def _act(task: Task, folder: Path, dies_at: int | None, env: dict[str, str], errors: Path | None) -> None:
    torch.set_num_threads(1)
    os.environ.update(env)
    if errors is not None:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    changes = itertools.count()
    if dies_at is not None:
        _die_at(dies_at, str(folder), changes)
    try:
        task.run(folder, task.name, task.options)
    finally:
        folder.with_name(f"{folder.name}.changes").write_text(str(next(changes)))


def _place(event: str, args: tuple[Any, ...]) -> str:
    """Absolute path of what an audited event is about, or of its folder."""
    if event in ("os.remove", "os.rmdir") and args[1] != -1:  # named within an open folder, as by `shutil.rmtree`
        return str(Path(f"/proc/self/fd/{args[1]}").readlink())
    return str(Path(args[0]).absolute()) if isinstance(args[0], (str, os.PathLike)) else ""


def _die_at(number: int, folder: str, changes: Iterator[int]) -> None:
    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and _place(event, args).startswith(folder) and next(changes) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill(task: Task, folder: Path, *, seconds: float | None = None, dies_at: int | None = None) -> bool:
    """Start a run and kill it, after a time or before a change; whether it was still running."""
    process = task.start(folder, dies_at=dies_at)
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"{task.name} ended with {process.exitcode}"
    return process.exitcode != 0


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: its files, seconds and changes to the file system."""

    files: dict[str, bytes]
    seconds: float
    n_changes: int


def end_whole(task: Task, base: Path) -> Whole:
    """Run without interruption in ``base / "whole"``, twice: the first one has to load the library."""
    for _ in range(2):
        shutil.rmtree(base / "whole", ignore_errors=True)
        (base / "whole").mkdir()
        began = time.monotonic()
        process = task.start(base / "whole", dies_at=sys.maxsize)
        process.join()
        seconds = time.monotonic() - began
        assert process.exitcode == 0, f"{task.name} ended with {process.exitcode}"
    return Whole(contents(base / "whole"), seconds, int((base / "whole.changes").read_text()))


def kill_at_random_moments(task: Task, base: Path, n_runs: int, rng: random.Random) -> list[int]:
    """Kill runs at random moments, up to three times, and end them: each must be the uninterrupted one, file by file.

    Gives how often each run was killed.
    """
    whole = end_whole(task, base)
    kills: list[int] = []
    while len(kills) < n_runs:
        folder = base / f"killed{len(kills)}"
        folder.mkdir()
        times = 0
        while times < 3 and kill(task, folder, seconds=rng.random() * whole.seconds):
            times += 1
        if times:
            assert task.finish(folder) == whole.files, f"run {len(kills)} of {task.name}, killed {times} times, differs"
            kills.append(times)
            print(f"{task.name}: run {len(kills)} killed {times} times, same bytes", flush=True)
        shutil.rmtree(folder)
    return kills


def kill_before_changes(task: Task, base: Path, n_kills: int | None, rng: random.Random) -> int:
    """Kill runs before changes of theirs to the file system, and end them; gives how many.

    Args:
        task: what is run.
        base: a folder for it.
        n_kills: how many of the changes; None for all.
        rng: picks them.
    """
    whole = end_whole(task, base)
    numbers = list(range(whole.n_changes))
    for number in numbers if n_kills is None else rng.sample(numbers, n_kills):
        folder = base / f"killed{number}"
        folder.mkdir()
        assert kill(task, folder, dies_at=number), f"{task.name} has no change {number}"
        assert task.finish(folder) == whole.files, f"{task.name}, killed before change {number}, differs"
        shutil.rmtree(folder)
    return len(numbers) if n_kills is None else n_kills
