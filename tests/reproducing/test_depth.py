"""The depth study at a small size: what stops training, what is counted, what the report says."""

from __future__ import annotations

import json

import pytest
import torch

from kaleido_fast.reproducing import depth, depth_trends
from kaleido_fast.reproducing.reproduction import reproduce
from kaleido_fast.reproducing.settings import Settings

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib")


@pytest.fixture
def small(monkeypatch, tmp_path) -> Settings:
    """Two depths, two seeds, 60 steps; the plain loss is within reach, the other is not."""
    monkeypatch.setattr(depth, "DEPTHS", (2, 4))
    monkeypatch.setattr(depth, "N_SEEDS", 2)
    plain, denoising = depth.TREATMENTS
    easy = depth.Treatment(plain.name, plain.title, 0.0, 0.4, plain.colour)
    hopeless = depth.Treatment(denoising.name, denoising.title, 0.3, 1e-6, denoising.colour)
    monkeypatch.setattr(depth, "TREATMENTS", (easy, hopeless))
    return Settings(steps=60, n_chains=40, cache=tmp_path / "cache", seed=3)


def test_report_of_a_small_study(small, tmp_path, monkeypatch):
    report = reproduce("depth", tmp_path / "out", small)
    facts = json.loads((report.folder / "report.json").read_text())
    rows = facts["rows"]
    assert [(row["treatment"], row["layers"], row["seed"]) for row in rows] == [
        (name, layers, seed) for name in ("plain", "denoising") for layers in (2, 4) for seed in (3, 4)
    ]
    for row in rows:
        assert row["reached"] == (row["treatment"] == "plain")
        assert row["reached"] == (row["training_steps"] < 60)
        assert not row["reached"] or row["loss"] <= 0.4
        assert row["fixed_point"] + row["cycle"] + row["moving"] + row["non_finite"] == pytest.approx(1)
    text = (report.folder / "report.md").read_text()
    assert "4 of 8 got there within 60 steps" in text
    assert "| reached the loss | 0 of 2 | 0 of 2 |" in text and "| reached the loss | 2 of 2 | 2 of 2 |" in text
    assert (report.folder / "depth.png").is_file()

    monkeypatch.setattr("kaleido_fast.training.run.TrainingRun.advance", lambda _: pytest.fail("trained again"))
    again = reproduce("depth", tmp_path / "again", small)
    assert json.loads((again.folder / "report.json").read_text())["rows"] == rows


def test_the_limit_keeps_what_load_dataset_keeps():
    digits = depth.load_dataset("digits")
    seen = depth.evenly_spaced(len(digits), 100)
    assert torch.equal(digits.data[seen], depth.load_dataset("digits", limit=100).data)


def rows_of(values: dict[int, list[float]]) -> list[dict]:
    return [
        {"treatment": "plain", "layers": layers, "coverage": value} for layers, many in values.items() for value in many
    ]


def test_trends():
    rising = rows_of({2: [0.1, 0.12], 4: [0.2, 0.25], 8: [0.3, 0.32], 16: [0.5, 0.6]})
    rho, p = depth.trend(rising, "plain", "coverage", 2)
    assert rho > 0.95 and p < 0.001
    assert depth.trend(rising, "plain", "coverage", 16) == (0.0, 1.0)
    assert depth.trend(rising, "denoising", "coverage", 2) == (0.0, 1.0)
    assert depth.trend(rows_of({2: [0.3], 4: [0.3], 8: [0.3]}), "plain", "coverage", 2) == (0.0, 1.0)


def test_findings_name_what_rises_and_what_falls():
    """By the sign that is better for each measure: fewer moving chains are better, less coverage is worse."""
    pairs = [(0.0, 1.0)] * len(depth.MEASURES)
    names = [measure.name for measure in depth.MEASURES]
    pairs[names.index("coverage")] = (-0.9, 1e-6)
    pairs[names.index("moving")] = (-0.9, 1e-6)
    pairs[names.index("density")] = (0.9, 1e-6)  # neither good nor bad
    text = depth._finding(depth.TREATMENTS[0], pairs, [(0.0, 1.0)] * len(pairs))
    assert "Better with more layers: chains still moving. Worse: coverage." in text
    assert "density" not in text and "from 6 layers on, better: nothing; worse: nothing" in text.lower()


def test_the_answer_in_short_follows_the_numbers():
    def rows(denoising: float) -> list[dict]:
        ends = (("plain", 2, 0.1), ("plain", 16, 0.3), ("denoising", 2, denoising), ("denoising", 16, 0.5))
        return [{"treatment": t, "layers": layers, "coverage": c, "stable": c / 2} for t, layers, c in ends]

    text = depth._in_short(rows(0.4))
    assert "2 to 16 layers: coverage 0.10 to 0.30, stable training examples 5% to 15%" in text
    assert "noise cover more than" in text
    assert "noise cover no more than" in depth._in_short(rows(0.2))
    assert "nothing to compare" in depth._in_short(rows(0.4)[:2])


def test_bars_are_one_standard_deviation_of_values_or_logarithms():
    assert depth_trends.centres_and_bars([[1.0, 3.0], [2.0]], False) == ([2, 2], [[pytest.approx(2**0.5), 0]] * 2)
    centres, (below, above) = depth_trends.centres_and_bars([[1e-6, 1e-2]], True)
    assert centres == [pytest.approx(1e-4)]
    assert 0 < below[0] < centres[0] < above[0]
    assert (centres[0] + above[0]) * (centres[0] - below[0]) == pytest.approx(1e-8)
