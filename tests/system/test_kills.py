"""SIGKILL anywhere: runs that are killed and started again end with the bytes of uninterrupted ones."""

from __future__ import annotations

import random

import pytest
from conftest import random_mlp
from killing import Task, kill_at_random_moments, kill_before_changes, sample_run, train_task

from kaleido_fast import ModelCard, save_checkpoint

pytest.importorskip("zarr")

RUN = {"n_chains": 4096 + 77, "burn_in": 1, "chunk_chains": 4096, "seed": 3, "device": "cpu", "engine": "reference"}
FLOW = {name: value for name, value in RUN.items() if name != "burn_in"} | {"sampler": "flow", "steps": 2, "n_draws": 2}
LONG = {**RUN, "n_chains": 4096 * 12 + 77, "burn_in": 100, "tol": None, "engine": "cpu"}
SHORT_TASKS = [
    Task(sample_run, "a.zarr", RUN),
    Task(sample_run, "a.npy", RUN),
    Task(sample_run, "flow.zarr", FLOW),
    train_task("a.safetensors", "--hidden", "13", "--steps", "4"),
]
LONG_TASKS = [
    (Task(sample_run, "a.zarr", LONG), 34),
    (Task(sample_run, "a.npy", LONG), 33),
    (train_task("a.safetensors", "--hidden", "50", "--steps", "25"), 33),
]


@pytest.fixture
def base(tmp_path):
    """A folder with a model."""
    card = ModelCard("m", sampling={"burn_in": 1})
    save_checkpoint(tmp_path / "m.safetensors", random_mlp(3, 5, 3), card)
    return tmp_path


@pytest.mark.parametrize("task", SHORT_TASKS, ids=lambda task: task.name)
def test_killed_before_some_changes(base, task):
    """Where the process dies does not depend on the speed of the machine."""
    assert kill_before_changes(task, base, 5, random.Random(task.name)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("task", SHORT_TASKS, ids=lambda task: task.name)
def test_killed_before_every_change(base, task):
    killed = kill_before_changes(task, base, None, random.Random())
    print(f"{task.name}: killed before each of its {killed} changes to files, same bytes each time")
    assert killed > 20


@pytest.mark.slow
@pytest.mark.parametrize(("task", "n_runs"), LONG_TASKS, ids=lambda value: getattr(value, "name", value))
def test_killed_at_random_moments(base, task, n_runs):
    """The three together are 100 runs."""
    kills = kill_at_random_moments(task, base, n_runs, random.Random(task.name))
    print(f"{task.name}: {len(kills)} runs killed {sum(kills)} times, same bytes each time")
