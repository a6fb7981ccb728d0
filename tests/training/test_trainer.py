"""The trainer: toy presets succeed, runs resume exactly, the best weights are kept, unsuitable input is refused."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from small_training import SHORT, SMALL, StopAt

from kaleido_fast.checkpoint import load_checkpoint, save_checkpoint
from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.diagnostics import Diagnostics
from kaleido_fast.model import ModelSpec, model_hash
from kaleido_fast.presets import PRESETS
from kaleido_fast.reading.datasets import load_dataset
from kaleido_fast.sampling import fast_sample
from kaleido_fast.training.loop import TrainingInterruptedError
from kaleido_fast.training.recipe import recommended_sampling
from kaleido_fast.training.run import TrainingRun
from kaleido_fast.training.trainer import UnstableModelWarning, train

pytestmark = pytest.mark.filterwarnings("ignore::kaleido_fast.training.trainer.UnstableModelWarning")

# --- presets


@pytest.mark.parametrize(("name", "seed"), [("points1d", 0), ("points1d", 1), ("points2d", 0), ("points2d", 12345)])
def test_toy_presets_from_any_seed(name, seed, tmp_path):
    """All four points are stable, and chains from noise end on all of them and nowhere else."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnstableModelWarning)
        result = train(preset=name, seed=seed)
    figures = result.card.diagnostics
    assert figures["max_error"] < 0.02
    assert figures["spectral_radius_max"] < 1
    assert figures["stable_share"] == 1
    assert result.warnings == ()
    save_checkpoint(tmp_path / "toy.safetensors", result.model, result.card)
    final = fast_sample(tmp_path / "toy.safetensors", n_chains=200, seed=seed).final
    targets = load_dataset(PRESETS[name].dataset, bound=PRESETS[name].network.bound).data
    distance, nearest = torch.cdist(final.float(), targets).min(dim=1)
    assert float(distance.max()) < 0.03, f"chain {int(distance.argmax())} ended {float(distance.max())} off all points"
    shares = nearest.bincount(minlength=4) / 200
    assert float(shares.min()) > 0.05, f"basins hold {shares.tolist()}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["points1d", "points2d"])
@pytest.mark.parametrize("seed", range(2, 12))
def test_toy_presets_from_many_seeds(name, seed, tmp_path):
    test_toy_presets_from_any_seed(name, seed, tmp_path)


# --- same seed, same bits


def test_same_seed_same_bits_and_global_random_state_untouched(points):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = train(points, spec=SMALL, recipe=replace(SHORT, pair_mix=0.3, held_out=6), seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    np.random.seed(3)
    second = train(points, spec=SMALL, recipe=replace(SHORT, pair_mix=0.3, held_out=6), seed=5)
    assert model_hash(first.model) == model_hash(second.model)
    assert first.history == second.history
    assert first.card == second.card
    other = train(points, spec=SMALL, recipe=replace(SHORT, pair_mix=0.3, held_out=6), seed=6)
    assert model_hash(first.model) != model_hash(other.model)


def test_unstable_models_warn(points):
    with pytest.warns(UnstableModelWarning, match=r"model points: only \d+% of the training examples are stable"):
        result = train(points, spec=SMALL, recipe=replace(SHORT, steps=3))
    assert len(result.warnings) == 1
    assert result.card.sampling["jitter"] == pytest.approx(1.25 * 0.3)
    assert "as the recommended settings do" in result.warnings[0]
    stable = Diagnostics(0.3, 0.9, 0.97, 0.01, 24, 256)
    assert stable.problem() is None
    assert recommended_sampling(SHORT, stable)["jitter"] == 0
    for bad in (replace(stable, stable_share=0.4), replace(stable, spectral_radius_median=1.2)):
        assert bad.problem() is not None


# --- the result, and bad input


def test_result_makes_a_checkpoint(points, tmp_path):
    result = train(points, spec=SMALL, recipe=SHORT)
    save_checkpoint(tmp_path / "m.safetensors", result.model, result.card)
    back = load_checkpoint(tmp_path / "m.safetensors")
    assert back.card == result.card
    assert back.card.dataset == {"name": "points", "sha256": points.sha256, "n_examples": 23}
    assert asdict(SHORT).items() <= back.card.recipe.items()
    assert not result.model.training
    assert not any(parameter.grad is not None for parameter in result.model.parameters())


def test_training_by_path(tmp_path):
    np.save(tmp_path / "x.npy", np.linspace(-0.9, 0.9, 12).reshape(6, 2))
    result = train(tmp_path / "x.npy", spec=ModelSpec((2, 9, 2)), recipe=SHORT)
    assert result.card.dataset["name"] == "x.npy"
    assert result.card.dataset["n_examples"] == 6


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({}, "nothing to train on"),
        ({"preset": "digitz"}, "did you mean 'digits'"),
        ({"preset": "points1d", "recipe": "publishd"}, "did you mean 'published'"),
        ({"preset": "points1d", "seed": -1}, "seed"),
        ({"preset": "points1d", "seed": 2**64}, "seed"),
        ({"preset": "points1d", "seed": 1.0}, "seed"),
        ({"preset": "points1d", "device": "gpu"}, "device"),
        ({"preset": "points1d", "spec": SMALL}, "5"),
        ({"dataset": "points2d", "preset": "points1d"}, "2 values"),
        ({"preset": "points1d", "state": "."}, "folder"),
        ({"preset": "points1d", "state": "no/such/state"}, "does not exist"),
    ],
)
def test_refused_arguments(options, part):
    with pytest.raises(InputError, match=part):
        train(**options)


def test_data_outside_of_the_network_range(points):
    with pytest.raises(InputError, match="bound='sigmoid'"):
        train(points, spec=replace(SMALL, bound="sigmoid", low=0.0, high=1.0))
    with pytest.raises(InputError, match="held_out"):
        train(points, spec=SMALL, recipe=replace(SHORT, held_out=23))


def test_divergence_is_said(points):
    """Weights as large as fp32 holds give an infinite hidden layer, and NaN after it."""
    run = TrainingRun(points, SMALL, SHORT, 0, torch.device("cpu"))
    with torch.no_grad():
        for layer in run.model.linears:
            layer.weight.fill_(3e38)
    with pytest.raises(
        InputError, match=r"training diverged: after 1 steps .* held-out error nan; lower learning_rate"
    ):
        run.advance()


@pytest.mark.gpu
def test_training_on_a_gpu(points, tmp_path):
    whole = train(points, spec=SMALL, recipe=SHORT, device="cuda")
    with pytest.raises(TrainingInterruptedError):
        train(points, spec=SMALL, recipe=SHORT, device="cuda", state=tmp_path / "s", callback=StopAt(31))
    resumed = train(points, spec=SMALL, recipe=SHORT, device="cuda", state=tmp_path / "s")
    assert resumed.history == whole.history
    assert model_hash(resumed.model) == model_hash(whole.model)
