"""How good samples are: distances to real examples and how evenly the classes come up.

Precision and recall follow Kynkaanniemi et al. 2019 (arXiv 1904.06991), density and coverage Naeem et al. 2020
(arXiv 2002.09797): every point owns a ball that reaches its k-th nearest neighbour in its own set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kaleido_fast.errors import InputError

BLOCK_ROWS = 1024  # rows of a distance matrix held at once: 40 MB against 10,000 points


@dataclass(frozen=True)
class ManifoldScores:
    """Samples against real examples, both as clouds of points.

    Args:
        precision: share of samples inside some example's ball, 0 to 1.
        recall: share of examples inside some sample's ball, 0 to 1.
        density: mean number of examples' balls around a sample, divided by k; about 1 for real data, more for blur.
        coverage: share of examples whose ball holds a sample, 0 to 1.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(real: Tensor, samples: Tensor, *, k: int = 5) -> ManifoldScores:
    """Precision, recall, density and coverage of ``samples`` (n, D) against ``real`` (m, D).

    Memory is a few times ``BLOCK_ROWS`` x max(m, n) values.

    Raises:
        InputError: sets of different D, or with k or fewer points.
    """
    _check_sets(real, samples, k)
    real_radii, sample_radii = nearest_neighbour_radii(real, k), nearest_neighbour_radii(samples, k)
    inside_any, balls, recalled = 0, 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = torch.zeros_like(recalled)
    for block, radii in zip(samples.split(BLOCK_ROWS), sample_radii.split(BLOCK_ROWS), strict=True):
        distances = exact_distances(block, real)
        inside = distances <= real_radii
        inside_any += int(inside.any(dim=1).sum())
        balls += int(inside.sum())
        covered |= inside.any(dim=0)
        recalled |= (distances <= radii[:, None]).any(dim=0)
    return ManifoldScores(
        precision=inside_any / len(samples),
        recall=float(recalled.double().mean()),
        density=balls / (k * len(samples)),
        coverage=float(covered.double().mean()),
    )


def _check_sets(real: Tensor, samples: Tensor, k: int) -> None:
    if real.ndim != 2 or samples.ndim != 2 or real.shape[1] != samples.shape[1]:
        raise InputError(
            f"real examples {tuple(real.shape)} and samples {tuple(samples.shape)}: both must be (n, D) with one D"
        )
    if not 1 <= k < min(len(real), len(samples)):
        raise InputError(
            f"k = {k} neighbours among {len(real)} examples and {len(samples)} samples: "
            "k must be at least 1 and below both"
        )


def exact_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (n, m). Not by a matrix product, which loses small distances to cancellation."""
    return torch.cdist(a.float(), b.float(), compute_mode="donot_use_mm_for_euclid_dist")


def nearest_neighbour_radii(points: Tensor, k: int) -> Tensor:
    """Distance of every point (n, D) to its k-th nearest other point: (n,)."""
    radii = [exact_distances(block, points).kthvalue(k + 1, dim=1).values for block in points.split(BLOCK_ROWS)]
    return torch.cat(radii)


def nearest_example_mse(samples: Tensor, examples: Tensor) -> Tensor:
    """Mean squared difference of every sample (n, D) to its nearest example (m, D), in squared data units: (n,)."""
    return nearest_examples(samples, examples)[1]


def nearest_examples(samples: Tensor, examples: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest example (m, D) of every sample (n, D), and the mean squared difference to it: (n,), (n,)."""
    blocks = [exact_distances(block, examples).min(dim=1) for block in samples.split(BLOCK_ROWS)]
    distances = torch.cat([block.values for block in blocks])
    return torch.cat([block.indices for block in blocks]), distances.square() / samples.shape[1]


def class_shares(labels: Tensor, n_classes: int) -> Tensor:
    """Share of every class 0..n_classes-1 among ``labels`` (n,): (n_classes,), sums to 1."""
    return torch.bincount(labels.long(), minlength=n_classes).double() / len(labels)


def class_entropy(shares: Tensor) -> float:
    """Entropy of class shares (n_classes,), divided by its maximum: 1 when all are equal, 0 for a single class."""
    positive = shares[shares > 0].double()
    return float(-(positive * positive.log()).sum()) / math.log(len(shares))


def classify(samples: Tensor, examples: Tensor, labels: Tensor, *, seed: int = 0) -> Tensor:
    """Class of every sample (n, D) by 300 extremely randomised trees grown on labelled examples: int64 (n,).

    Give examples that the sampled model was not trained on.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import ExtraTreesClassifier
    except ImportError as problem:
        raise InputError("classes need scikit-learn: pip install 'kaleido-fast[data]'") from problem
    trees = ExtraTreesClassifier(n_estimators=300, random_state=seed)
    trees.fit(examples.cpu().numpy(), labels.cpu().numpy())
    return torch.from_numpy(trees.predict(samples.cpu().numpy())).long()
