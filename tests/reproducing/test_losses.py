"""The published loss beside ours on the points: what counts as a point that attracts, what the reports say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from known_maps import staircase

from kaleido_fast import KaleidoMLP, ModelSpec
from kaleido_fast.presets import PRESETS
from kaleido_fast.reading.datasets import load_dataset
from kaleido_fast.reproducing.losses import AS_PUBLISHED, N_SEEDS, OURS, PUBLISHED, compare_losses, recipes, seeds
from kaleido_fast.reproducing.points import find_ends
from kaleido_fast.reproducing.settings import Settings

POINTS = load_dataset("points1d")


@pytest.mark.parametrize("name", ["points1d", "points2d"])
def test_the_recipes_differ_in_what_their_names_say(name):
    found = recipes(name)
    assert list(found) == [OURS, PUBLISHED, AS_PUBLISHED]
    assert found[PUBLISHED] == replace(found[OURS], noise=0.0), "the loss alone"
    assert found[OURS] == replace(PRESETS[name].recipe, attempts=1)
    assert found[OURS].noise > 0 == found[AS_PUBLISHED].noise
    assert {recipe.attempts for recipe in found.values()} == {1}, "one try each"


def test_seeds_begin_with_the_job_s_and_stay_in_range():
    for seed in (0, 2**64 - 2):
        assert seeds(Settings(seed=seed))[0] == seed
        assert len(set(seeds(Settings(seed=seed)))) == N_SEEDS
        assert all(0 <= one < 2**64 for one in seeds(Settings(seed=seed)))


def test_points_that_attract_hold_the_chains_that_end_there():
    model = staircase([-0.8, -0.2, 0.2, 0.8])
    final = torch.tensor([-0.8, -0.8, 0.2, 0.8, 0.0])[:, None]
    ends = find_ends(final, POINTS.data)
    assert ends.held(model, final) == pytest.approx(ends.shares)
    assert ends.shares == pytest.approx([0.4, 0.0, 0.2, 0.2])


def test_a_chain_that_rests_on_a_point_that_repels_is_not_held():
    """tanh(1.5 x) crosses the diagonal at 0, where it is steeper, and where a chain that starts there stays."""
    model = KaleidoMLP(ModelSpec((1, 1), bias=(False,)))
    with torch.no_grad():
        model.linears[0].weight.fill_(1.5)
    points = torch.tensor([[0.0], [0.8586]])
    final = torch.tensor([[0.0], [0.0], [0.8586]])
    ends = find_ends(final, points)
    assert ends.shares == pytest.approx([2 / 3, 1 / 3])
    assert ends.held(model, final) == pytest.approx([0.0, 1 / 3])
    nowhere = torch.full((2, 1), 0.5)
    assert find_ends(nowhere, points).held(model, nowhere) == [0.0, 0.0]


def test_each_loss_trains_a_network_a_seed_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("kaleido_fast.reproducing.losses.N_SEEDS", 2)
    settings = Settings(cache=tmp_path, steps=3, n_chains=20, device="cpu", seed=5)
    found = compare_losses(settings, "points1d", POINTS, "uniform")
    networks = [one.made.checkpoint for of_loss in found.values() for one in of_loss]
    assert len({network.model_hash for network in networks}) == 6
    assert [network.card.recipe["seed"] for network in networks] == [5, 6] * 3
    for of_loss in found.values():
        for one in of_loss:
            assert one.n_attracting == sum(share > 0 for share in one.held) <= 4
            assert all(held <= share for held, share in zip(one.held, one.ends.shares, strict=True))


def test_the_committed_reports_say_what_was_measured():
    """Ours attracts at every point, whatever the seed; the published loss in 1-D never does at all four."""
    folder = Path(__file__).parents[2] / "docs" / "reproduced"
    for name in ("points1d", "points2d"):
        facts = json.loads((folder / name / "report.json").read_text())["losses"]
        assert facts[OURS]["n_attracting"] == [4] * N_SEEDS
        text = (folder / name / "report.md").read_text()
        for title, found in facts.items():
            counts = sorted(set(found["n_attracting"]))
            reach = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            assert f"With {title} {reach} of 4 points attract" in text
            assert found["recipe"]["noise"] == recipes(name)[title].noise
