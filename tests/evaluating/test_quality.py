"""Scores against the definitions of their papers, written out in numpy."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_fast.errors import InputError
from kaleido_fast.evaluating import neighbours
from kaleido_fast.evaluating.classifier import Trees, classify
from kaleido_fast.evaluating.quality import (
    InkRange,
    authentic_share,
    class_entropy,
    class_shares,
    copying_z,
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
    n_real=st.integers(7, 40), n_fake=st.integers(7, 40), dim=st.sampled_from([1, 2, 13, 40]), k=st.integers(1, 6),
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
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 13)
    monkeypatch.setattr(neighbours, "BLOCK_COLUMNS", 9)
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


@pytest.mark.parametrize("dim", [3, 33, 100])
@pytest.mark.parametrize("clustered", [False, True])
def test_squared_distances_of_any_size_are_exact(dim, clustered):
    """Near copies too, which a matrix product in fp32 gets wrong."""
    a = cloud(50, dim, 0, 5.0)
    b = torch.cat([a[:30] + 1e-4 * cloud(30, dim, 1), cloud(40, dim, 2, 5.0)])
    if clustered:  # so many pairs are close that the products are made in fp64
        a, b = a[:1] + 1e-3 * cloud(50, dim, 3), a[:1] + 1e-3 * cloud(70, dim, 4)
    exact = (a.double()[:, None] - b.double()[None]).square().sum(dim=2)
    torch.testing.assert_close(neighbours.squared_distances(a, b).double(), exact, rtol=1e-3, atol=1e-11)
    assert neighbours.squared_distances(a, a).diagonal().abs().max() < 1e-11


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40), m=st.integers(1, 60), k=st.integers(1, 7), rows=st.integers(1, 50), columns=st.integers(1, 70)
)  # fmt: skip
def test_nearest_in_blocks(n, m, k, rows, columns):
    k = min(k, m)
    a, b = cloud(n, 4, n), cloud(m, 4, m + 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "BLOCK_ROWS", rows)
        patch.setattr(neighbours, "BLOCK_COLUMNS", columns)
        squares, indices = neighbours.nearest(a, b, k)
    order = (a[:, None] - b[None]).square().sum(dim=2).argsort(dim=1)[:, :k]
    assert torch.equal(indices, order)
    torch.testing.assert_close(squares, (a[:, None] - b[order]).square().sum(dim=2))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 40), m=st.integers(2, 40), levels=st.integers(2, 50), seed=st.integers(0, 99))
def test_copying_statistic_is_that_of_scipy(n, m, levels, seed):
    """``levels`` few: many ties."""
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(levels, (size,), generator=generator) for size in (n, m))
    expected = stats.mannwhitneyu(x.numpy(), y.numpy(), method="asymptotic", use_continuity=False)
    z = copying_z(x.float(), y.float())
    assert 2 * stats.norm.sf(abs(z)) == pytest.approx(expected.pvalue if expected.pvalue == expected.pvalue else 1.0)
    assert z == pytest.approx(-copying_z(y.float(), x.float()))


def test_copies_fresh_data_and_blur_are_told_apart():
    train, held_out, fresh = cloud(300, 20, 0), cloud(400, 20, 1), cloud(400, 20, 2)
    base = nearest_example_mse(held_out, train)
    z = {
        name: copying_z(nearest_example_mse(samples, train), base)
        for name, samples in (
            ("copies", train + 0.1 * cloud(300, 20, 3)), ("fresh", fresh), ("far", 2 * fresh),
        )
    }  # fmt: skip
    assert z["copies"] < -10 and abs(z["fresh"]) < 3 and z["far"] > 10, z
    assert authentic_share(train + 0.01 * cloud(300, 20, 3), train) == 0
    assert 0.4 < authentic_share(fresh, train) < 0.8
    assert authentic_share(fresh + 10, train) == 1
    assert authentic_share(train[:1], train) == 0


def test_ink_outside_the_range_of_examples():
    examples = torch.linspace(-0.9, -0.5, 401)[:, None].repeat(1, 5)
    ink = InkRange.of(examples)
    assert (ink.low, ink.high) == (pytest.approx(-0.9), pytest.approx(-0.5))
    samples = torch.tensor([-1.0, -0.7, -0.6, 0.3, 0.4])[:, None].repeat(1, 5)
    assert ink.outside(samples) == (pytest.approx(0.2), pytest.approx(0.4))


def test_trees_say_how_sure_they_are():
    pytest.importorskip("sklearn")
    examples = torch.cat([cloud(50, 3, 0, -3), cloud(50, 3, 1, 3)])
    trees = Trees(examples, torch.tensor([7] * 50 + [-2] * 50))
    assert trees.classes == [-2, 7]
    places, sure = trees.predict(torch.tensor([[3.0, 3, 3], [-3, -3, -3], [0, 0, 0]]))
    assert places[:2].tolist() == [0, 1]
    assert sure[:2].min() > 0.9 > sure[2] >= 0.5


def test_bad_sets_are_named():
    good = cloud(10, 3, 0)
    with pytest.raises(InputError, match="1 of 10 samples hold NaN"):
        manifold_scores(good, good.index_fill(0, torch.tensor([2]), torch.nan))
    with pytest.raises(InputError, match="k = 10 neighbours among 10 examples"):
        manifold_scores(good, good, k=10)
    with pytest.raises(InputError, match="give at least one of each"):
        copying_z(torch.zeros(0), torch.zeros(3))
    with pytest.raises(InputError, match="at least two"):
        class_entropy(torch.tensor([1.0]))
    with pytest.raises(InputError, match="give one for each"):
        Trees(good, torch.zeros(9, dtype=torch.int64))
    with pytest.raises(InputError, match="the same class"):
        Trees(good, torch.zeros(10, dtype=torch.int64))


@pytest.mark.slow
def test_memory_is_bounded_at_full_size():
    """100,000 samples x 60,000 examples of 784 values: 0.5 GB of points; their distances would take 24 to 40 GB."""
    check_memory(n=100_000, m=60_000, dim=784, most_mb=1500)


def test_memory_is_bounded():
    """The distances would take 0.4 GB."""
    check_memory(n=10_000, m=5_000, dim=8, most_mb=200)


def check_memory(n: int, m: int, dim: int, most_mb: int) -> None:
    """Scores in a process of their own: what it held at most beyond its libraries."""
    code = f"""
import resource, torch
from kaleido_fast.evaluating.quality import authentic_share, manifold_scores, nearest_example_mse
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.cdist(torch.zeros(9, 9), torch.zeros(9, 9))
before = peak()
generator = torch.Generator().manual_seed(0)
real, samples = (torch.rand((size, {dim}), generator=generator) for size in ({m}, {n}))
manifold_scores(real, samples), nearest_example_mse(samples, real), authentic_share(samples, real)
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    print(f"\n{n:,} x {m:,} of {dim} values: {float(out):.0f} MB")
    assert float(out) < most_mb
