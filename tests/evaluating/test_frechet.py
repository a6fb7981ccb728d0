"""The Fréchet distance against closed forms, and the judge: blur, noise and copies are ranked rightly."""

from __future__ import annotations

import json
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_fast import InputError, load_dataset
from kaleido_fast.evaluating.feature_distance import LEAST, FeatureDistance, distance_words, find_distance
from kaleido_fast.evaluating.frechet import Gaussian, frechet_distance
from kaleido_fast.evaluating.judge import N_FEATURES, train_judge
from kaleido_fast.reading.datasets import Dataset


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(dim: int, seed: int, rank: int | None = None) -> Gaussian:
    factor = normals(dim, rank or dim, seed=seed)
    return Gaussian(normals(dim, seed=seed + 1), factor @ factor.T)


def test_mean_and_covariance_by_their_definitions():
    points = normals(50, 3) * torch.tensor([1.0, 10.0, 0.1]) + 5
    found = Gaussian.of(points.float())
    torch.testing.assert_close(found.mean, points.mean(dim=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.covariance, torch.cov(points.T), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(dim=st.integers(1, 9), seed=st.integers(0, 10_000), scale=st.floats(0.1, 10))
def test_distance_of_scaled_and_moved_copies_is_known(dim, seed, scale):
    """Of N(m, C) and N(m + v, s^2 C) it is |v|^2 + (s - 1)^2 tr C: their roots commute."""
    one = gaussian(dim, seed)
    moved = Gaussian(one.mean + scale, scale**2 * one.covariance)
    expected = dim * scale**2 + (scale - 1) ** 2 * float(one.covariance.trace())
    assert frechet_distance(one, moved) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(dim=st.integers(2, 9), seed=st.integers(0, 10_000), rank=st.integers(1, 9))
def test_distance_is_symmetric_zero_to_itself_and_turns_with_the_axes(dim, seed, rank):
    """Also where a covariance is singular, as that of fewer points than features is."""
    one, other = gaussian(dim, seed), gaussian(dim, seed + 7, rank=min(rank, dim))
    scale = float(one.covariance.trace() + other.covariance.trace())
    apart = frechet_distance(one, other)
    assert apart == pytest.approx(frechet_distance(other, one), rel=1e-6)
    assert frechet_distance(other, other) <= 1e-6 * scale
    turn = torch.linalg.qr(normals(dim, dim, seed=seed + 3)).Q
    turned = (Gaussian(turn @ part.mean, turn @ part.covariance @ turn.T) for part in (one, other))
    assert frechet_distance(*turned) == pytest.approx(apart, rel=1e-6)


def test_distance_agrees_with_the_root_of_the_product():
    """tr (C_a C_b)^(1/2) by the eigenvalues of the product itself, which is not symmetric."""
    one, other = gaussian(6, 0), gaussian(6, 20)
    roots = torch.linalg.eigvals(one.covariance @ other.covariance).real.sqrt().sum()
    expected = (one.mean - other.mean).square().sum() + one.covariance.trace() + other.covariance.trace() - 2 * roots
    assert frechet_distance(one, other) == pytest.approx(float(expected), rel=1e-9)


def test_what_has_no_distance_is_refused():
    with pytest.raises(InputError, match="one point"):
        Gaussian.of(torch.zeros(1, 4))
    with pytest.raises(InputError, match="NaN"):
        Gaussian.of(torch.full((3, 4), torch.nan))
    with pytest.raises(InputError, match="4 and 5 features"):
        frechet_distance(gaussian(4, 0), gaussian(5, 0))


@pytest.fixture(scope="module")
def digits() -> tuple[Dataset, FeatureDistance]:
    """Training examples of the 8 x 8 digits, and the measure that held-out ones give."""
    pytest.importorskip("sklearn")
    train, held_out = load_dataset("digits").split(500)
    assert held_out is not None
    return train, FeatureDistance.of(held_out)


def blurred(pictures: torch.Tensor) -> torch.Tensor:
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None] / 16
    padded = F.pad(pictures.view(-1, 1, 8, 8), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel).flatten(1)


def test_real_digits_come_first_and_every_kind_of_bad_sample_after_them(digits):
    train, measure = digits
    real = train.data[:600]
    generator = torch.Generator().manual_seed(0)
    mixed = (real + real[torch.randperm(600, generator=generator)]) / 2
    cloud = Gaussian.of(train.data)
    values, vectors = torch.linalg.eigh(cloud.covariance)
    normal = (cloud.mean + normals(600, 64) * values.clamp_min(0).sqrt() @ vectors.T).float().clamp(-1, 1)
    found = {
        "copies of few": measure.distance(real[:60].repeat(10, 1)),
        "one class missing": measure.distance(train.data[train.labels != 3][:600]),
        "halves of two": measure.distance(mixed),
        "normal with the data's covariance": measure.distance(normal),
        "blur": measure.distance(blurred(real)),
        "more blur": measure.distance(blurred(blurred(real))),
        "noise": measure.distance(torch.rand((600, 64), generator=generator) * 2 - 1),
        "mean digit": measure.distance(train.data.mean(dim=0).repeat(600, 1)),
    }
    ceiling = measure.of_real(train.data, 600)
    assert len(ceiling) == 2
    best = min(found, key=lambda name: found[name])
    assert found[best] > 1.3 * max(ceiling), f"{best}: {found[best]:.2f}, real digits {ceiling}"
    assert found["blur"] < found["more blur"]


def test_copies_of_everything_pass(digits):
    """What fools the distance: it asks for the law of the data, and the training examples have it."""
    train, measure = digits
    assert measure.distance(train.data.repeat(2, 1)) == pytest.approx(measure.distance(train.data), rel=0.01)


def test_the_distance_falls_with_the_number_of_samples(digits):
    train, measure = digits
    few, many = measure.of_real(train.data, 150), measure.of_real(train.data, 1200)
    assert len(few) == 8 and len(many) == 1
    assert min(few) > many[0]


def test_sets_of_real_examples_share_none(monkeypatch, digits):
    _, measure = digits
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(FeatureDistance, "distance", lambda self, points: seen.append(points) or float(len(seen)))
    measure.of_real(torch.arange(1297.0)[:, None], 200)
    values = torch.cat(seen)[:, 0]
    assert [len(points) for points in seen] == [200] * 6
    assert len(values.unique()) == len(values)


def test_the_judge_follows_its_seed_alone_and_knows_digits_it_has_not_seen(digits):
    _, measure = digits
    held_out = load_dataset("digits").split(500)[1]
    half = held_out.take(torch.arange(0, 500, 2))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again, other = (train_judge(half.data, half.labels, (8, 8), seed=seed) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    ours, same = measure.judge.features(held_out.data), again.features(held_out.data)
    assert same.shape == (500, N_FEATURES)
    assert torch.equal(ours, same), f"differ by {(ours - same).abs().max()}"
    assert not torch.equal(ours, other.features(held_out.data))
    assert measure.accuracy > 0.85 and measure.n_compared == 250


@pytest.mark.parametrize("shape", [(2, 2), (7, 5), (24, 17, 3)])
def test_pictures_of_any_shape_are_judged(shape):
    """A bright upper half against a bright lower half."""
    labels = torch.arange(80) % 2
    height = shape[0]
    pictures = 0.1 * normals(80, *shape).float()
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        half = slice(0, height // 2) if label else slice(-(height // 2), None)
        picture[half] += 1
    judge = train_judge(pictures[:40].flatten(1), labels[:40] + 5, shape)
    assert judge.accuracy(pictures[40:].flatten(1), labels[40:] + 5) == 1


def pictures(n: int, shape: tuple[int, ...] = (4, 4), labels: bool = True) -> Dataset:
    data = normals(n, *shape).float().flatten(1).clamp(-1, 1)
    return Dataset("some", data, labels=torch.arange(n) % 3 if labels else None, sample_shape=shape)


@pytest.mark.parametrize(
    ("held_out", "why"),
    [
        (None, "there are no held-out examples"),
        (pictures(2 * LEAST - 1), "255 held-out examples: 256 or more are needed"),
        (pictures(400, labels=False), "have no classes"),
        (pictures(400, (16,)), r"examples of shape \(16,\) are no pictures"),
    ],
)
def test_a_note_says_why_there_is_none(held_out, why):
    measure, notes = find_distance(held_out, 0)
    assert measure is None
    assert len(notes) == 1 and re.search(why, notes[0]), notes


def test_few_samples_have_no_distance_and_the_words_name_what_was_measured(digits):
    train, measure = digits
    assert measure.distance(train.data[: LEAST - 1]) is None
    facts = json.loads(json.dumps(measure.facts()))
    assert (facts["n_taught"], facts["n_compared"]) == (250, 250)
    assert f"{measure.accuracy:.1%} right on the 250 others" in distance_words(facts, None)
    assert distance_words(facts, (1.234, 2.0)).endswith("it is 1.23 to 2.00")
