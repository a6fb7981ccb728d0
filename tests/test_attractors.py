"""The attractor catalogue on maps whose attractors are known."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import random_mlp

from kaleido_fast import InputError, KaleidoMLP, ModelCard, ModelSpec, attractors, fast_sample, save_checkpoint
from kaleido_fast.cli import main


def staircase(targets: list[float]) -> KaleidoMLP:
    """A map of the line that sends the i-th of equal intervals of [-1, 1] to ``targets[i]``, by steep hidden tanh."""
    n = len(targets)
    levels = torch.atanh(torch.tensor(targets, dtype=torch.float64))
    thresholds = torch.linspace(-1, 1, n + 1, dtype=torch.float64)[1:-1]
    model = KaleidoMLP(ModelSpec((1, n - 1, 1), activation="tanh"))
    with torch.no_grad():
        first, last = model.linears
        first.weight.fill_(400.0)
        first.bias.copy_(-400.0 * thresholds)
        jumps = levels.diff()
        last.weight.copy_((jumps / 2)[None])
        last.bias.fill_(float(levels[0] + jumps.sum() / 2))
    return model.eval()


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


def test_bad_input_is_named():
    model = staircase([-0.75, 0.75])
    result = fast_sample(model, n_chains=10)
    with pytest.raises(InputError, match="distance is 0"):
        attractors(result, model, distance=0)
    with pytest.raises(InputError, match="the model 3"):
        attractors(result, random_mlp(3, 4, 3))
    moving = fast_sample(random_mlp(4, 9, 4, scale=4.0), n_chains=5, burn_in=3, tol=1e-9)
    with pytest.raises(InputError, match="no chain of this run settled"):
        attractors(moving, random_mlp(4, 9, 4))


def test_command_writes_the_catalogue_and_a_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("m.safetensors", random_mlp(4, 9, 4, scale=0.5, sample_shape=(2, 2)), ModelCard())
    monkeypatch.setattr(sys, "argv", ["kaleido-fast", "attractors", "--model", "m.safetensors", "--chains", "200"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "attractors; 200 of 200 chains settled" in capsys.readouterr().out
    facts = json.loads((tmp_path / "attractors.json").read_text())
    assert sum(row["chains"] for row in facts["attractors"]) == 200
    assert (tmp_path / "attractors.png").is_file()
