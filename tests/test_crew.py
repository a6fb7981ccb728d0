"""Several workers, and several jobs, make what one process makes."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import random_mlp

from kaleido_fast import InputError, ModelCard, sample_to, save_checkpoint
from kaleido_fast.joining import join_stores

pytest.importorskip("zarr")

MODEL = random_mlp(3, 5, 3)
RUN = {"burn_in": 1, "chunk_chains": 4096, "seed": 3, "device": "cpu"}
N_CHAINS = 4096 * 5 + 77
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--standalone", "--max-restarts", "3"]
COMMAND = ["sample", "--model", "m.safetensors", "--quiet", "--chunk-chains", "4096"]


def contents(path: Path) -> dict[str, bytes]:
    """Bytes of all files of a store."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


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


def by_hand(rank: int, size: int, port: int, folder: Path, *args: str) -> subprocess.Popen:
    """Start one worker without a launcher."""
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "kaleido_fast", *COMMAND, *args]
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("n_workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_workers_write_what_one_process_writes(one_process, n_workers):
    args = ("--chains", str(N_CHAINS), "--burn-in", "1", "--seed", "3", "--out", f"crew{n_workers}.zarr")
    process = launch(n_workers, one_process, *args)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert contents(one_process / f"crew{n_workers}.zarr") == contents(one_process / "one.zarr")


def test_a_folder_that_not_all_see_is_found_before_computing(one_process, tmp_path):
    """Two workers in different folders stand for storage that is not shared."""
    port = free_port()
    (tmp_path / "m.safetensors").write_bytes((one_process / "m.safetensors").read_bytes())
    args = ("--chains", str(N_CHAINS), "--out", "apart.zarr")
    workers = [by_hand(rank, 2, port, folder, *args) for rank, folder in enumerate((one_process, tmp_path))]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [2, 2], errors
    assert "storage that all workers share" in "".join(errors)
    assert not list((one_process / "apart.zarr" / "blocks").glob("c.*"))


def test_a_bad_option_is_told_once(one_process):
    port = free_port()
    args = ("--chains", str(N_CHAINS), "--out", "bad.npy")
    workers = [by_hand(rank, 2, port, one_process, *args) for rank in range(2)]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [2, 2], errors
    assert "".join(errors).count("cannot share bad.npy: give a .zarr store") == 1, errors


def kill_one_worker(folder: Path, n_workers: int, seed: int) -> int:
    """Workers of which one is killed at a random moment: the number of blocks that were there then."""
    rng = random.Random(seed)
    out = folder / f"killed{seed}.zarr"
    args = ("--chains", str(N_CHAINS * 4), "--burn-in", "300", "--tol", "none", "--seed", "3", "--out", out.name)
    process = launch(n_workers, folder, *args)
    blocks = rng.randrange(0, 12)
    until = time.monotonic() + 120
    while len(list(out.glob("blocks/c.*"))) < blocks or not (out / "blocks").is_dir():
        assert time.monotonic() < until
        time.sleep(0.005)
    time.sleep(rng.random() * 0.1)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    there = len(list(out.glob("blocks/c.*")))
    assert len(workers) == n_workers
    os.kill(int(rng.choice(workers)), signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "exitcode: -9" in errors, errors
    return there


def make_long_run(folder: Path) -> dict[str, bytes]:
    """The store of one process for `kill_one_worker`."""
    options = {**RUN, "burn_in": 300, "tol": None, "n_chains": N_CHAINS * 4}
    sample_to(folder / "long.zarr", folder / "m.safetensors", **options)
    return contents(folder / "long.zarr")


def test_a_killed_worker_is_replaced(one_process):
    want = make_long_run(one_process)
    kill_one_worker(one_process, 2, seed=0)
    assert contents(one_process / "killed0.zarr") == want


@pytest.mark.slow
def test_twenty_killed_workers(one_process):
    want = make_long_run(one_process)
    for seed in range(20):
        n_workers = 2 if seed % 2 == 0 else 4
        there = kill_one_worker(one_process, n_workers, seed=100 + seed)
        assert contents(one_process / f"killed{100 + seed}.zarr") == want, f"seed {seed}"
        print(f"{n_workers} workers, one killed after {there} of 21 blocks: same bytes")


@pytest.mark.parametrize("cut", [[4096 * 2, 4096 * 3 + 77], [100, 4096, N_CHAINS - 4196]])
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
    with pytest.raises(InputError, match="one of the stores"):
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
