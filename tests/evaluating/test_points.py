"""The points in 1-D and 2-D: whatever the seed, every training point attracts chains, and none but few.

The bar: each of 10 seeds, each of the four points is an attractor with a basin of at least 0.15 of the chains. Run
``pytest -m slow tests/evaluating/test_points.py -s`` to see the shares of all seeds.
"""

from __future__ import annotations

from typing import Any

import pytest

from kaleido_fast.presets import PRESETS
from kaleido_fast.reading.datasets import load_dataset
from kaleido_fast.reproducing.points import find_ends
from kaleido_fast.sampling import fast_sample
from kaleido_fast.training.trainer import train

LEAST_SHARE = 0.15


def check_basins(name: str, init: str, seed: int, n_chains: int) -> None:
    """Train a preset and count where chains end; the start noise is that of the paper's figures."""
    points = load_dataset(name, bound=PRESETS[name].network.bound).data
    result = train(preset=name, seed=seed)
    sampling: dict[str, Any] = dict(PRESETS[name].sampling)
    final = fast_sample(result.model, n_chains=n_chains, init=init, seed=seed, **sampling).final
    ends = find_ends(final.cpu(), points)
    shares = ", ".join(f"{share:.3f}" for share in ends.shares)
    print(f"\n{name} seed {seed} (attempt {result.card.recipe['attempt']}): shares {shares}")
    assert float(ends.distance.max()) < 0.02, f"a chain ended {float(ends.distance.max()):.3f} from every point"
    assert min(ends.shares) >= LEAST_SHARE, shares


@pytest.mark.parametrize(("name", "init"), [("points1d", "uniform"), ("points2d", "normal")])
def test_every_point_attracts(name, init):
    check_basins(name, init, seed=0, n_chains=2000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("name", "init"), [("points1d", "uniform"), ("points2d", "normal")])
def test_every_point_attracts_for_ten_seeds(name, init, seed):
    check_basins(name, init, seed, n_chains=10_000)
