"""One process, or one of several that a launcher started, told apart by the environment alone."""

from __future__ import annotations

import json

import pytest

from kaleido_fast import ModelCard, sample_to, save_checkpoint, train
from kaleido_fast.errors import InputError
from kaleido_fast.system.workers import Workers, find_workers, is_first_worker, started_together

from conftest import call, random_mlp  # isort: skip

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
TOGETHER = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host.invalid", "MASTER_PORT": "1"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "m.safetensors", random_mlp(4, 5, 4), ModelCard("m", sampling={"burn_in": 1}))
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def start(monkeypatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": " 0 ", "WORLD_SIZE": "1", "MASTER_ADDR": "host.invalid", "MASTER_PORT": "1"},
        {"WORLD_SIZE": "8"},
        {"RANK": "3"},
        {"RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": "host.invalid", "MASTER_PORT": "1"},
    ],
)
def test_one_process_looks_for_nobody(folder, monkeypatch, variables):
    """An address that leads nowhere would be waited for."""
    start(monkeypatch, **variables)
    assert started_together() == 1 and is_first_worker()
    assert type(find_workers()) is Workers
    assert sample_to("a.npy", "m.safetensors", n_chains=5, device="cpu").stats.n_chains == 5


@pytest.mark.parametrize(("rank", "size"), [("1", "1"), ("2", "2"), ("-1", "2"), ("x", "2"), ("0", "many"), ("0", "0")])
def test_a_rank_that_cannot_be_is_refused(folder, monkeypatch, rank, size):
    start(monkeypatch, RANK=rank, WORLD_SIZE=size)
    for ask in (started_together, is_first_worker, find_workers):
        with pytest.raises(InputError, match="ranks are 0 to WORLD_SIZE - 1"):
            ask()


def test_workers_without_an_address_are_refused_and_told_what_to_do(folder, monkeypatch):
    """Alone each of them would write the same output."""
    start(monkeypatch, RANK="1", WORLD_SIZE="2", MASTER_ADDR="host.invalid")
    for work in (lambda: sample_to("a.zarr", "m.safetensors", n_chains=5), lambda: train(preset="points1d")):
        with pytest.raises(InputError, match=r"no MASTER_PORT.*torchrun.*--alone"):
            work()


def test_one_rank_of_several_can_have_a_run_of_its_own(folder, monkeypatch, capsys):
    sample_to("one.npy", "m.safetensors", n_chains=9, device="cpu")
    start(monkeypatch, **TOGETHER)
    sample_to("rank1.npy", "m.safetensors", n_chains=9, device="cpu", alone=True)
    assert (folder / "rank1.npy").read_bytes() == (folder / "one.npy").read_bytes()
    arguments = ("--model", "m.safetensors", "--chains", "9", "--device", "cpu", "--alone", "--json")
    for name in ("c.npy", "c.npz"):
        status, out, errors = call(monkeypatch, capsys, "sample", *arguments, "--out", name)
        assert (status, errors) == (0, "") and json.loads(out)["n_chains"] == 9, "it reports its own run"
    status, out, errors = call(
        monkeypatch, capsys, "train", "--preset", "points1d", "--steps", "3", "--alone", "--no-curve", "--json"
    )
    assert status == 0 and json.loads(out)["files"] == ["points1d.safetensors"], errors


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "--model", "m.safetensors", "--out", "s.npz"),
        ("sample", "--model", "m.safetensors", "--out", "s.safetensors"),
        ("evaluate", "m.safetensors"),
        ("attractors", "--model", "m.safetensors"),
        ("join", "a.zarr", "b.zarr"),
        ("reproduce", "points1d"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_workers_cannot_share_is_refused_once(folder, monkeypatch, capsys, arguments, rank):
    start(monkeypatch, **{**TOGETHER, "RANK": rank})
    before = sorted(folder.iterdir())
    status, out, errors = call(monkeypatch, capsys, *arguments)
    assert (status, out) == (2, "")
    assert ("2 workers cannot share" in errors) == (rank == "0") and errors.count("\n") == (rank == "0"), errors
    assert sorted(folder.iterdir()) == before


def test_help_is_for_all(folder, monkeypatch, capsys):
    start(monkeypatch, **TOGETHER)
    for arguments in (("--help",), ("--version",), ("info", "m.safetensors", "--json")):
        assert call(monkeypatch, capsys, *arguments)[0] == 0
