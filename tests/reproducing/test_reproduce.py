"""The paper's kaleidoscopes from one command each: quick, with few steps; and the figures that are claimed, slowly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import call, random_mlp
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kaleido_fast import ModelCard, ModelSpec, load_checkpoint, save_checkpoint
from kaleido_fast.evaluating.scorer import SetScores
from kaleido_fast.presets import TrainingRecipe
from kaleido_fast.reading.datasets import load_dataset
from kaleido_fast.reproducing import models
from kaleido_fast.reproducing.flows import Point, against_time, draw_curves, show_any
from kaleido_fast.reproducing.images import ShownModel, show_model, show_wanderers
from kaleido_fast.reproducing.models import cache_folder, trained, trained_for, trained_within
from kaleido_fast.reproducing.points import find_ends, sample_points, train_points
from kaleido_fast.reproducing.report import Report
from kaleido_fast.reproducing.settings import KALEIDOSCOPES, Settings

POINTS = load_dataset("points1d")
TINY = ModelSpec((1, 4, 1))


def links(text: str) -> list[str]:
    """Files that a Markdown text shows or links to."""
    return re.findall(r"\]\(([^)]+)\)", text)


@pytest.mark.parametrize("name", ["points1d", "points2d"])
def test_a_report_shows_files_that_are_there_and_its_figures_agree(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kaleido_fast.reproducing.losses.N_SEEDS", 2)
    args = ("reproduce", name, "--steps", "30", "--chains", "60", "--cache", str(tmp_path / "cache"))
    status, output, errors = call(monkeypatch, capsys, *args)
    assert status == 0, errors
    assert "on 2 CPU cores" in errors, "the time is said beforehand"
    folder = tmp_path / "reproduced" / name
    assert f"{name}/report.md" in output
    text, facts = (folder / "report.md").read_text(), json.loads((folder / "report.json").read_text())
    shown = links(text)
    assert len(shown) >= 4
    for file in shown:
        if file.endswith((".png", ".gif")):
            Image.open(folder / file).load()
    assert sorted(path.name for path in folder.iterdir()) == sorted({*shown, "report.md", "report.json"})
    assert facts["n_chains"] == 60
    assert sum(facts["basin_shares"]) <= 1
    assert f"{facts['chains_at_a_point']:,} of 60 chains" in text
    assert "## The published loss beside ours" in text
    assert list(facts["losses"]) == ["our loss", "the published loss", "the published loss and optimiser"]
    for title, found in facts["losses"].items():
        assert len(found["n_attracting"]) == 2
        assert (found["recipe"]["noise"] > 0) == (title == "our loss")
        assert f"With {title} " in text


def test_the_bundled_digits_are_reproduced(tmp_path, monkeypatch, capsys):
    args = ("reproduce", "digits", "--out", str(tmp_path / "d"), "--chains", "100", "--quiet")
    status, output, errors = call(monkeypatch, capsys, *args)
    assert (status, output, errors) == (0, "", "")
    text = (tmp_path / "d" / "report.md").read_text()
    assert set(links(text)) <= {path.name for path in (tmp_path / "d").iterdir()}
    scores = json.loads((tmp_path / "d" / "report.json").read_text())["evaluation"]["sets"]["samples"]
    assert scores["coverage"] > 0.4  # of 100 samples; 1,000 have 0.98
    assert f"{scores['coverage']:.2f}" in text


def test_mnist_compares_three_recipes_on_any_images_of_its_shape(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kaleido_fast.reproducing.flows.STEPS", (2, 5))
    images = (np.random.default_rng(0).random((60, 28, 28)) * 255).astype(np.uint8)
    np.savez(tmp_path / "few.npz", data=images, labels=np.arange(60) % 10)
    args = ("reproduce", "mnist", "--data", str(tmp_path / "few.npz"), "--steps", "2", "--chains", "12", "--quiet")
    status, _, errors = call(monkeypatch, capsys, *args, "--out", str(tmp_path / "m"), "--cache", str(tmp_path / "c"))
    assert (status, errors) == (0, "")
    text = (tmp_path / "m" / "report.md").read_text()
    for heading in ("Published recipe", "Attractors", "Flow", "More steps, more training"):
        assert f"## {heading}\n" in text
    rows = ("30 steps, published noise 0.01 after every step", "30 steps without noise", "300 steps without noise")
    for row in rows:
        assert f"| Published recipe: {row} |" in text
    assert "| Attractors: 50 steps, jitter 2 (3 clean steps before a draw) |" in text
    assert "| Flow: 20 steps, 20 a draw, from noise 0.95 to 0.3 |" in text
    report = json.loads((tmp_path / "m" / "report.json").read_text())
    facts = report["evaluations"]["published"]
    assert set(facts["runs"]) == {"samples", "short, without noise", "without jitter"}
    assert f"first row, coverage {facts['sets']['samples']['coverage']:.2f}" in text
    run = facts["runs"]["samples"]
    assert (run["burn_in"] + run["thin"], run["noise"], run["jitter"]) == (30, "upstream", 0.01)
    assert set(report["evaluations"]["flow"]["sets"]) == {"samples", "real data"}
    assert [point["x"] for point in report["by_steps"]] == [2, 5]
    assert report["by_training"][-1]["x"] == report["training_seconds"]["flow"]
    last = report["by_training"][-1]
    for name in ("coverage", "nearest", "authentic", "copying_z"):
        assert last[name] == report["evaluations"]["flow"]["sets"]["samples"][name], "one model, measured twice"
    assert set(links(text)) <= {path.name for path in (tmp_path / "m").iterdir()}


def test_a_model_is_trained_once_and_another_setting_trains_another(tmp_path):
    settings = Settings(cache=tmp_path, steps=5, device="cpu")
    first = trained(settings, "tiny", POINTS, TINY, TrainingRecipe(batch_size=4))
    again = trained(settings, "tiny", POINTS, TINY, TrainingRecipe(batch_size=4))
    other = trained(settings, "tiny", POINTS, TINY, TrainingRecipe(batch_size=4), seed=1)
    assert (first.reused, again.reused, other.reused) == (False, True, False)
    assert again.checkpoint.model_hash == first.checkpoint.model_hash != other.checkpoint.model_hash
    assert again.seconds == first.seconds
    assert not list(tmp_path.glob("*.training"))


def test_training_for_a_time_stops_by_the_clock_and_keeps_its_steps(tmp_path, monkeypatch):
    ticks = iter(range(10_000))
    monkeypatch.setattr(models, "training_clock", lambda device: (lambda: float(next(ticks)), "ticks"))
    settings = Settings(cache=tmp_path, device="cpu")
    made = trained_for(settings, "tiny", POINTS, TINY, TrainingRecipe(steps=1000, batch_size=4), seconds=20)
    assert 10 <= made.checkpoint.card.recipe["steps"] <= 21
    assert made.checkpoint.card.sampling == {}
    assert trained_for(settings, "tiny", POINTS, TINY, TrainingRecipe(steps=1000, batch_size=4), seconds=20).reused
    few = trained_for(settings, "few", POINTS, TINY, TrainingRecipe(steps=3, batch_size=4), seconds=1e9)
    assert few.checkpoint.card.recipe["steps"] == 3


def test_steps_are_fitted_to_a_time_and_kept_for_when_training_goes_on(tmp_path, monkeypatch):
    """A clock of one tick a look: two looks, one tick for the timed steps."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(models, "training_clock", lambda device: (lambda: float(next(ticks)), "ticks"))
    settings = Settings(cache=tmp_path, device="cpu")
    recipe = TrainingRecipe(steps=1000, batch_size=4, warmup=5, seconds=30)  # of its own, which are not followed
    noted = []

    def stopped(*args, **kwargs):
        noted.append(kwargs["recipe"].steps)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "train", stopped)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                trained_within(settings, "tiny", POINTS, TINY, recipe, seconds=0.5)
            monkeypatch.setattr(models, "TIMED_STEPS", 1000)  # would now be another number
    assert noted == [35, 35]
    made = trained_within(settings, "tiny", POINTS, TINY, recipe, seconds=0.5, sampling={"jitter": 0.1})
    assert made.steps == made.checkpoint.card.recipe["steps"] == 35 and made.checkpoint.card.sampling["jitter"] == 0.1
    assert trained_within(settings, "tiny", POINTS, TINY, recipe, seconds=0.5).reused
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    quick = trained_within(replace(settings, steps=3), "tiny", POINTS, TINY, recipe, seconds=0.5)
    assert quick.steps == 3


def test_shorter_trainings_make_parts_of_the_steps_that_were_made(tmp_path):
    class Counted:
        def score(self, points):
            return SetScores(len(points))

    pictures = np.random.default_rng(0).random((40, 4, 4))
    np.savez(tmp_path / "f.npz", data=pictures)
    data, settings = load_dataset(tmp_path / "f.npz"), Settings(cache=tmp_path / "c", device="cpu", n_chains=10)
    recipe = TrainingRecipe(kind="flow", batch_size=8, seconds=0.3, held_out=8)
    spec = ModelSpec((16, 8, 16), "silu", sample_shape=(4, 4))
    made = trained(settings, "f", data, spec, recipe, sampling={"sampler": "flow", "steps": 2})
    points = against_time(settings, "f", data, made, recipe, Counted())
    steps = [load_checkpoint(path).card.recipe["steps"] for path in (tmp_path / "c").iterdir()]
    assert sorted(steps)[:3] == sorted(max(1, round(share * made.steps)) for share in (0.125, 0.25, 0.5))
    assert len(points) == 4 and points[-1].x == made.seconds
    assert all(point.scores.n == 10 for point in points)


def test_a_flow_is_shown_and_judged_by_its_steps_and_its_training(tmp_path):
    model = random_mlp(16, 9, 16, sample_shape=(4, 4))
    save_checkpoint(tmp_path / "f.safetensors", model, ModelCard("f", sampling={"sampler": "flow", "steps": 3}))
    np.savez(tmp_path / "f.npz", data=np.random.default_rng(0).random((40, 4, 4)), labels=np.arange(40) % 4)
    data = load_dataset(tmp_path / "f.npz")
    report = Report("f", "A flow", tmp_path)
    show_any(Settings(), report, ShownModel("A flow", load_checkpoint(tmp_path / "f.safetensors"), data), data, "f")
    assert {path.name for path in report.written} == {"f-denoised.png", "f-steps.png", "f-chains.gif"}
    points = [Point(steps, SetScores(9, precision=steps / 9, nearest={"50%": 0.1})) for steps in (2, 5, 9)]
    figure = draw_curves(points, SetScores(9, precision=0.5), "steps")
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert panels["precision"].lines[0].get_xydata().tolist() == [[2, 2 / 9], [5, 5 / 9], [9, 1]]
    assert panels["precision"].lines[1].get_ydata()[0] == 0.5
    assert len(panels["nearest example"].lines) == 1 and not panels["Fréchet distance"].lines


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30))
def test_ends_are_the_nearest_points_and_shares_count_them(values):
    final = torch.tensor(values)[:, None]
    ends = find_ends(final, POINTS.data)
    far = (final - POINTS.data.T).abs()
    for row, basin in zip(far, ends.basin.tolist(), strict=True):
        assert basin == (int(row.argmin()) if row.min() <= 0.02 else -1)
    assert sum(ends.shares) == pytest.approx(float((ends.basin >= 0).double().mean()))


def test_colour_pictures_are_shown_throughout(tmp_path):
    model = random_mlp(48, 9, 48, sample_shape=(4, 4, 3))
    save_checkpoint(tmp_path / "c.safetensors", model, ModelCard("c", sampling={"jitter": 0.3, "burn_in": 4}))
    np.savez(tmp_path / "c.npz", data=np.random.default_rng(0).random((40, 4, 4, 3)), labels=np.arange(40) % 4)
    data = load_dataset(tmp_path / "c.npz")
    report = Report("c", "Colour", tmp_path)
    shown = ShownModel("Colour", load_checkpoint(tmp_path / "c.safetensors"), data)
    show_model(Settings(), report, shown, "c")
    show_wanderers(Settings(), report, shown, data, "c")
    for path in report.written:
        if path.suffix == ".png":
            assert Image.open(path).mode == "RGB"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("points3d",), "did you mean 'points2d'"),
        (("points1d", "--steps", "0"), "x>=1"),
        (("points1d", "--chains", "3"), "x>=10"),
        (("points1d", "--seed", "-1"), "seed -1"),
        (("points1d", "--device", "cuda:77"), "CUDA devices"),
        (("points1d", "--out", "no/where"), "does not exist"),
        (("points1d", "--out", "file"), "is a file"),
        (("mnist", "--data", "gone.npy"), "gone.npy"),
        (("mnist", "--data", "small.npy"), "the MNIST kaleidoscope takes (28, 28)"),
        (("mnist", "--data", "one.npy"), "examples"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, args, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    np.save("small.npy", np.zeros((50, 8, 8)))
    np.save("one.npy", np.zeros((1, 28, 28)))
    before = sorted(tmp_path.iterdir())
    status, output, errors = call(monkeypatch, capsys, "reproduce", *args, "--cache", str(tmp_path / "c"), "--quiet")
    assert (status, output, errors.count("\n")) == (2, "", 1), errors
    assert text in errors
    assert sorted(path for path in tmp_path.iterdir() if path.name != "c") == before, "an empty folder is left"


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch, capsys):
    from kaleido_fast.showing import plots

    monkeypatch.setattr(plots, "can_plot", lambda: False)
    status, _, errors = call(monkeypatch, capsys, "reproduce", "points1d", "--out", str(tmp_path / "p"), "--quiet")
    assert status == 2
    assert "kaleido-fast[plots]" in errors


def test_the_cache_follows_the_platform(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", os.sep + "somewhere")
    assert cache_folder().parts[1:] == ("somewhere", "kaleido-fast", "models")


@pytest.mark.parametrize("command", ["reproduce", "show", "animate"])
def test_help_does_not_load_torch(command):
    code = (
        "import sys; from kaleido_fast.cli import cli\n"
        f"try: cli.main([{command!r}, '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, "help imports torch or numpy"
    assert "Usage:" in result.stdout


def test_every_kaleidoscope_has_a_module_and_a_committed_report():
    import importlib
    from pathlib import Path

    reports = Path(__file__).parents[2] / "docs" / "reproduced"
    for name in KALEIDOSCOPES:
        assert callable(importlib.import_module(f"kaleido_fast.reproducing.{name}").run)
        text = (reports / name / "report.md").read_text()
        assert f"kaleido-fast reproduce {name}" in text
        for file in links(text):
            assert (reports / name / file).is_file(), f"{name}: {file} is not committed"
            assert (reports / name / file).stat().st_size < 300_000


def test_pages_link_to_files_that_are_there():
    from pathlib import Path

    root = Path(__file__).parents[2]
    for page in (root / "README.md", *(root / "docs").glob("*.md")):
        for link in links(page.read_text()):
            if not link.startswith(("http", "#")):
                assert (page.parent / link.split("#")[0]).is_file(), f"{page.name}: {link}"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "init"), [("points1d", "uniform"), ("points2d", "normal")])
@pytest.mark.parametrize("seed", range(10))
def test_every_point_attracts_with_every_seed(tmp_path, name, init, seed):
    settings = Settings(seed=seed, cache=tmp_path)
    data, made = train_points(settings, name)
    ends = find_ends(sample_points(settings, made, init, (0,)).final.cpu(), data.data)
    assert bool((ends.basin >= 0).all()), "a chain ends at no point"
    assert min(ends.shares) >= 0.15
