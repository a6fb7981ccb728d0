"""Data are read as people mean them, or refused in one line that says what to do."""

from __future__ import annotations

import gzip
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from example_data import assert_same, grey, raw_of, read, refused
from PIL import Image

from kaleido_fast import (
    InputError,
    KaleidoMLP,
    ModelCard,
    ModelSpec,
    fast_sample,
    load_checkpoint,
    load_dataset,
    save_checkpoint,
    train,
)
from kaleido_fast.checkpoint import bundled_path
from kaleido_fast.cli.info import describe
from kaleido_fast.evaluating.reference import find_reference
from kaleido_fast.presets import TrainingRecipe
from kaleido_fast.reading.datasets import NAMES

# --- names


@pytest.mark.filterwarnings("ignore::kaleido_fast.training.trainer.UnstableModelWarning")
def test_a_name_that_is_also_a_path_is_refused_with_both_spellings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        Path(name).mkdir()
        Image.fromarray(grey()).save(Path(name) / "a.png")
        refused(name, "folder", f"builtin:{name}", f"./{name}")
        for source in (f"./{name}", Path(name), str(Path(name).absolute())):
            data = load_dataset(source)
            assert_same(raw_of(data), grey()[None])
            assert data.name not in NAMES  # else a card of these would stand for the built-in data
    assert load_dataset("builtin:points1d").name == "points1d"
    assert len(load_dataset("builtin:digits", limit=5)) == 5
    refused("builtin:digit", "did you mean 'digits'")
    # What nobody spelled is never ambiguous.
    assert find_reference(load_checkpoint("digits")).train is not None
    assert train(preset="points1d", recipe=TrainingRecipe(steps=1)).card.dataset["name"] == "points1d"


def test_a_model_file_called_like_a_bundled_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = KaleidoMLP(ModelSpec((3, 3)))
    for name in ("digits", "cifar"):
        save_checkpoint(name, other, ModelCard())
    with pytest.raises(InputError, match=r"builtin:digits for the model, \./digits for the file"):
        load_checkpoint("digits")
    with pytest.raises(InputError, match="lies here"):
        fast_sample("digits", n_chains=1)
    assert load_checkpoint("builtin:digits").path == bundled_path("digits")
    for source in ("./digits", Path("digits"), "cifar"):  # none of the last name is bundled
        assert load_checkpoint(source).model.spec.dim == 3
    with pytest.raises(InputError, match="known are"):
        load_checkpoint("builtin:dogits")


def test_files_of_classes_are_not_examples(tmp_path):
    classes = np.arange(5, dtype=np.uint8)
    idx = struct.pack(">HBBI", 0, 8, 1, 5) + classes.tobytes()
    for name in ("train-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"):
        (tmp_path / name).write_bytes(idx)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx))
        refused(tmp_path / name, "5 classes, not examples", "labels=")
        refused(tmp_path / f"{name}.gz", "5 classes, not examples")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(struct.pack(">HBBIII", 0, 8, 3, 5, 2, 2) + bytes(20))
    refused(tmp_path / "train-labels-idx1-ubyte", "such as", "train-images-idx3-ubyte")
    for name in ("y_train.npy", "labels.npy", "classes.npy"):
        np.save(tmp_path / name, classes[:, None])
        refused(tmp_path / name, "5 classes, not examples")
        data = load_dataset(np.zeros((5, 2)), labels=tmp_path / name)
        assert data.labels is not None
        assert data.labels.tolist() == classes.tolist()


# --- files


@pytest.mark.parametrize("name", ["x.NPY", "x.npy.gz", "x.NPY.GZ", "x", "x.dat"])
def test_npy_by_what_it_holds(tmp_path, name):
    values = np.random.default_rng(0).uniform(-1, 1, (5, 3))
    np.save(tmp_path / "plain.npy", values)
    content = (tmp_path / "plain.npy").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    assert load_dataset(tmp_path / name).sha256 == load_dataset(values).sha256
    if name.endswith("gz"):
        (tmp_path / name).write_bytes(gzip.compress(content + b"more"))
        refused(tmp_path / name, "goes on")
        (tmp_path / name).write_bytes(gzip.compress(content[:-1]))
        refused(tmp_path / name, "cut short")


def test_other_arrays_of_an_npz_are_said(tmp_path):
    np.savez(tmp_path / "x.NPZ", x_train=np.zeros((3, 2)), y_train=np.arange(3), x_test=np.ones((2, 2)))
    (tmp_path / "x.NPZ.npz").rename(tmp_path / "x.NPZ")
    data, said = read(tmp_path / "x.NPZ")
    assert "'x_train' is taken, not x_test" in said
    assert data.labels is not None


def test_faint_bytes_are_doubted():
    values = np.random.default_rng(0).integers(0, 17, (5, 8, 8)).astype(np.uint8)
    assert "value_range=(0, 16)" in read(values)[1]
    assert read(values, value_range=(0, 16))[1] == ""
    assert read(values * 15)[1] == ""


def test_what_is_neither_a_file_nor_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors", "neither a file nor a folder")
    with pytest.raises(InputError, match="does not exist"):
        describe(str(tmp_path / "pipe.safetensors"))


@pytest.mark.parametrize("value_range", [(0, 1, 2), (1,), 5, "01"])
def test_ranges_have_two_ends(value_range):
    with pytest.raises(InputError, match="two finite numbers"):
        load_dataset(np.zeros((2, 2)), value_range=value_range)


def test_names_of_nothing_say_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (4, 4)).save("a.png")
    refused("", "is empty")
    refused("my_images", "nor is there a file or folder")
    refused("my_images/", "my_images/ does not exist")
    (tmp_path / "text").write_text("abc")
    refused("text", "no known kind: it starts with 616263; give an IDX")


def test_what_is_said_of_data_is_said_of_the_callers_line(tmp_path):
    Image.new("RGBA", (4, 4)).save(tmp_path / "clear.png")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_dataset(tmp_path / "clear.png")
    assert [warning.filename for warning in told] == [__file__]


def test_a_file_called_like_the_default_model_is_no_hindrance(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_bytes(b"mine")
    assert load_checkpoint().path == bundled_path("digits")
    assert fast_sample(n_chains=2, steps=1, engine="reference").model_hash == load_checkpoint().model_hash
