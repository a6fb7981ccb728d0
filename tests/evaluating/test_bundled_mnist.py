"""The bundled mnist: new digits of all classes, as far from the training digits as digits that it has not seen.

The bar, of 1,000 samples with the recommended settings against 1,000 held-out digits, k = 5, beside as many real ones:
precision and coverage no worse, entropy of classes >= 0.985 of its maximum, nearest training digit and authentic share
at least 0.95 and 0.9 times those of held-out digits, Fréchet distance at most 8 times that of real ones (the bundled
model: 5.9). The training of the slow test takes 5 minutes on two cores, and MNIST: see docs/data.md, or name an IDX
file of images in MNIST_IMAGES, whose labels lie beside it.
"""

from __future__ import annotations

import os
from dataclasses import asdict

import pytest

from kaleido_fast.checkpoint import Checkpoint, bundled_path, load_checkpoint
from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.evaluation import REAL, SAMPLES, evaluate
from kaleido_fast.evaluating.reference import find_reference
from kaleido_fast.presets import PRESETS, recipe_facts
from kaleido_fast.reading.datasets import built_in, load_dataset
from kaleido_fast.sampling import fast_sample
from kaleido_fast.training.trainer import train


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


@pytest.mark.slow
def test_retrained_mnist_meets_the_bar():
    source = os.environ.get("MNIST_IMAGES") or built_in("mnist")
    try:
        data = load_dataset(source)
    except InputError as problem:
        pytest.skip(f"MNIST is not at hand: {problem}")
    result = train(data, preset="mnist", seed=1)
    checkpoint = Checkpoint(result.model, result.card, "", bundled_path("mnist"))
    found = evaluate(checkpoint, find_reference(checkpoint, data), n_chains=1000, n_compared=1000)
    samples, real, new = found.sets[SAMPLES], found.sets[REAL], result.card.diagnostics["novelty"]
    print("\n", samples, "\n", real, "\n", new)
    figures, ceiling = asdict(samples), asdict(real)
    assert figures["precision"] >= 0.95 * ceiling["precision"]
    assert figures["coverage"] >= ceiling["coverage"]
    assert figures["entropy"] >= 0.985
    assert figures["frechet"] <= 8 * ceiling["frechet"]
    assert new["nearest"] >= 0.95 * new["nearest_held_out"]
    assert new["authentic"] >= 0.9 * new["authentic_held_out"]
