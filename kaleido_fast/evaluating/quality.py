"""How good samples are: measures of a cloud of samples against real examples.

Definitions, their papers and what each measure can be fooled by: docs/quality.md. All work in blocks: 100,000 samples
against 60,000 examples need no more memory than the points themselves and a few blocks of distances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.neighbours import check_points, distance_blocks, nearest
from kaleido_fast.scalars import plain_number


@dataclass(frozen=True)
class ManifoldScores:
    """Samples against real examples, both as clouds of points.

    Precision and recall follow Kynkaanniemi et al. 2019 (arXiv 1904.06991), density and coverage Naeem et al. 2020
    (arXiv 2002.09797): every point owns a ball that reaches its k-th nearest neighbour in its own set.

    Args:
        precision: share of samples inside some example's ball, 0 to 1.
        recall: share of examples inside some sample's ball, 0 to 1.
        density: mean number of examples' balls around a sample, divided by k; about 1 for real data, more for blur.
        coverage: share of examples whose ball holds a sample, 0 to 1. Grows with the number of samples.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(real: Tensor, samples: Tensor, *, k: int = 5) -> ManifoldScores:
    """Precision, recall, density and coverage of ``samples`` (n, D) against ``real`` (m, D).

    Raises:
        InputError: sets of different D, with k or fewer points, or with NaN.
    """
    k = plain_number(k)
    _check_sets(real, samples, k)
    real_radii, sample_radii = _ball_squares(real, k), _ball_squares(samples, k)
    precise = torch.zeros(len(samples), dtype=torch.bool, device=real.device)
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    balls = 0
    for rows, columns, squares in distance_blocks(samples, real):
        inside = squares <= real_radii[columns]
        balls += int(inside.sum())
        precise[rows] |= inside.any(dim=1)
        covered[columns] |= inside.any(dim=0)
        recalled[columns] |= (squares <= sample_radii[rows, None]).any(dim=0)
    return ManifoldScores(
        precision=float(precise.double().mean()),
        recall=float(recalled.double().mean()),
        density=balls / (k * len(samples)),
        coverage=float(covered.double().mean()),
    )


def _check_sets(real: Tensor, samples: Tensor, k: int) -> None:
    check_points("real examples", real)
    check_points("samples", samples)
    if real.shape[1] != samples.shape[1]:
        raise InputError(
            f"real examples {tuple(real.shape)} and samples {tuple(samples.shape)}: both must be (n, D) with one D"
        )
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k < min(len(real), len(samples)):
        raise InputError(
            f"k = {k} neighbours among {len(real)} examples and {len(samples)} samples: "
            "k (--k) must be at least 1 and below both"
        )


def _ball_squares(points: Tensor, k: int) -> Tensor:
    return nearest(points, points, k + 1)[0][:, k]  # the nearest is the point itself


def nearest_neighbour_radii(points: Tensor, k: int) -> Tensor:
    """Distance of every point (n, D) to its k-th nearest other point: (n,)."""
    return _ball_squares(points, k).sqrt()


def nearest_example_mse(samples: Tensor, examples: Tensor) -> Tensor:
    """Mean squared difference of every sample (n, D) to its nearest example (m, D), in squared data units: (n,)."""
    return nearest_examples(samples, examples)[1]


def nearest_examples(samples: Tensor, examples: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest example (m, D) of every sample (n, D), and the mean squared difference to it: (n,), (n,)."""
    squares, indices = nearest(samples, examples)
    return indices[:, 0], squares[:, 0] / samples.shape[1]


def copying_z(samples: Tensor, held_out: Tensor) -> float:
    """Data-copying test of Meehan, Chaudhuri and Dasgupta 2020 (arXiv 2004.05675), over the whole space at once.

    The Mann-Whitney statistic of two sets of distances to the nearest training example, in standard deviations, ties
    counted half: below -3 samples lie nearer to the training data than fresh data does (copies), near 0 they lie
    as fresh data does, above 3 they lie further away. It grows with the square root of the numbers.

    Args:
        samples: (n,) distances of samples, or any increasing function of them.
        held_out: (m,) the same of examples that the model has not seen.

    Raises:
        InputError: an empty set.
    """
    n, m = len(samples), len(held_out)
    if not n or not m:
        raise InputError(f"copying test of {n} samples and {m} held-out examples: give at least one of each")
    values, ranks, counts = torch.cat((samples, held_out)).double().unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    middle = counts.cumsum(0) - (counts - 1) / 2  # mean rank of each value, from 1
    u = float(middle[ranks[:n]].sum()) - n * (n + 1) / 2
    total = n + m
    ties = float((counts**3 - counts).sum()) / (total * max(1, total - 1))
    variance = n * m / 12 * (total + 1 - ties)
    return (u - n * m / 2) / math.sqrt(variance) if len(values) > 1 else 0.0


def authentic_share(samples: Tensor, examples: Tensor) -> float:
    """Share of samples (n, D) that are no copies by the test of Alaa et al. 2022 (arXiv 2102.08921): 0 to 1.

    A sample counts as a copy of its nearest training example (m, D) when it lies nearer to it than that example's
    nearest other training example does. About 0.5 for fresh data.

    Raises:
        InputError: fewer than two examples, sets of different D, or NaN.
    """
    _check_sets(examples, samples.repeat(2, 1) if len(samples) == 1 else samples, 1)
    index, mse = nearest_examples(samples, examples)
    found, place = index.unique(return_inverse=True)  # of 60,000 examples few are the nearest of a sample
    own = nearest(examples[found], examples, 2)[0][:, 1] / examples.shape[1]
    return float((mse >= own[place]).double().mean())


@dataclass(frozen=True)
class InkRange:
    """Mean values of real examples: samples below all of them are blanks, above all of them blobs.

    Args:
        low, high: the lowest and the highest mean value of an example, in data units.
    """

    low: float
    high: float

    @classmethod
    def of(cls, examples: Tensor) -> InkRange:
        """The range of examples (m, D)."""
        ink = examples.float().mean(dim=1)
        return cls(float(ink.min()), float(ink.max()))

    def outside(self, samples: Tensor) -> tuple[float, float]:
        """Shares of samples (n, D) below and above the range."""
        ink = samples.float().mean(dim=1)
        return float((ink < self.low).double().mean()), float((ink > self.high).double().mean())


def class_shares(labels: Tensor, n_classes: int) -> Tensor:
    """Share of every class 0..n_classes-1 among ``labels`` (n,): (n_classes,), sums to 1."""
    return torch.bincount(labels.long(), minlength=n_classes).double() / len(labels)


def class_entropy(shares: Tensor) -> float:
    """Entropy of class shares (n_classes,), divided by its maximum: 1 when all are equal, 0 for a single class.

    Raises:
        InputError: fewer than two classes.
    """
    if len(shares) < 2:
        raise InputError(f"entropy of {len(shares)} class: at least two are needed")
    positive = shares[shares > 0].double()
    return abs(float((positive * positive.log()).sum())) / math.log(len(shares))
