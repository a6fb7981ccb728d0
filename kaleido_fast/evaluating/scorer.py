"""Scores of a set of points: all measures of it against real examples that were prepared once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from torch import Tensor

from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.classifier import Trees
from kaleido_fast.evaluating.diagnostics import evenly
from kaleido_fast.evaluating.feature_distance import LEAST, FeatureDistance, find_distance
from kaleido_fast.evaluating.quality import (
    InkRange,
    authentic_share,
    class_entropy,
    class_shares,
    copying_z,
    manifold_scores,
    nearest_example_mse,
)
from kaleido_fast.evaluating.reference import Reference
from kaleido_fast.model import ModelSpec
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.running.result import quantiles
from kaleido_fast.showing.pictures import is_image_shape

MOST_UNSEEN = 10_000  # held-out examples whose distances to the training examples are found


@dataclass(frozen=True)
class SetScores:
    """Measures of one set of points (`kaleido_fast.evaluating.quality` and docs/quality.md have the definitions); None
    where the examples for one are missing.

    Args:
        n: points.
        precision, recall, density, coverage: against held-out examples.
        frechet: squared distance to held-out pictures in the features of a judge; of real data the mean of several
            sets of as many, the least and the largest of which are ``frechet_range``.
        nearest: mean squared difference to the nearest training example, by quantile, in squared units of half the
            data range.
        copying_z: in standard deviations; below -3 copies.
        authentic: share that are no copies.
        blank, blob: shares with less or more ink than any training example.
        entropy: of the classes, of its maximum.
        class_shares: by label.
        confidence: mean share of the trees' votes for the class that is chosen.
    """

    n: int
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    frechet: float | None = None
    frechet_range: tuple[float, float] | None = None
    nearest: dict[str, float] | None = None
    copying_z: float | None = None
    authentic: float | None = None
    blank: float | None = None
    blob: float | None = None
    entropy: float | None = None
    class_shares: dict[str, float] | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class Scorer:
    """Real examples, prepared once for scoring any number of sets of points; `of` makes one."""

    train: Tensor | None
    unseen: Tensor | None
    compared: Tensor
    k: int
    half: float
    unseen_mse: Tensor | None
    ink: InkRange | None
    trees: Trees | None
    distance: FeatureDistance | None
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls, reference: Reference, spec: ModelSpec, n_compared: int, k: int, seed: int, classes: bool | None
    ) -> Scorer:
        """Prepare the examples; arguments and errors are those of `evaluate`."""
        train = None if reference.train is None else reference.train.data
        unseen = None if reference.held_out is None else evenly(reference.held_out.data, MOST_UNSEEN)
        both = unseen if unseen is not None else train
        assert both is not None
        compared = evenly(both, n_compared)
        trees, notes = _grow(reference.held_out or reference.train, classes, seed)
        distance, why_none = (None, ()) if classes is False else find_distance(reference.held_out, seed)
        inked = is_image_shape(spec.sample_shape) and train is not None
        return cls(
            train,
            unseen,
            compared,
            k,
            (spec.high - spec.low) / 2,
            None if train is None or unseen is None else nearest_example_mse(unseen, train),
            InkRange.of(train) if inked and train is not None else None,
            trees,
            distance,
            (*notes, *why_none),
        )

    def score(self, points: Tensor) -> SetScores:
        """Measures of samples (n, D)."""
        scores = SetScores(len(points), **asdict(manifold_scores(self.compared, points, k=self.k)))
        scores = replace(scores, **self._looks(points), frechet=self._frechet(points))
        if self.train is None:
            return scores
        mse = nearest_example_mse(points, self.train)
        return replace(
            scores,
            nearest=quantiles(mse / self.half**2),
            copying_z=None if self.unseen_mse is None else copying_z(mse, self.unseen_mse),
            authentic=authentic_share(points, self.train) if len(self.train) > 1 else None,
        )

    def real(self, n: int) -> SetScores:
        """``n`` training examples, at most, in the place of samples; distances are those of held-out examples."""
        assert self.train is not None and self.unseen is not None and self.unseen_mse is not None
        points = evenly(self.train, n)
        scores = SetScores(len(points))
        if self.k < len(points):
            scores = SetScores(len(points), **asdict(manifold_scores(self.compared, points, k=self.k)))
        distances = [] if self.distance is None else self.distance.of_real(self.train, len(points))
        return replace(
            scores,
            nearest=quantiles(self.unseen_mse / self.half**2),
            authentic=authentic_share(self.unseen, self.train) if len(self.train) > 1 else None,
            frechet=fmean(distances) if distances else None,
            frechet_range=(min(distances), max(distances)) if distances else None,
            **self._looks(points),
        )

    def _frechet(self, points: Tensor) -> float | None:
        """Of as many samples as there are training examples, at most: it falls with their number."""
        if self.distance is None:
            return None
        return self.distance.distance(points if self.train is None else points[: max(len(self.train), LEAST)])

    def _looks(self, points: Tensor) -> dict[str, Any]:
        """Ink and classes."""
        looks: dict[str, Any] = {}
        if self.ink is not None:
            looks["blank"], looks["blob"] = self.ink.outside(points)
        if self.trees is not None:
            places, sure = self.trees.predict(points)
            shares = class_shares(places, len(self.trees.classes))
            looks["entropy"] = class_entropy(shares)
            looks["class_shares"] = dict(zip(map(str, self.trees.classes), shares.tolist(), strict=True))
            looks["confidence"] = float(sure.mean())
        return looks


def _grow(data: Dataset | None, classes: bool | None, seed: int) -> tuple[Trees | None, tuple[str, ...]]:
    """A classifier, or None with a note on why there is none; what was asked for and cannot be is refused."""
    if classes is False or data is None:
        return None, ()
    if data.labels is None:
        text = f"data {data.name} have no labels, so classes cannot be measured"
        if classes:
            raise InputError(f"{text}; give a file of labels")
        return None, (text,)
    try:
        return Trees(data.data, data.labels, seed=seed), ()
    except InputError as problem:
        if classes:
            raise
        return None, (f"no classes: {problem}",)
