"""The bundled mnist: new digits of all classes, as far from the training digits as digits that it has not seen.

The bar, of 1,000 samples with the recommended settings against 1,000 held-out digits, k = 5, beside as many real ones:
precision and coverage no worse, entropy of classes >= 0.985 of its maximum, nearest training digit and authentic share
at least 0.95 and 0.9 times those of held-out digits, Fréchet distance at most 1.1 times that of real ones (this
training: 1.01). Of 8,000 digits alone: precision and coverage >= 0.97, entropy >= 0.985, nearest training digit >=
0.085, authentic share >= 0.45 (it has just that), Fréchet distance at most 1.5 times that of real ones (0.85).

The trainings of the slow tests take 5 minutes each on two cores, and MNIST: see docs/data.md, or name an IDX file of
images in MNIST_IMAGES, whose labels lie beside it.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import pytest
import torch

from kaleido_fast.checkpoint import Checkpoint, bundled_path, load_checkpoint
from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.evaluation import REAL, SAMPLES, evaluate
from kaleido_fast.evaluating.reference import Reference, find_reference
from kaleido_fast.presets import PRESETS, recipe_facts
from kaleido_fast.reading.datasets import Dataset, built_in, load_dataset
from kaleido_fast.sampling import fast_sample
from kaleido_fast.training.trainer import TrainResult, train


def test_what_is_shipped():
    assert bundled_path("mnist").stat().st_size <= 3_500_000
    card, preset = load_checkpoint("mnist").card, PRESETS["mnist"]
    assert card.dataset["n_examples"] == 60_000
    assert card.sampling == preset.sampling
    assert recipe_facts(card.recipe) == recipe_facts(asdict(preset.recipe)), "made by another recipe than the preset's"


def test_the_card_says_that_samples_are_new():
    found = load_checkpoint("mnist").card.diagnostics["novelty"]
    assert found["nearest"] >= 0.95 * found["nearest_held_out"]
    assert found["authentic"] >= 0.9 * found["authentic_held_out"]


def test_samples_are_pictures_of_ink_on_an_empty_ground():
    samples = fast_sample("mnist", n_chains=200).final
    ink = (samples > 0).float().mean(dim=1)
    assert samples.abs().max() <= 1
    assert float(ink.min()) > 0.02 and float(ink.max()) < 0.5 and 0.08 < float(ink.mean()) < 0.18
    empty = (samples < -0.9).float().mean()
    assert empty > 0.7, f"only {empty:.0%} of the ground is empty"


@pytest.fixture(scope="module")
def digits() -> Dataset:
    """MNIST, where it is at hand."""
    try:
        return load_dataset(os.environ.get("MNIST_IMAGES") or built_in("mnist"))
    except InputError as problem:
        pytest.skip(f"MNIST is not at hand: {problem}")


def figures_of(result: TrainResult, reference: Reference) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of 1,000 samples, and of as many training examples, against 1,000 held-out ones."""
    checkpoint = Checkpoint(result.model, result.card, "", bundled_path("mnist"))
    found = evaluate(checkpoint, reference, n_chains=1000, n_compared=1000)
    samples, real = (asdict(found.sets[name]) for name in (SAMPLES, REAL))
    print("\n", samples, "\n", real, "\n", result.card.diagnostics["novelty"])
    return samples, real


@pytest.mark.slow
def test_retrained_mnist_meets_the_bar(digits):
    result = train(digits, preset="mnist", seed=1)
    checkpoint = Checkpoint(result.model, result.card, "", bundled_path("mnist"))
    samples, real = figures_of(result, find_reference(checkpoint, digits))
    new = result.card.diagnostics["novelty"]
    assert samples["precision"] >= 0.95 * real["precision"]
    assert samples["coverage"] >= real["coverage"]
    assert samples["entropy"] >= 0.985
    assert samples["frechet"] <= 1.1 * real["frechet"]
    assert new["nearest"] >= 0.95 * new["nearest_held_out"]
    assert new["authentic"] >= 0.9 * new["authentic_held_out"]


@pytest.mark.slow
def test_few_digits_are_not_learnt_by_heart(digits):
    """8,000 random ones (even and odd rows of MNIST differ). Of 2,000 others half teach the judge."""
    rows = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    few, others = digits.take(rows[:8000]), digits.take(rows[8000:10_000])
    result = train(few, preset="mnist", seed=1)
    samples, real = figures_of(result, Reference(few, others))
    assert min(samples["precision"], samples["coverage"]) >= 0.97
    assert samples["entropy"] >= 0.985
    assert samples["frechet"] <= 1.5 * real["frechet"]
    assert samples["nearest"]["50%"] >= 0.085
    assert samples["authentic"] >= 0.45
