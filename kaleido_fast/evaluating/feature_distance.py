"""Fréchet distances of samples to held-out pictures, in the features of a judge that was trained on others of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.diagnostics import evenly
from kaleido_fast.evaluating.frechet import Gaussian, frechet_distance
from kaleido_fast.evaluating.judge import N_FEATURES, Judge, train_judge
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.showing.pictures import is_image_shape

LEAST = 2 * N_FEATURES  # points of a set: fewer leave most of a covariance unknown
MOST_HELD_OUT = 10_000  # half of them teach the judge, half are compared with
MOST_SETS = 8  # of real examples: with 1,000 digits each their distances lie between 0.33 and 0.77


@dataclass(frozen=True)
class FeatureDistance:
    """Measures sets of pictures against held-out ones; `of` makes one.

    The judge has seen neither the samples nor the training examples nor the examples compared with. Distances are in
    units in which a feature of those has variance 1 on average.

    Args:
        judge: trained on one half of the held-out examples.
        compared: mean and covariance of the features of the other half.
        unit: mean variance of these features.
        n_compared: how many those are.
        accuracy: share of them whose class the judge tells rightly.
    """

    judge: Judge
    compared: Gaussian
    unit: float
    n_compared: int
    accuracy: float

    @classmethod
    def of(cls, held_out: Dataset, *, seed: int = 0) -> FeatureDistance:
        """Train the judge; every second example is compared with.

        Raises:
            InputError: examples that are no pictures, without classes, or too few.
        """
        if not is_image_shape(held_out.sample_shape):
            raise InputError(f"examples of shape {held_out.sample_shape} are no pictures")
        if held_out.labels is None:
            raise InputError("the held-out examples have no classes")
        if len(held_out) < 2 * LEAST:
            raise InputError(f"{len(held_out)} held-out examples: {2 * LEAST} or more are needed")
        rows = evenly(torch.arange(len(held_out)), MOST_HELD_OUT)
        taught, others = held_out.take(rows[::2]), held_out.take(rows[1::2])
        assert taught.labels is not None and others.labels is not None
        judge = train_judge(taught.data, taught.labels, held_out.sample_shape, seed=seed)
        compared = Gaussian.of(judge.features(others.data))
        unit = max(float(compared.covariance.trace()) / N_FEATURES, 1e-12)
        return cls(judge, compared, unit, len(others), judge.accuracy(others.data, others.labels))

    def distance(self, points: Tensor) -> float | None:
        """Of pictures (n, D), at least 0; None for fewer than `LEAST`. It is biased upwards by about 1 / n."""
        if len(points) < LEAST:
            return None
        return frechet_distance(Gaussian.of(self.judge.features(points)), self.compared) / self.unit

    def of_real(self, examples: Tensor, n: int) -> list[float]:
        """Distances of up to `MOST_SETS` sets of ``n`` examples (m, D), none of which is in two of them."""
        sets = [examples[start :: len(examples) // n][:n] for start in range(min(MOST_SETS, len(examples) // n))]
        return [found for found in map(self.distance, sets) if found is not None]

    def facts(self) -> dict[str, Any]:
        """What the distance is measured with, as plain values."""
        return {
            "features": f"{N_FEATURES} features of a 2-layer CNN",
            "n_taught": self.judge.n_trained,
            "accuracy": self.accuracy,
            "n_compared": self.n_compared,
        }


def find_distance(held_out: Dataset | None, seed: int) -> tuple[FeatureDistance | None, tuple[str, ...]]:
    """The measure, or None with a note on why there is none."""
    if held_out is None:
        return None, ("no Fréchet distance: there are no held-out examples to teach its judge and to compare with",)
    try:
        return FeatureDistance.of(held_out, seed=seed), ()
    except InputError as problem:
        return None, (f"no Fréchet distance, which needs held-out pictures with classes: {problem}",)


def distance_words(facts: Mapping[str, Any], real_range: tuple[float, float] | None) -> str:
    """What the distance was measured with, in one line.

    Args:
        facts: of `FeatureDistance.facts`.
        real_range: of the distances of real examples, where they were measured.
    """
    words = (
        f"Fréchet distance: in {facts['features']} taught by {facts['n_taught']:,} held-out examples, "
        f"{facts['accuracy']:.1%} right on the {facts['n_compared']:,} others, which samples are compared with"
    )
    if real_range is None:
        return words
    low, high = (f"{value:.2f}" for value in real_range)
    return f"{words}; of as many real examples it is {low if low == high else f'{low} to {high}'}"
