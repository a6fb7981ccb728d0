"""Stores of a flow: the draws of one call, however they were written, and beside stores that know no samplers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, random_mlp
from folders import contents
from launching import TORCHRUN
from stored_blocks import stop_after

from kaleido_fast import InputError, ModelCard, fast_sample, open_draws, sample_to, save_checkpoint
from kaleido_fast.errors import StreamInterruptedError
from kaleido_fast.planning.options import ADDED_LATER
from kaleido_fast.showing.states import read_shown
from kaleido_fast.storing.joining import join_stores
from kaleido_fast.storing.record import difference
from kaleido_fast.storing.zarr_output import ZarrOutput

pytest.importorskip("zarr")

MODEL = random_mlp(4, 9, 4, sample_shape=(2, 2))
FLOW = {"sampler": "flow", "steps": 3, "noise_from": 0.8, "noise_to": 0.2}
SAMPLE = {**FLOW, "n_chains": 4096 * 2 + 77, "n_draws": 2, "seed": 3, "device": "cpu"}
RUN = {**SAMPLE, "chunk_chains": 4096}


@pytest.mark.parametrize("name", ["a.zarr", "a.npy"])
@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_stored_draws_are_those_of_one_call(tmp_path, name, engine):
    want = fast_sample(MODEL, **SAMPLE, engine=engine)
    sample_to(tmp_path / name, MODEL, **RUN, engine=engine)
    draws = open_draws(tmp_path / name)
    assert torch.equal(draws[:], want.draws)
    assert {option: draws.record["request"][option] for option in FLOW} == FLOW
    shown = read_shown(tmp_path / name, n_chains=5)
    assert shown.steps == (3, 6) and torch.equal(shown.states, want.draws[:5])


@pytest.mark.parametrize("name", ["a.zarr", "a.npy"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, name):
    for folder in ("whole", "broken"):
        (tmp_path / folder).mkdir()
    sample_to(tmp_path / "whole" / name, MODEL, **RUN)
    with pytest.raises(StreamInterruptedError):
        sample_to(tmp_path / "broken" / name, MODEL, **RUN, callback=stop_after(5000, KeyboardInterrupt))
    for option, other in (("steps", 4), ("noise_from", 0.7), ("noise_to", 0.3)):
        with pytest.raises(InputError, match=f"request.{option} was {FLOW[option]}, is now {other}"):
            sample_to(tmp_path / "broken" / name, MODEL, **RUN | {option: other})
    result = sample_to(tmp_path / "broken" / name, MODEL, **RUN)
    assert 0 < result.stats.new_chains < RUN["n_chains"], "nothing is computed twice"
    assert contents(tmp_path / "whole") == contents(tmp_path / "broken")
    assert sample_to(tmp_path / "whole" / name, MODEL, **RUN).stats is None


def test_parts_join_to_the_store_of_one_run(tmp_path):
    sizes = (4096, 4096 + 77)
    for i, n_chains in enumerate(sizes):
        sample_to(tmp_path / f"part{i}.zarr", MODEL, **RUN | {"n_chains": n_chains, "first_chain": 4096 * i})
    sample_to(tmp_path / "one.zarr", MODEL, **RUN)
    join_stores(tmp_path / "all.zarr", [tmp_path / "part1.zarr", tmp_path / "part0.zarr"])
    assert list(contents(tmp_path / "all.zarr").values()) == list(contents(tmp_path / "one.zarr").values())


def test_two_workers_write_what_one_process_writes(tmp_path):
    save_checkpoint(tmp_path / "m.safetensors", MODEL, ModelCard("m", sampling=FLOW))
    sample_to(tmp_path / "one.zarr", tmp_path / "m.safetensors", **RUN)
    options = (
        "--chains",
        str(RUN["n_chains"]),
        "--draws",
        "2",
        "--seed",
        "3",
        "--chunk-chains",
        "4096",
        "--no-picture",
    )
    command = [*TORCHRUN, "--nproc-per-node", "2", "-m", "kaleido_fast", "sample", "--model", "m.safetensors"]
    command += [*options, "--out", "two.zarr", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert list(contents(tmp_path / "two.zarr").values()) == list(contents(tmp_path / "one.zarr").values())


def test_a_record_that_names_no_sampler_is_of_a_kaleidoscope(tmp_path):
    """A run of an earlier version goes on, and joins one of this version; it is no flow."""
    run = {"n_chains": 4096 + 77, "burn_in": 2, "n_draws": 2, "chunk_chains": 4096, "device": "cpu"}
    path = tmp_path / "a.zarr"
    sample_to(path, MODEL, **run)
    stored = ZarrOutput.open(path).record
    earlier = {name: value for name, value in stored["request"].items() if name not in ADDED_LATER}
    assert len(earlier) == len(stored["request"]) - 4
    assert difference({**stored, "request": earlier}, stored) == ""
    flow = {**stored, "request": {**stored["request"], "sampler": "flow"}}
    assert difference({**stored, "request": earlier}, flow) == "request.sampler was kaleidoscope, is now flow"


def test_evaluate_reads_the_draws_of_a_flow(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("m.safetensors", MODEL, ModelCard("m", sampling=FLOW))
    sample_to("a.zarr", "m.safetensors", n_chains=30, n_draws=12, device="cpu")
    np.savez("d.npz", data=np.random.default_rng(0).random((40, 2, 2)))
    args = ("evaluate", "m.safetensors", "--held-out", "d.npz", "--no-classes", "--draws", "a.zarr")
    status, output, errors = call(monkeypatch, capsys, *args)
    assert status == 0, errors
    told = " ".join(output.split())
    assert "36 steps, 3 a draw, from noise 0.8 to 0.2, seed 0: residual" in told
    assert "moving" not in told and "R-hat" not in told
    assert json.loads(Path("evaluation.json").read_text())["mixing"] is None
