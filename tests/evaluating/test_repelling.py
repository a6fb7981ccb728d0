"""States on which chains rest though they repel are no attractors: not in the catalogue, not among stable examples."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_fast import KaleidoMLP, ModelCard, ModelSpec, Scaling, attractors, fast_sample, save_checkpoint
from kaleido_fast.evaluating.attractors import ATTRACTOR, REPELS, UNMEASURED, Catalogue, recovered
from kaleido_fast.evaluating.diagnostics import diagnose, spectral_radii, stable_examples


def slope(value: float, dim: int = 1) -> KaleidoMLP:
    """tanh(value * x): 0 is an exact fixed point, where the Jacobian is ``value`` times the identity."""
    model = KaleidoMLP(ModelSpec((dim, dim), bias=(False,), sample_shape=(2, dim // 2) if dim > 1 else (1,)))
    with torch.no_grad():
        model.linears[0].weight.copy_(value * torch.eye(dim))
    return model.eval()


@settings(max_examples=12, deadline=None)
@given(st.floats(0.05, 3).filter(lambda value: abs(value - 1) > 0.02), st.sampled_from((-1.0, 1.0)))
def test_an_exact_fixed_point_attracts_where_its_radius_is_below_1_alone(size, sign):
    """-1.5 x changes its side every step, and 0 repels all the same."""
    model = slope(size * sign)
    catalogue = attractors(fast_sample(model, n_chains=2, z0=torch.zeros(2, 1), engine="reference"), model)
    assert catalogue.kinds == [ATTRACTOR if size < 1 else REPELS]
    assert catalogue.counted(ATTRACTOR) == ((1, 2) if size < 1 else (0, 0))
    zero = torch.zeros(1, 1)
    assert bool(stable_examples(model, zero)) == bool(recovered(model, zero, 0.0, engine="reference"))
    if abs(size - 1) > 0.1:  # nearer to 1 the first 300 steps do not tell
        assert bool(stable_examples(model, zero)) == (size < 1)


def test_a_repelling_cycle_is_no_attractor():
    """tanh(-1.5 x) has a cycle of two, which attracts, around 0, which repels; f(x) = -x everywhere is on the edge."""
    model = slope(-1.5)
    starts = torch.tensor([[0.0], [0.5], [-0.5], [0.9]])
    catalogue = attractors(fast_sample(model, n_chains=4, z0=starts, engine="reference"), model)
    assert dict(zip(catalogue.periods.tolist(), catalogue.kinds, strict=True)) == {2: ATTRACTOR, 1: REPELS}
    assert catalogue.counts.tolist() == [3, 1]


def test_what_was_not_measured_is_called_so_and_rows_agree_with_counts():
    radii = torch.tensor([0.2, 1.0, 1.4, math.nan])
    periods, counts = torch.ones(4, dtype=torch.int32), torch.tensor([5, 3, 2, 1])
    catalogue = Catalogue(torch.zeros(4, 1), counts, periods, radii, None, None, 12, 11)
    assert catalogue.kinds == [ATTRACTOR, REPELS, REPELS, UNMEASURED]
    rows = catalogue.rows()
    assert [row["kind"] for row in rows] == catalogue.kinds
    assert [row["spectral_radius"] is None for row in rows] == [False, False, False, True]
    for kind in (ATTRACTOR, REPELS, UNMEASURED):
        chains = [row["chains"] for row in rows if row["kind"] == kind]
        assert catalogue.counted(kind) == (len(chains), sum(chains))


def test_the_sheet_says_which_states_repel():
    dim = 16
    spec = ModelSpec((dim, dim), sample_shape=(4, 4))
    states, counts = torch.zeros(2, dim), torch.tensor([60, 40])
    periods = torch.ones(2, dtype=torch.int32)
    holds = Catalogue(states, counts, periods, torch.tensor([0.5, 0.5]), None, None, 100, 100)
    repels = Catalogue(states, counts, periods, torch.tensor([0.5, 1.5]), None, None, 100, 100)
    sheets = [np.asarray(found.sheet(KaleidoMLP(spec), Scaling())) for found in (holds, repels)]
    assert sheets[0].shape != sheets[1].shape or not np.array_equal(*sheets)


def test_the_command_calls_nothing_an_attractor_that_repels(tmp_path, monkeypatch, capsys):
    """At a residual of 0.01 chains near 0 rest, where tanh(1.05 x) has slope 1.05; 0.37 and -0.37 attract."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint("m.safetensors", slope(1.05), ModelCard())
    args = ("attractors", "--model", "m.safetensors", "--chains", "300", "--engine", "reference", "--tol", "0.01")
    status, output, _ = call(monkeypatch, capsys, *args)
    assert status == 0
    facts = json.loads(Path("attractors.json").read_text())
    assert facts["other_end_states"], "chains rest near 0"
    assert all(row["spectral_radius"] < 1 for row in facts["attractors"])
    assert {row["kind"] for row in facts["other_end_states"]} == {"repels"}
    rows = facts["attractors"] + facts["other_end_states"]
    assert sum(row["chains"] for row in rows) == facts["n_settled"] == 300
    chains = sum(row["chains"] for row in facts["other_end_states"])
    text = " ".join(output.split())
    assert f"{len(facts['attractors'])} attractors; 300 of 300 chains arrived" in text
    assert f"{len(facts['other_end_states'])} end states ({chains} chains) repel" in text


@pytest.mark.parametrize("example", [0.0, 0.9])
def test_training_examples_that_repel_are_not_stable(example):
    """A plain loss of 0 makes every example an exact fixed point, whatever the slope there."""
    model = slope(3.0, dim=4)
    point = torch.full((1, 4), example)
    end = point.clone()
    for _ in range(500):
        end = model(end).detach()
    found = diagnose(model, end)
    assert found.stable_share == float(spectral_radii(model, end) < 1)
    assert found.stable_share == (0 if example == 0 else 1)
