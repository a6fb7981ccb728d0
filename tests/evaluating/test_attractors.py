"""The attractor catalogue on maps whose attractors are known."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_mlp
from known_maps import staircase
from odd_modules import sample
from torch import nn

from kaleido_fast import (
    Catalogue,
    InputError,
    KaleidoMLP,
    ModelCard,
    ModelSpec,
    Outcome,
    SampleResult,
    Scaling,
    attractors,
    fast_sample,
    save_checkpoint,
)
from kaleido_fast.cli import main


def test_basins_of_known_fixed_points_are_counted():
    model = staircase([-0.75, -0.25, 0.25, 0.75])
    result = fast_sample(model, n_chains=20_000)
    catalogue = attractors(result, model, data=torch.tensor([[0.75], [-0.75], [0.2]]))
    assert sorted(round(float(s), 4) for s in catalogue.states[:, 0]) == [-0.75, -0.25, 0.25, 0.75]
    assert int(catalogue.counts.sum()) == catalogue.n_settled == 20_000
    # uniform starts on four equal intervals: each count is binomial
    assert (catalogue.shares - 0.25).abs().max() < 5 * (0.25 * 0.75 / 20_000) ** 0.5
    assert (catalogue.radii < 0.01).all()
    top = {round(float(s), 2): int(i) for s, i in zip(catalogue.states[:, 0], catalogue.nearest, strict=True)}
    assert top == {0.75: 0, -0.75: 1, 0.25: 2, -0.25: 2}


def test_a_cycle_is_one_attractor_whatever_the_phase():
    # intervals 0 -> 2 -> 1 -> 0 run round a cycle of three; interval 3 keeps its own point
    model = staircase([0.25, -0.75, -0.25, 0.75])
    for retire in (False, True):
        result = fast_sample(model, n_chains=4000, burn_in=99, retire_cycles=retire)
        catalogue = attractors(result, model)
        assert catalogue.periods.tolist() == [3, 1]
        assert abs(float(catalogue.shares[0]) - 0.75) < 0.05
        assert torch.isfinite(catalogue.radii).all()


def test_radius_of_a_linear_map_is_its_slope():
    """tanh(w x) has slope w at its fixed point 0 for w < 1."""
    model = KaleidoMLP(ModelSpec((2, 2), bias=(False,)))
    with torch.no_grad():
        model.linears[0].weight.copy_(torch.tensor([[0.6, 0.3], [-0.3, 0.6]]))
    catalogue = attractors(fast_sample(model, n_chains=50, tol=1e-6), model)
    assert len(catalogue.counts) == 1
    assert abs(float(catalogue.radii[0]) - (0.6**2 + 0.3**2) ** 0.5) < 1e-3


def test_catalogue_does_not_depend_on_the_number_of_blocks():
    model = staircase([-0.75, -0.25, 0.25, 0.75])
    small = attractors(fast_sample(model, n_chains=3000), model)
    large = attractors(fast_sample(model, n_chains=30_000), model)
    assert sorted(small.states.flatten().tolist()) == pytest.approx(sorted(large.states.flatten().tolist()), abs=1e-4)


def made_up(states: torch.Tensor, periods: torch.Tensor, model: KaleidoMLP) -> SampleResult:
    """A result whose chains ended there."""
    kind = torch.where(periods > 1, Outcome.CYCLE, Outcome.FIXED_POINT).to(torch.int8)
    few = fast_sample(model, n_chains=1, burn_in=0)
    n = len(states)
    return replace(few, draws=states[:, None], residual=torch.zeros(n), period=periods.int(), outcome=kind)


def leaders_by_hand(states: torch.Tensor, periods: torch.Tensor, distance: float) -> list[tuple[int, int]]:
    """(first chain, count) of every leader, in order of discovery."""
    leaders: list[list[int]] = []
    for i, state in enumerate(states):
        for leader in leaders:
            rms = float((states[leader[0]] - state).square().mean().sqrt())
            if periods[leader[0]] == periods[i] and rms <= distance:
                leader[1] += 1
                break
        else:
            leaders.append([i, 1])
    return [(first, count) for first, count in leaders]


@pytest.mark.parametrize("dim", [2, 40])
@pytest.mark.parametrize("block", [1, 7, 50, 1024])
def test_end_states_join_the_first_attractor_that_is_near_enough(dim, block, monkeypatch):
    """Balls of the distance overlap, so that it matters which comes first; how results are cut does not."""
    generator = torch.Generator().manual_seed(dim)
    states = torch.rand(300, 2, generator=generator).repeat(1, dim // 2) * 1.8 - 0.9
    identity = KaleidoMLP(ModelSpec((dim, dim), bias=(False,)))
    monkeypatch.setattr("kaleido_fast.evaluating.attractors._BLOCK", block)
    found = attractors(made_up(states, torch.ones(300), identity), identity, distance=0.2)
    want = leaders_by_hand(states, torch.ones(300), 0.2)
    want.sort(key=lambda leader: -leader[1])
    assert len(want) > 10
    assert found.counts.tolist() == [count for _, count in want]
    assert torch.equal(found.states, states[[first for first, _ in want]])


def test_fixed_points_and_cycles_are_never_one_attractor():
    model = staircase([0.25, -0.75, -0.25, 0.75])
    catalogue = attractors(fast_sample(model, n_chains=400, burn_in=99), model, distance=1.9)
    assert catalogue.periods.tolist() == [3, 1]


def test_chains_that_move_are_in_no_attractor():
    model = staircase([-0.75, 0.75])
    result = fast_sample(model, n_chains=100)
    outcome = result.outcome.clone()
    outcome[:30], outcome[30:35] = Outcome.MOVING, Outcome.NON_FINITE
    catalogue = attractors(replace(result, outcome=outcome), model)
    assert (catalogue.n_chains, catalogue.n_settled) == (100, 65)
    assert float(catalogue.shares.sum()) == pytest.approx(0.65)


def test_more_attractors_than_the_catalogue_holds_are_refused(monkeypatch):
    monkeypatch.setattr("kaleido_fast.evaluating.attractors.MAX_ATTRACTORS", 20)
    identity = KaleidoMLP(ModelSpec((1, 1), bias=(False,)))
    states = torch.linspace(-0.9, 0.9, 21)[:, None]
    assert len(attractors(made_up(states[:20], torch.ones(20), identity), identity, distance=0.01).counts) == 20
    with pytest.raises(InputError, match="more than 20 distinct end states"):
        attractors(made_up(states, torch.ones(21), identity), identity, distance=0.01)


MEASURED = """
import resource, torch
from dataclasses import replace
from kaleido_fast import KaleidoMLP, ModelSpec, attractors, fast_sample
torch.set_num_threads(1)
model, n = KaleidoMLP(ModelSpec((784, 8, 784))), 60_000
ends = torch.rand(50, 784) * 2 - 1
draws = torch.empty(n, 1, 784)
for rows in torch.arange(n).split(1000):
    draws[rows, 0] = ends[rows % 50]
few = fast_sample(model, n_chains=1, burn_in=0, engine="reference")
def result(n):
    period = 1 + torch.arange(n, dtype=torch.int32) % 50 // 25
    parts = {"residual": torch.zeros(n), "period": period, "outcome": (period > 1).to(torch.int8)}
    return replace(few, draws=draws[:n], **parts)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
attractors(result(8192), model)
before = peak()
catalogue = attractors(result(n), model)
assert len(catalogue.counts) >= 26 and catalogue.n_settled == n
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_number_of_chains():
    """179 MiB of end states, of which no copy is made."""
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 40


def test_bad_input_is_named():
    model = staircase([-0.75, 0.75])
    result = fast_sample(model, n_chains=10)
    for distance in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"distance is {distance}"):
            attractors(result, model, distance=distance)
    with pytest.raises(InputError, match=re.escape("data of shape (4, 2): give (m, 1)")):
        attractors(result, model, data=torch.zeros(4, 2))
    jittered = fast_sample(model, n_chains=10, jitter=0.1)
    with pytest.raises(InputError, match="no chain of this run arrived: sample with jitter=0"):
        attractors(jittered, model)
    with pytest.raises(InputError, match="the model 3"):
        attractors(result, random_mlp(3, 4, 3))
    moving = fast_sample(random_mlp(4, 9, 4, scale=4.0), n_chains=5, burn_in=3, tol=1e-9)
    with pytest.raises(InputError, match="no chain of this run arrived"):
        attractors(moving, random_mlp(4, 9, 4))


def test_command_writes_the_catalogue_and_a_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("m.safetensors", random_mlp(4, 9, 4, scale=0.5, sample_shape=(2, 2)), ModelCard())
    monkeypatch.setattr(sys, "argv", ["kaleido-fast", "attractors", "--model", "m.safetensors", "--chains", "200"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "attractors; 200 of 200 chains arrived" in capsys.readouterr().out
    facts = json.loads((tmp_path / "attractors.json").read_text())
    assert sum(row["chains"] for row in facts["attractors"]) == 200
    assert sum(row["share"] for row in facts["attractors"]) == pytest.approx(1, abs=1e-12)
    assert facts["distance"] == 0.05
    assert (tmp_path / "attractors.png").is_file()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--distance", "inf"), "distance is inf: give a finite number"),
        (("--distance", "0"), "distance is 0.0"),
        (("--tol", "nan"), "tol is nan"),
        (("--tol", "-1"), "tol is -1.0"),
        (("--burn-in", "0"), "no chain of this run arrived"),
        (("--chains", "0"), "n_chains is 0"),
    ],
)
def test_command_refuses_bad_input_in_one_line(args, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kaleido-fast", "attractors", "--chains", "5", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(4, 4), (3, 5, 3)])
def test_sheet_has_a_cell_for_each_attractor_with_its_share_under_it(shape):
    dim = math.prod(shape)
    spec = ModelSpec((dim, dim), sample_shape=shape)
    n = 5
    states = torch.ones(n, dim) * torch.linspace(-1, 1, n)[:, None]
    blank = torch.zeros(n)
    periods = torch.tensor([1, 1, 7, 1, 1], dtype=torch.int32)
    catalogue = Catalogue(states, torch.tensor([50, 20, 10, 10, 5]), periods, blank, None, None, 100, 95)
    sheet = np.asarray(catalogue.sheet(KaleidoMLP(spec), Scaling()))
    for grey in (0, 64, 128, 191, 255):  # each state is drawn as an even area, enlarged by a whole factor
        side = 56 // max(shape[:2])
        assert (sheet == grey).all(axis=2).sum() >= shape[0] * shape[1] * side**2
    few = np.asarray(catalogue.sheet(KaleidoMLP(spec), Scaling(), most=2))
    assert few.size < sheet.size
    moved = replace(catalogue, periods=torch.ones(n, dtype=torch.int32))
    assert not np.array_equal(np.asarray(moved.sheet(KaleidoMLP(spec), Scaling())), sheet)  # "p7" is missing


def test_attractors_say_that_they_need_a_plain_mlp():
    result = sample(nn.Tanh(), burn_in=99, tol=1e-3)
    with pytest.raises(InputError, match="Tanh is neither a KaleidoMLP nor a Sequential"):
        attractors(result, nn.Tanh())
