"""The Fréchet distance of two clouds of features: one number that sees blur, noise and missing classes at once.

Definition, paper and what it can be fooled by: docs/quality.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.neighbours import check_points


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution.

    Args:
        mean: (d,) fp64.
        covariance: (d, d) fp64, symmetric, no negative eigenvalue.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, points: Tensor) -> Gaussian:
        """Mean and covariance of points (n, d), the sums of which are divided by n - 1.

        Raises:
            InputError: fewer than two points, or NaN.
        """
        check_points("features", points)
        if len(points) < 2:
            raise InputError("a covariance of one point: give two or more")
        points = points.double()
        mean = points.mean(dim=0)
        centred = points - mean
        return cls(mean, centred.T @ centred / (len(points) - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two normal distributions, as Heusel et al. 2017 (arXiv 1706.08500) use it:
    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``, in squared units of the features; 0 when they are equal.

    The trace of the root is the sum of the roots of the eigenvalues of ``C_a^(1/2) C_b C_a^(1/2)``, which is symmetric:
    those of ``C_a C_b`` are the same but are not found as well where a covariance is singular.

    Raises:
        InputError: different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"Fréchet distance of {len(a.mean)} and {len(b.mean)} features: both must have as many")
    root = _root(a.covariance)
    between = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    apart = (a.mean - b.mean).square().sum()
    return max(0.0, float(apart + a.covariance.trace() + b.covariance.trace() - 2 * between))


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T
