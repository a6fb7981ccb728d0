"""Several workers, and several jobs, make what one process makes."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_mlp
from killing import Task, command_run, contents, errors_of, start_workers, train_task, wait_until, with_args

from kaleido_fast import InputError, ModelCard, load_checkpoint, sample_to, save_checkpoint
from kaleido_fast.storing.joining import join_stores
from kaleido_fast.system.locks import output_lock
from kaleido_fast.system.workers import TorchWorkers

pytest.importorskip("zarr")

MODEL = random_mlp(3, 5, 3)
RUN = {"burn_in": 1, "chunk_chains": 4096, "seed": 3, "device": "cpu"}
N_CHAINS = 4096 * 5 + 77
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--standalone", "--max-restarts", "3"]
ADDRESSES = ("10.213.77.1", "10.213.77.2")  # of two machines
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


@pytest.mark.parametrize("victim", [0, 2])
def test_a_lost_worker_ends_training_in_one_line(tmp_path, three_workers, victim):
    told = end_early(tmp_path / "run", [victim], signal.SIGKILL)
    left = "".join(text for rank, text in enumerate(told) if rank != victim)
    assert left.count("\n") == (2 if victim == 0 else 1), left  # without the first worker nobody knows who has told
    assert "has ended" in left
    assert "Traceback" not in left
    assert end_together(tmp_path / "run", 3) == three_workers


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
    text = "a.training was written by 2 workers, now they are 3: the result agrees"
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
    assert "it would train something else than the first worker: seed 2, not 1" in told[0]


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


def workers_of(launcher: subprocess.Popen) -> list[int]:
    """Process ids of the workers that a launcher has started."""
    listed = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
    return sorted(map(int, listed.stdout.split()))


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


@pytest.fixture
def machines():
    """Commands before others, for two machines that see one disk: each has its own network and a name of its own that
    resolves to nothing."""
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
        for step in [*steps, *([*command, "true"] for command in commands)]:
            subprocess.run(step, check=True, capture_output=True, text=True)
        yield commands
    except (OSError, subprocess.CalledProcessError) as problem:
        pytest.skip(f"no network namespaces here: {getattr(problem, 'stderr', '') or problem}")
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


@pytest.mark.slow
def test_machines_sample_into_one_store_although_a_worker_is_killed(machines, one_process):
    want = make_long_run(one_process)
    args = ("--chains", str(N_CHAINS * 4), "--burn-in", "300", "--tol", "none", "--seed", "3", "--out", "apart.zarr")
    launchers = launch_apart(machines, one_process, *COMMAND, *args)
    wait_until(lambda: len(list((one_process / "apart.zarr").glob("blocks/c.*"))) >= 3)
    kill_one_apart(launchers, 0)
    assert contents(one_process / "apart.zarr") == want


@pytest.mark.slow
def test_machines_train_together_although_a_worker_is_killed(machines, tmp_path):
    want = end_together(tmp_path / "by hand", 4)
    folder = tmp_path / "apart"
    folder.mkdir()
    launchers = launch_apart(machines, folder, *TRAINING.options["args"], "--out", "a.safetensors")
    wait_until(lambda: (folder / "a.training").is_file())
    kill_one_apart(launchers, 1)
    assert contents(folder) == want


@pytest.mark.parametrize(
    "cut", [[4096 * 2, 4096 * 3 + 77], pytest.param([100, 4096, N_CHAINS - 4196], marks=pytest.mark.slow)]
)
def test_jobs_of_an_array_join_to_one_run(one_process, tmp_path, cut):
    parts, first = [], 0
    for i, n_chains in enumerate(cut):
        parts.append(tmp_path / f"{i}.zarr")
        options = {**RUN, "n_chains": n_chains, "first_chain": first}
        sample_to(parts[-1], one_process / "m.safetensors", **options)
        first += n_chains
    output = join_stores(tmp_path / "all.zarr", parts[::-1])
    if cut[0] == 4096 * 2:
        assert contents(tmp_path / "all.zarr") == contents(one_process / "one.zarr")
    assert output.layout.n_chains == N_CHAINS
    before = contents(tmp_path / "all.zarr")
    (tmp_path / "all.zarr" / "blocks" / "c.1.0").unlink()
    join_stores(tmp_path / "all.zarr", parts)
    assert contents(tmp_path / "all.zarr") == before
    with pytest.raises(InputError, match="overlap"):
        join_stores(tmp_path / "b.zarr", [*parts, parts[0]])
    with pytest.raises(InputError, match="is read by this run"):
        join_stores(parts[0], parts)
    if len(parts) > 2:
        with pytest.raises(InputError, match="leave a gap"):
            join_stores(tmp_path / "b.zarr", [parts[0], parts[2]])
    sample_to(tmp_path / "x.zarr", one_process / "m.safetensors", **{**RUN, "seed": 4}, n_chains=9, first_chain=first)
    with pytest.raises(InputError, match=r"different runs: request.seed was 3, is now 4"):
        join_stores(tmp_path / "b.zarr", [*parts, tmp_path / "x.zarr"])
    (parts[0] / "blocks" / "c.0.0").unlink()
    with pytest.raises(InputError, match="is unfinished: 1 blocks"):
        join_stores(tmp_path / "b.zarr", parts)
    assert not (tmp_path / "b.zarr").exists()
