"""Data sets: what is read is right, and whatever else is refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from example_data import refused
from PIL import Image
from raw_files import idx_bytes, images_of, npz_bytes

from kaleido_fast.checkpoint import Scaling
from kaleido_fast.errors import InputError
from kaleido_fast.reading.datasets import Dataset, load_dataset

# --- named sets


@pytest.mark.parametrize("bound", ["tanh", "sigmoid"])
def test_digits(bound):
    digits = load_dataset("digits", bound=bound)
    assert digits.data.shape == (1797, 64)
    assert digits.sample_shape == (8, 8)
    assert digits.labels is not None
    assert digits.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    low = -1.0 if bound == "tanh" else 0.0
    assert (float(digits.data.min()), float(digits.data.max())) == (low, 1.0)
    raw = digits.scaling.undo(digits.data)
    assert torch.equal(raw, raw.round())
    assert (float(raw.min()), float(raw.max())) == (0.0, 16.0)


def test_same_raw_values_same_hash():
    assert load_dataset("digits").sha256 == load_dataset("digits", bound="sigmoid").sha256
    assert load_dataset("digits").sha256 != load_dataset("digits", limit=1000).sha256


def test_points_are_taken_as_they_are():
    line, square = load_dataset("points1d"), load_dataset("points2d", bound="sigmoid")
    torch.testing.assert_close(line.data[:, 0], torch.tensor([-0.8, -0.2, 0.2, 0.8]))
    assert {tuple(round(v, 6) for v in row) for row in square.data.tolist()} == {
        (0.2, 0.2), (0.2, 0.8), (0.8, 0.2), (0.8, 0.8),
    }  # fmt: skip
    assert line.scaling == square.scaling == Scaling()


def test_digits_without_scikit_learn(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused("digits", "scikit-learn", "kaleido-fast[data]")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_without_network(name, monkeypatch, tmp_path):
    import sklearn.datasets

    def offline(**options):
        raise OSError("no route to host")

    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", offline)
    refused(name, "OpenML", str(tmp_path), "no route to host", "IDX")


def test_cifar_from_the_cache_has_its_colours_last(monkeypatch, tmp_path):
    import sklearn.datasets
    from sklearn.utils import Bunch

    planes = np.random.default_rng(1).integers(0, 256, (5, 3, 32, 32))
    calls = []

    def fetch(**options):
        calls.append(options)
        return Bunch(data=planes.reshape(5, -1).astype(float), target=np.array(list("30129")))

    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    first, second = load_dataset("cifar10"), load_dataset("cifar10")
    assert len(calls) == 1  # the second came from the bytes that were kept
    assert first.sample_shape == (32, 32, 3)
    assert torch.equal(first.data, second.data)
    assert first.labels is not None
    assert first.labels.tolist() == [3, 0, 1, 2, 9]
    back = first.scaling.undo(first.data).reshape(5, 32, 32, 3).round().numpy()
    assert (back == planes.transpose(0, 2, 3, 1)).all()


def test_unknown_names():
    refused("digit", "unknown data set", "did you mean 'digits'")
    refused("digits", "unknown bound", bound="tanhh")
    refused("no/such.npy", "does not exist")


def test_labels_from_elsewhere(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 2)))
    np.save(tmp_path / "classes.npy", np.array([3, 1, 2, 2]))
    data = load_dataset(tmp_path / "x.npy", labels=tmp_path / "classes.npy")
    assert data.labels is not None
    assert data.labels.tolist() == [3, 1, 2, 2]
    np.save(tmp_path / "classes.npy", np.array([3, 1]))
    refused(tmp_path / "x.npy", "labels", "(2,)", labels=tmp_path / "classes.npy")


@pytest.mark.parametrize("colour", [False, True])
def test_folder_of_images(tmp_path, colour):
    images = np.random.default_rng(4).integers(0, 256, (3, 4, 5, 3) if colour else (3, 4, 5), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    data = load_dataset(tmp_path)
    assert data.sample_shape == images.shape[1:]
    assert (data.scaling.undo(data.data).round().numpy().reshape(images.shape) == images).all()


def test_folder_with_training_and_test_images(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(images_of(9)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(images_of(4)))
    assert len(load_dataset(tmp_path)) == 9
    (tmp_path / "train-images-idx3-ubyte").rename(tmp_path / "some-images-idx3-ubyte")
    refused(tmp_path, "several IDX files")


# --- bad input


def test_colour_and_size_mixtures(tmp_path):
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "b.png")
    refused(tmp_path, "a.png", "5 x 4", "b.png", "6 x 4")
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "b.png")
    refused(tmp_path, "grey", "colour")


def test_odd_images(tmp_path):
    Image.fromarray(np.zeros((1500, 1500), np.uint8)).save(tmp_path / "a.png")
    refused(tmp_path, "1500 x 1500")
    refused(tmp_path / "a.png", "1500 x 1500")


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (np.array([[0.5, np.nan]]), "NaN"),
        (np.array([[0.5, np.inf]]), "infinite"),
        (np.array([[0.5, 1.5]]), "value_range"),
        (np.array([[3, -7]], np.int32), "from -7 to 3"),
        (np.zeros((0, 4)), "empty"),
        (np.zeros((4, 0)), "empty"),
        (np.float64(3.0), "at least one example"),
        (np.array([["a"]]), "<U1"),
        (np.array([[1j]]), "complex"),
        (np.array(["2020-01-01"], "M8[D]"), "datetime"),
        (np.zeros(3, [("a", "f4")]), "type"),
        (np.array([{}], object), "pickle"),
        (np.zeros((1, 1 << 21), bool), "too large"),
    ],
)
def test_unsuitable_arrays(tmp_path, values, part):
    np.save(tmp_path / "x.npy", values)
    refused(tmp_path / "x.npy", part)


@pytest.mark.parametrize(
    ("value_range", "part"),
    [((0, 0.5), "outside"), ((1, 0), "lower one first"), ((0, float("inf")), "finite"), ((float("nan"), 1), "finite")],
)
def test_value_ranges(tmp_path, value_range, part):
    np.save(tmp_path / "x.npy", np.array([[0.0, 0.75]]))
    refused(tmp_path / "x.npy", part, value_range=value_range)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_limits(limit):
    refused("points1d", "limit", limit=limit)


def test_limit_keeps_sorted_classes(tmp_path):
    (tmp_path / "x.npz").write_bytes(npz_bytes(data=np.zeros((1000, 2)), labels=np.repeat(np.arange(10), 100)))
    labels = load_dataset(tmp_path / "x.npz", limit=50).labels
    assert labels is not None
    assert labels.bincount().tolist() == [5] * 10


def test_empty_folder(tmp_path):
    refused(tmp_path, "no image")


# --- the record itself


def test_split_is_fixed_and_whole():
    digits = load_dataset("digits")
    train, held_out = digits.split(500)
    assert held_out is not None
    assert (len(train), len(held_out)) == (1297, 500)
    joined = torch.cat([train.data, held_out.data])
    assert sorted(map(tuple, joined.tolist())) == sorted(map(tuple, digits.data.tolist()))
    again = digits.split(500)[1]
    assert again is not None
    assert torch.equal(again.data, held_out.data)
    assert held_out.labels is not None
    assert held_out.labels[:12].tolist() == [1, 2, 4, 5, 6, 9, 4, 7, 8, 9, 2, 7]
    assert digits.split(0) == (digits, None)
    for count in (-1, 1797, 5000):
        with pytest.raises(InputError, match="held_out"):
            digits.split(count)


def test_dataset_refuses_misfits():
    good = torch.zeros(3, 4)
    for options in (
        {"data": good.double()},
        {"data": good[0]},
        {"data": torch.full((2, 2), float("nan"))},
        {"data": good, "sample_shape": (3,)},
        {"data": good, "labels": torch.zeros(2, dtype=torch.int64)},
        {"data": good, "labels": torch.zeros(3)},
    ):
        with pytest.raises(InputError, match="data set bad"):
            Dataset("bad", **options)
