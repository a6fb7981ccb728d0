"""Several workers train what one process trains, stop together, and go on where one was killed."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import contents
from killing import errors_of, start_workers, train_task, wait_until, with_args
from launching import TORCHRUN, kill_one_apart, launch_apart, two_machines, workers_of

from kaleido_fast import load_checkpoint
from kaleido_fast.system.locks import output_lock

TRAINING = train_task("a.safetensors", "--hidden", "13", "--steps", "150", "--save-every", "0.05")


def train_together(folders: Sequence[Path], *more: str, env: Sequence[dict[str, str]] = (), n: int = 0) -> list[Any]:
    """Workers in these folders, or ``n`` in the only one, that are waited for."""
    workers = start_workers(with_args(TRAINING, *more), [*folders] * max(1, n), each=env)
    for worker in workers:
        worker.join(120)
    return workers


def end_together(folder: Path, n: int, *more: str) -> dict[str, bytes]:
    """What ``n`` workers train in a new or unfinished folder; the first one alone prints."""
    folder.mkdir(exist_ok=True)
    workers = train_together([folder], *more, n=n)
    told = [errors_of(folder, rank).read_text() for rank in range(n)]
    assert [worker.exitcode for worker in workers] == [0] * n, told
    assert not any(told[1:])
    return contents(folder)


def end_early(folder: Path, victims: Sequence[int], number: signal.Signals, n: int = 3) -> list[str]:
    """Send some of ``n`` workers a signal after the first steps; what each prints."""
    folder.mkdir()
    workers = start_workers(TRAINING, [folder] * n)
    wait_until(lambda: (folder / "a.training").is_file())
    for victim in victims:
        os.kill(workers[victim].pid, number)
    for worker in workers:
        worker.join(120)
    assert 0 not in [worker.exitcode for worker in workers]
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == ["a.training"]
    return [errors_of(folder, rank).read_text() for rank in range(n)]


@pytest.fixture(scope="module")
def three_workers(tmp_path_factory):
    """Files of three workers that were never interrupted."""
    return end_together(tmp_path_factory.mktemp("three") / "run", 3)


def test_workers_train_what_one_process_trains(tmp_path, three_workers):
    """Weights agree to rounding: sums of gradients have another order."""
    assert list(three_workers) == ["a.safetensors"]
    (tmp_path / "three.safetensors").write_bytes(three_workers["a.safetensors"])
    with_args(TRAINING).finish(tmp_path)
    one, three = (load_checkpoint(tmp_path / f"{name}.safetensors") for name in ("a", "three"))
    for left, right in zip(one.model.parameters(), three.model.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-4)
    assert three.card.final_loss == pytest.approx(one.card.final_loss, rel=1e-3)
    assert three.card.recipe["best_step"] == one.card.recipe["best_step"]


FLOW = (
    "--recipe",
    "flow",
    "--noise",
    "0",
    "--batch-size",
    "30",
    "--average",
    "0.9",
    "--loss",
    "bce",
    "--weight-decay",
    "0.1",
)


def test_workers_train_the_flow_that_one_process_trains(tmp_path):
    """Levels of noise are those of the whole batch, whoever computes its rows; of two workers bits are the same."""
    for name, n in (("two", 2), ("again", 2), ("one", 1)):
        folder = tmp_path / name
        folder.mkdir()
        workers = train_together([folder], *FLOW, n=n)
        assert [worker.exitcode for worker in workers] == [0] * n, errors_of(folder, 0).read_text()
    one, two = (load_checkpoint(tmp_path / name / "a.safetensors") for name in ("one", "two"))
    for left, right in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-4)
    assert two.card.final_loss == pytest.approx(one.card.final_loss, rel=1e-3)
    assert contents(tmp_path / "two") == contents(tmp_path / "again")


def test_a_time_is_for_one_process(tmp_path):
    workers = train_together([tmp_path], "--seconds", "1", n=2)
    told = [errors_of(tmp_path, rank).read_text() for rank in range(2)]
    assert [worker.exitcode for worker in workers] == [2, 2], told
    assert "seconds = 1 with 2 workers" in told[0] and told[0].count("\n") == 1


@pytest.mark.parametrize("victim", [0, 2])
def test_a_lost_worker_ends_training_in_one_line(tmp_path, three_workers, victim):
    told = end_early(tmp_path / "run", [victim], signal.SIGKILL)
    left = "".join(text for rank, text in enumerate(told) if rank != victim)
    assert left.count("\n") == (2 if victim == 0 else 1), left  # without the first worker nobody knows who has told
    assert "has ended" in left
    assert "Traceback" not in left
    assert end_together(tmp_path / "run", 3) == three_workers


@pytest.mark.parametrize("victims", [[0, 1, 2], [1]])
def test_terminated_workers_stop_together_and_go_on_with_the_same_bits(tmp_path, three_workers, victims):
    told = end_early(tmp_path / "run", victims, signal.SIGTERM)
    assert "of 150 training steps; run the same command again to go on from a.training" in told[0]
    assert [text.count("\n") for text in told] == [1, 0, 0], told
    assert end_together(tmp_path / "run", 3) == three_workers


def test_another_number_of_workers_goes_on_and_says_so(tmp_path):
    end_early(tmp_path / "run", [0, 1], signal.SIGTERM, n=2)
    workers = train_together([tmp_path / "run"], n=3)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    text = "a.training was written by 2 workers, now there are 3: the result agrees"
    assert errors_of(tmp_path / "run", 0).read_text().count(text) == 1


def test_a_state_that_not_all_see_is_found_before_computing(tmp_path):
    folders = [tmp_path / name for name in ("here", "there")]
    for folder in folders:
        folder.mkdir()
    workers = train_together(folders)
    told = [errors_of(folder, rank).read_text() for rank, folder in enumerate(folders)]
    assert [worker.exitcode for worker in workers] == [2, 2], told
    place = folders[1] / "a.training"
    assert f"{place} is not the state that the first worker writes: put it on storage that all workers share" in told[0]
    assert not any(contents(folder) for folder in folders)


@pytest.mark.parametrize(
    ("more", "env", "text"),
    [
        (("--batch-size", "1"), [{}, {}], "2 workers for batches of 1: start at most 1, or raise batch_size"),
        ((), [{}, {"WORLD_SIZE": "3"}], "it was started with WORLD_SIZE 3, the first worker with 2"),
        ((), [{"RANK": "2"}, {"RANK": "one"}], "RANK is 'one' and WORLD_SIZE '2': ranks are 0 to WORLD_SIZE - 1"),
        (("--learning-rate", "7"), [{}, {}], "learning_rate = 7.0"),
        ((), [{"GLOO_SOCKET_IFNAME": "nope0"}] * 2, "workers cannot reach each other"),
    ],
)
def test_workers_that_do_not_fit_are_refused_in_a_line_each(tmp_path, more, env, text):
    (tmp_path / "run").mkdir()
    workers = train_together([tmp_path / "run"], *more, env=env, n=2)
    told = [errors_of(tmp_path / "run", rank).read_text() for rank in range(2)]
    assert [worker.exitcode for worker in workers] == [2, 2], told
    assert text in "".join(told)
    assert max(said.count("\n") for said in told) == 1, told
    assert not contents(tmp_path / "run")


def test_workers_that_would_train_something_else_are_refused(tmp_path):
    (tmp_path / "run").mkdir()
    tasks = [with_args(TRAINING, "--seed", seed) for seed in ("1", "2")]
    workers = start_workers(tasks[0], [tmp_path / "run"] * 2, tasks=tasks)
    for worker in workers:
        worker.join(120)
    told = [errors_of(tmp_path / "run", rank).read_text() for rank in range(2)]
    assert [worker.exitcode for worker in workers] == [2, 2], told
    assert "it would train something other than the first worker: seed 2, not 1" in told[0]


def test_a_training_that_another_process_writes_is_refused_by_its_name(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with output_lock(folder / "a.training"):
        workers = train_together([folder], n=2)
    told = [errors_of(folder, rank).read_text() for rank in range(2)]
    assert [worker.exitcode for worker in workers] == [2, 2], told
    assert "".join(told).count(f"output a.training is being written by process {os.getpid()} on ") == 1
    assert not contents(folder)


def kill_in_training(base: Path, n_workers: int, seed: int, want: dict[str, bytes], seconds: float) -> bool:
    """Kill one of the workers at a random moment and start all again; whether it was killed before the end."""
    rng = random.Random(seed)
    folder = base / f"{n_workers} {seed}"
    folder.mkdir()
    workers = start_workers(TRAINING, [folder] * n_workers)
    victim = rng.choice(workers)
    victim.join(rng.random() * seconds)
    victim.kill()
    for worker in workers:
        worker.join(120)
    assert end_together(folder, n_workers) == want, f"{n_workers} workers, seed {seed}"
    return victim.exitcode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("n_workers", [2, 4])
def test_ten_trainings_of_which_a_worker_is_killed(tmp_path, n_workers):
    end_together(tmp_path / "first", n_workers)
    began = time.monotonic()
    want = end_together(tmp_path / "whole", n_workers)
    seconds = time.monotonic() - began
    seeds = itertools.count()
    killed = 0
    while killed < 10:
        killed += kill_in_training(tmp_path, n_workers, next(seeds), want, seconds)
    print(f"{n_workers} workers, {killed} trainings of which one was killed: same bytes")


def train_under(launcher: Sequence[str], folder: Path) -> subprocess.Popen:
    """Start training under torch's launcher."""
    command = [*launcher, "-m", "kaleido_fast", *TRAINING.options["args"], "--out", "a.safetensors"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)


def test_torchrun_starts_training_again_where_a_worker_was_killed(tmp_path):
    want = end_together(tmp_path / "by hand", 2)
    folder = tmp_path / "launched"
    folder.mkdir()
    process = train_under([*TORCHRUN, "--nproc-per-node", "2"], folder)
    wait_until(lambda: (folder / "a.training").is_file())
    os.kill(workers_of(process)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors.count("another worker of this training has ended; start all again to go on from a.training") <= 1
    assert contents(folder) == want


@pytest.mark.slow
def test_machines_train_together_although_a_worker_is_killed(tmp_path):
    with two_machines() as machines:
        want = end_together(tmp_path / "by hand", 4)
        folder = tmp_path / "apart"
        folder.mkdir()
        launchers = launch_apart(machines, folder, *TRAINING.options["args"], "--out", "a.safetensors")
        wait_until(lambda: (folder / "a.training").is_file())
        kill_one_apart(launchers, 1)
    assert contents(folder) == want
