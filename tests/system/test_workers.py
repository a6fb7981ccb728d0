"""Several workers store what one process stores, also where one is killed."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_mlp
from folders import contents
from killing import Task, command_run, errors_of, start_workers, wait_until
from launching import TORCHRUN, kill_one_apart, launch_apart, two_machines, workers_of

from kaleido_fast import ModelCard, sample_to, save_checkpoint
from kaleido_fast.system.workers import TorchWorkers

pytest.importorskip("zarr")

MODEL = random_mlp(3, 5, 3)
RUN = {"burn_in": 1, "chunk_chains": 4096, "seed": 3, "device": "cpu"}
N_CHAINS = 4096 * 5 + 77
COMMAND = ["sample", "--model", "m.safetensors", "--quiet", "--chunk-chains", "4096"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A folder with a model and the store of one process."""
    folder = tmp_path_factory.mktemp("one")
    save_checkpoint(folder / "m.safetensors", MODEL, ModelCard("m", sampling={"burn_in": 1}))
    sample_to(folder / "one.zarr", folder / "m.safetensors", n_chains=N_CHAINS, **RUN)
    return folder


def launch(n_workers: int, folder: Path, *args: str, **options) -> subprocess.Popen:
    """Start workers under torch's launcher."""
    command = [*TORCHRUN, "--nproc-per-node", str(n_workers), "-m", "kaleido_fast", *COMMAND, *args]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def end_by_hand(name: str, folders: Sequence[Path], *args: str) -> tuple[list[int | None], list[str]]:
    """Exit statuses and errors of workers that sample into ``name`` without a launcher, each in its folder."""
    task = Task(command_run, name, {"args": (*COMMAND, *args)})
    workers = start_workers(task, folders)
    for worker in workers:
        worker.join(120)
    told = [errors_of(folder, rank).read_text() for rank, folder in enumerate(folders)]
    return [worker.exitcode for worker in workers], told


@pytest.mark.parametrize("n_workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_workers_write_what_one_process_writes(one_process, n_workers):
    args = ("--chains", str(N_CHAINS), "--burn-in", "1", "--seed", "3", "--out", f"workers{n_workers}.zarr")
    process = launch(n_workers, one_process, *args)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert contents(one_process / f"workers{n_workers}.zarr") == contents(one_process / "one.zarr")


def test_a_folder_that_not_all_see_is_found_before_computing(one_process, tmp_path):
    """Two workers in different folders stand for storage that is not shared."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "m.safetensors").write_bytes((one_process / "m.safetensors").read_bytes())
    status, told = end_by_hand("apart.zarr", (one_process, folder), "--chains", str(N_CHAINS))
    assert status == [2, 2], told
    assert "storage that all workers share" in "".join(told)
    assert not list((one_process / "apart.zarr" / "blocks").glob("c.*"))


def test_a_bad_option_is_told_once(one_process):
    status, told = end_by_hand("bad.npy", [one_process] * 2, "--chains", str(N_CHAINS))
    assert status == [2, 2], told
    assert "".join(told).count("cannot share bad.npy: give a .zarr store") == 1, told


def test_more_workers_than_blocks_are_told_and_do_no_harm(one_process):
    args = ("--chains", "100", "--burn-in", "1", "--seed", "3")
    status, told = end_by_hand("few.zarr", [one_process] * 3, *args)
    assert status == [0, 0, 0], told
    assert "3 workers for 1 blocks: some have nothing to do" in told[0]
    assert told[1:] == ["", ""]
    sample_to(one_process / "few by one.zarr", one_process / "m.safetensors", **{**RUN, "n_chains": 100})
    assert contents(one_process / "few.zarr") == contents(one_process / "few by one.zarr")


def first_worker(size: int) -> TorchWorkers:
    """The first worker of several, with a store of this process."""
    workers = object.__new__(TorchWorkers)
    workers.rank, workers.size, workers.hosts_store = 0, size, True
    workers.store = torch.distributed.HashStore()
    return workers


def test_the_first_worker_waits_for_survivors_longer_than_for_the_one_that_is_lost():
    workers = first_worker(3)
    survivor = threading.Timer(0.6, workers.store.add, ("gone", 1))  # the third never leaves
    survivor.start()
    workers.leave(60.0, 0.1)
    assert workers.store.add("gone", 0) == 2


def kill_one_worker(folder: Path, n_workers: int, seed: int) -> int | None:
    """Workers of which one is killed at a random moment: the number of blocks that were there then, None at the end."""
    rng = random.Random(seed)
    out = folder / f"killed{seed}.zarr"
    args = ("--chains", str(N_CHAINS * 4), "--burn-in", "300", "--tol", "none", "--seed", "3", "--out", out.name)
    process = launch(n_workers, folder, *args)
    blocks = rng.randrange(0, 12)
    wait_until(lambda: (out / "blocks").is_dir() and len(list(out.glob("blocks/c.*"))) >= blocks)
    time.sleep(rng.random() * 0.03)
    workers = workers_of(process)
    there = len(list(out.glob("blocks/c.*")))
    with contextlib.suppress(ProcessLookupError, IndexError):
        os.kill(rng.choice(workers), signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return there if "exitcode: -9" in errors else None


def make_long_run(folder: Path) -> dict[str, bytes]:
    """The store of one process for `kill_one_worker`."""
    options: dict[str, Any] = {**RUN, "burn_in": 300, "tol": None, "n_chains": N_CHAINS * 4}
    sample_to(folder / "long.zarr", folder / "m.safetensors", **options)
    return contents(folder / "long.zarr")


def kill_workers(folder: Path, want: dict[str, bytes], n_runs: int, n_workers: int) -> None:
    """Kill a worker in so many runs: each must write the store of one process."""
    seeds = itertools.count(100 * n_workers)
    there: list[int] = []
    while len(there) < n_runs:
        seed = next(seeds)
        blocks = kill_one_worker(folder, n_workers, seed)
        assert contents(folder / f"killed{seed}.zarr") == want, f"{n_workers} workers, seed {seed}"
        if blocks is not None:
            there.append(blocks)
            print(
                f"{n_workers} workers, run {len(there)}, one killed after {blocks} of 21 blocks: same bytes", flush=True
            )


def test_a_killed_worker_is_replaced(one_process):
    kill_workers(one_process, make_long_run(one_process), 1, n_workers=2)


@pytest.mark.slow
@pytest.mark.parametrize("n_workers", [2, 4])
def test_ten_runs_of_which_a_worker_is_killed(one_process, n_workers):
    kill_workers(one_process, make_long_run(one_process), 10, n_workers)


@pytest.mark.slow
def test_machines_sample_into_one_store_although_a_worker_is_killed(one_process):
    with two_machines() as machines:
        want = make_long_run(one_process)
        options = ("--chains", str(N_CHAINS * 4), "--burn-in", "300", "--tol", "none", "--seed", "3")
        launchers = launch_apart(machines, one_process, *COMMAND, *options, "--out", "apart.zarr")
        wait_until(lambda: len(list((one_process / "apart.zarr").glob("blocks/c.*"))) >= 3)
        kill_one_apart(launchers, 0)
        assert contents(one_process / "apart.zarr") == want
