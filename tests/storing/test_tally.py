"""Figures of a run are counted by many and put together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_mlp
from hypothesis import given
from hypothesis import strategies as st

from kaleido_fast import ModelCard, fast_sample, save_checkpoint
from kaleido_fast.running.result import outcome_shares, quantiles, steps_histogram
from kaleido_fast.storing.tally import Tally
from kaleido_fast.storing.zarr_output import ZarrOutput

ROWS = st.tuples(st.floats(0, width=32) | st.just(float("nan")), st.integers(1, 300), st.integers(0, 3))
N = 4096 * 5 + 77
FIGURES = ("outcome_shares", "steps_quantiles", "steps_histogram", "chain_steps")


def counted(rows: list[tuple[float, int, int]]) -> Tally:
    """A tally of chains given as residual, steps, outcome."""
    tally = Tally()
    kinds = (np.float32, np.int32, np.int8)
    tally.add(*(np.array([row[i] for row in rows], kind) for i, kind in enumerate(kinds)))
    return tally


@given(st.lists(st.lists(ROWS, max_size=20), max_size=4))
def test_tallies_sent_to_another_process_add_up(parts):
    whole = Tally()
    for part in parts:
        whole.include(json.loads(json.dumps(counted(part).plain())))
    want = counted([row for part in parts for row in part])
    assert whole.outcome_shares() == want.outcome_shares()
    assert whole.steps_histogram() == want.steps_histogram()
    for name in ("steps_quantiles", "residual_quantiles"):
        assert np.array_equal(
            list(getattr(whole, name)().values()), list(getattr(want, name)().values()), equal_nan=True
        ), name


@given(st.lists(st.tuples(st.floats(0, 2**60, width=32), st.integers(1, 300), st.integers(0, 3)), max_size=60))
def test_tallies_are_those_of_all_chains(rows):
    residual = np.array([row[0] for row in rows], np.float32)
    steps, outcome = (np.array([row[i] for row in rows], kind) for i, kind in ((1, np.int32), (2, np.int8)))
    tally = Tally()
    for part in np.array_split(np.arange(len(rows)), 3):
        tally.add(residual[part], steps[part], outcome[part])
    tensors = torch.from_numpy(steps), torch.from_numpy(outcome)
    assert tally.outcome_shares() == outcome_shares(tensors[1])
    assert tally.steps_histogram() == steps_histogram(*tensors)
    assert list(tally.steps_quantiles().values()) == pytest.approx(
        list(quantiles(tensors[0].float()).values()), nan_ok=True
    )
    assert list(tally.residual_quantiles().values()) == pytest.approx(
        list(quantiles(torch.from_numpy(residual)).values()), rel=1e-3, abs=1e-38, nan_ok=True
    )


def sample_with_two(folder: Path) -> dict:
    """Two workers under torch's launcher: the figures that the first prints."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ("--model", "m.safetensors", "--chains", str(N), "--seed", "3", "--chunk-chains", "4096", "--json")
    command = [*launch, "-m", "kaleido_fast", "sample", *options, "--device", "cpu", "--out", "a.zarr"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_figures_of_two_workers_are_those_of_all_chains_also_after_an_interruption(tmp_path):
    pytest.importorskip("zarr")
    model = random_mlp(3, 5, 3, scale=3.0)
    save_checkpoint(tmp_path / "m.safetensors", model, ModelCard("m", sampling={"burn_in": 30}))
    want = fast_sample(tmp_path / "m.safetensors", n_chains=N, seed=3, device="cpu").stats
    first = sample_with_two(tmp_path)
    for name in FIGURES:
        assert first[name] == pytest.approx(getattr(want, name)), name
    output = ZarrOutput.open(tmp_path / "a.zarr", writable=True)
    for block in (1, 4, 5):
        output.forget(block)
    again = sample_with_two(tmp_path)
    for name in FIGURES[:3]:
        assert again[name] == pytest.approx(getattr(want, name)), name
    assert again["residual_quantiles"] == first["residual_quantiles"]
    assert again["chain_steps"] < first["chain_steps"], "three of six blocks were there"
