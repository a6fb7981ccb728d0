"""Scores against the definitions of their papers, written out in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_fast import quality
from kaleido_fast.errors import InputError
from kaleido_fast.quality import (
    class_entropy,
    class_shares,
    classify,
    manifold_scores,
    nearest_example_mse,
    nearest_neighbour_radii,
)


def cloud(n: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn((n, dim), generator=torch.Generator().manual_seed(seed)) + shift


def by_definition(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """Precision, recall, density, coverage, one sum at a time."""

    def distance(a, b):
        return np.sqrt(((a[:, None].astype("f8") - b[None].astype("f8")) ** 2).sum(-1))

    real_radii = np.sort(distance(real, real), axis=1)[:, k]
    fake_radii = np.sort(distance(fake, fake), axis=1)[:, k]
    between = distance(fake, real)
    inside = between <= real_radii
    return (
        np.mean([row.any() for row in inside]),
        np.mean([(between[:, i] <= fake_radii).any() for i in range(len(real))]),
        inside.sum() / (k * len(fake)),
        np.mean([inside[:, i].any() for i in range(len(real))]),
    )


@settings(max_examples=40, deadline=None)
@given(
    n_real=st.integers(7, 40), n_fake=st.integers(7, 40), dim=st.sampled_from([1, 2, 13]), k=st.integers(1, 6),
    shift=st.sampled_from([0.0, 0.7, 3.0]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_scores_follow_their_definitions(n_real, n_fake, dim, k, shift, seed):
    real, fake = cloud(n_real, dim, seed), cloud(n_fake, dim, seed + 1, shift)
    scores = manifold_scores(real, fake, k=k)
    expected = by_definition(real.numpy(), fake.numpy(), k)
    got = (scores.precision, scores.recall, scores.density, scores.coverage)
    assert got == pytest.approx(expected, abs=1e-12)


def test_blocks_do_not_change_the_scores(monkeypatch):
    real, fake = cloud(101, 5, 0), cloud(67, 5, 1, 0.5)
    whole = manifold_scores(real, fake), nearest_example_mse(fake, real)
    monkeypatch.setattr(quality, "BLOCK_ROWS", 13)
    assert manifold_scores(real, fake) == whole[0]
    assert torch.equal(nearest_example_mse(fake, real), whole[1])


def test_a_set_against_itself_and_far_away():
    real = cloud(50, 4, 0)
    same = manifold_scores(real, real)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    far = manifold_scores(real, real + 100)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_radii_leave_the_point_itself_out():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert nearest_neighbour_radii(line, 1).tolist() == [1, 1, 2, 4]
    assert nearest_neighbour_radii(line, 2).tolist() == [3, 2, 3, 6]


def test_nearest_example():
    examples = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    samples = torch.tensor([[0.0, 0.2], [1.0, 1.0], [2.0, 1.0]])
    torch.testing.assert_close(nearest_example_mse(samples, examples), torch.tensor([0.02, 0.0, 0.5]))


def test_class_entropy():
    assert class_shares(torch.tensor([0, 0, 1, 3]), 4).tolist() == [0.5, 0.25, 0, 0.25]
    assert class_entropy(torch.full((10,), 0.1)) == pytest.approx(1)
    assert class_entropy(torch.tensor([1.0, 0, 0])) == 0
    assert class_entropy(torch.tensor([0.5, 0.5, 0, 0])) == pytest.approx(math.log(2) / math.log(4))


def test_classes_of_clear_cases():
    pytest.importorskip("sklearn")
    examples = torch.cat([cloud(30, 3, 0, -3), cloud(30, 3, 1, 3)])
    labels = torch.arange(2).repeat_interleave(30)
    found = classify(torch.cat([cloud(20, 3, 2, -3), cloud(20, 3, 3, 3)]), examples, labels)
    assert found.tolist() == [0] * 20 + [1] * 20


@pytest.mark.parametrize(
    ("real", "fake", "k"),
    [((6, 3), (6, 4), 2), ((6,), (6,), 2), ((5, 3), (9, 3), 5), ((9, 3), (5, 3), 5), ((9, 3), (9, 3), 0)],
)
def test_refused_sets(real, fake, k):
    with pytest.raises(InputError):
        manifold_scores(torch.zeros(real), torch.zeros(fake), k=k)
