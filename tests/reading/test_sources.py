"""Data are read as people mean them, or refused in one line that says what to do."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from kaleido_fast import (
    Dataset,
    InputError,
    KaleidoMLP,
    ModelCard,
    ModelSpec,
    attractors,
    fast_sample,
    load_checkpoint,
    load_dataset,
    sample_op,
    save_checkpoint,
    train,
)
from kaleido_fast.checkpoint import bundled_path
from kaleido_fast.cli.info import describe
from kaleido_fast.evaluating.attractors import recovered
from kaleido_fast.evaluating.quality import manifold_scores
from kaleido_fast.evaluating.reference import find_reference
from kaleido_fast.presets import TrainingRecipe
from kaleido_fast.reading.datasets import NAMES, DataWarning

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def grey(height: int = 9, width: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def colour(height: int = 9, width: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def read(source: Any, **options: Any) -> tuple[Dataset, str]:
    """The data, and what was said about them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_dataset(source, **options)
    assert all(issubclass(w.category, DataWarning) and "\n" not in str(w.message) for w in caught)
    return data, "; ".join(str(w.message) for w in caught)


def raw_of(data: Dataset) -> np.ndarray:
    """The raw values again, in their own shape."""
    return data.scaling.undo(data.data.double()).round().numpy().reshape(len(data), *data.sample_shape)


def refused(source: Any, *parts: str, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        load_dataset(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    worst = np.unravel_index(np.abs(found - expected.astype(float)).argmax(), found.shape)
    assert found[worst] == expected[worst], f"worst at {worst}: {found[worst]} instead of {expected[worst]}"


# --- pictures


@pytest.mark.parametrize("ending", ["png", "tif", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_rotation_is_applied_once(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    Image.fromarray(colour()).save(path, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert upright.shape[:2] == ((9, 12) if orientation < 5 else (12, 9))
    for source in (path, tmp_path):
        assert_same(raw_of(read(source)[0])[0], upright)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
@pytest.mark.parametrize(("background", "rgb"), [("white", (255, 255, 255)), ("black", (0, 0, 0)), ("#204060", None)])
def test_transparency_is_laid_over_the_background(tmp_path, mode, background, rgb):
    rgb = rgb or (0x20, 0x40, 0x60)
    picture = Image.fromarray(np.dstack([colour(), grey(seed=1)]), "RGBA" if mode != "LA" else None).convert("RGBA")
    if mode == "LA":
        picture = Image.merge("LA", (Image.fromarray(grey()), Image.fromarray(grey(seed=1))))
    elif mode in ("P", "PA"):
        picture = picture.quantize(16)
    picture.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as stored:
        shown = np.asarray(stored.convert("RGBA")).astype(float)
    share = shown[..., 3:] / 255
    expected = shown[..., :3] * share + np.array(rgb) * (1 - share)
    data, said = read(tmp_path, background=background)
    found = raw_of(data)[0]
    assert f"transparent: laid over {background}" in said
    if mode == "LA" and len(set(rgb)) == 1:
        assert found.shape == (9, 12)
        found = np.repeat(found[..., None], 3, axis=2)
    assert np.abs(found - expected).max() <= 1, np.unravel_index(np.abs(found - expected).argmax(), found.shape)


def test_opaque_pictures_with_an_alpha_channel_are_not_changed(tmp_path):
    Image.fromarray(np.dstack([colour(), np.full((9, 12), 255, np.uint8)])).save(tmp_path / "a.png")
    data, said = read(tmp_path)
    assert_same(raw_of(data)[0], colour())
    assert said == ""
    refused(tmp_path, "no colour", background="blak")


def test_sixteen_bits_are_kept_where_pillow_has_them(tmp_path):
    values = np.random.default_rng(0).integers(0, 65_536, (9, 12)).astype(np.uint16)
    for ending in ("png", "tif", "pgm"):
        Image.fromarray(values).save(tmp_path / f"a.{ending}")
        data, said = read(tmp_path / f"a.{ending}")
        assert_same(raw_of(data)[0], values)
        assert said == ""
        (tmp_path / f"a.{ending}").unlink()
    Image.fromarray(np.linspace(0, 1, 108, dtype=np.float32).reshape(9, 12)).save(tmp_path / "b.tif")
    assert float(read(tmp_path)[0].data.max()) == 1.0
    Image.fromarray(values).save(tmp_path / "c.png")
    refused(tmp_path, "float32", "uint16", "alike")


def test_sixteen_bits_a_colour_are_shortened_and_said(tmp_path):
    values = np.random.default_rng(0).integers(0, 65_536, (4, 5, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    data, said = read(tmp_path)
    assert "16 bits a colour" in said
    assert np.abs(raw_of(data)[0] - values / 257.0).max() <= 1


def test_palettes_show_their_colours_and_grey_ones_are_grey(tmp_path):
    Image.fromarray(colour()).quantize(16).save(tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as stored:
        expected = np.asarray(stored.convert("RGB"))
    assert_same(raw_of(read(tmp_path)[0])[0], expected)
    ramp = Image.fromarray(grey()).convert("RGB").quantize(256)
    ramp.save(tmp_path / "a.png")
    both, _ = read(tmp_path)  # a grey one among coloured ones is a coloured one
    assert both.sample_shape == (9, 12, 3)
    assert_same(raw_of(both)[1], expected)
    (tmp_path / "b.png").unlink()
    assert_same(raw_of(read(tmp_path)[0])[0], np.asarray(ramp.convert("L")))


@pytest.mark.parametrize("ending", ["gif", "tif", "webp", "png"])
def test_frames_are_examples_of_a_file_and_said_in_a_folder(tmp_path, ending):
    frames = np.stack([np.full((9, 12), value, np.uint8) for value in (0, 80, 160)])
    first, *rest = [Image.fromarray(frame) for frame in frames]
    lossless = {"lossless": True} if ending == "webp" else {}
    first.save(tmp_path / f"a.{ending}", save_all=True, append_images=rest, **lossless)
    data, said = read(tmp_path / f"a.{ending}")
    assert "3 frames" in said
    assert_same(raw_of(data), frames)
    data, said = read(tmp_path)
    assert "1 of 1 files hold several frames" in said
    assert_same(raw_of(data), frames[:1])


def test_one_picture_is_one_example(tmp_path):
    Image.fromarray(grey()).save(tmp_path / "a.PNG")
    (tmp_path / "a.PNG").rename(tmp_path / "picture")  # by what it holds, not by its name
    for source in (tmp_path / "picture", Image.fromarray(grey()), [Image.fromarray(grey())]):
        assert_same(raw_of(read(source)[0]), grey()[None])


def test_what_pillow_finds_wrong_is_said(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker" * 20
    Image.fromarray(grey()).save(tmp_path / "a.jpg", exif=exif)
    content = bytearray((tmp_path / "a.jpg").read_bytes())
    maker = content.index(b"\x01\x0f\x00\x02")
    content[maker + 8 : maker + 12] = b"\x7f\xff\xff\xff"  # the text is said to lie far behind the end
    (tmp_path / "a.jpg").write_bytes(content)
    said = read(tmp_path)[1]
    assert "1 of 1 pictures may be damaged" in said
    assert "a.jpg" in said


# --- folders


@pytest.mark.parametrize(
    ("folders", "labels", "said"),
    [
        (("0", "1", "10", "2"), (0, 1, 2, 10), ""),
        (("3", "7"), (3, 7), ""),
        (("cat", "dog"), (0, 1), "0 cat, 1 dog"),
        (("1", "01"), (0, 1), "0 01, 1 1"),
    ],
)
def test_class_folders(tmp_path, folders, labels, said):
    for i, name in enumerate(folders):
        (tmp_path / name).mkdir()
        for k in range(i + 1):
            Image.fromarray(grey(seed=10 * i + k)).save(tmp_path / name / f"{k}.png")
    (tmp_path / "empty").mkdir()
    data, told = read(tmp_path)
    assert said in told
    assert bool(said) == bool(told)
    assert data.labels is not None
    assert sorted(set(data.labels.tolist())) == sorted(labels)
    for values, label in zip(raw_of(data), data.labels.tolist(), strict=True):
        name = folders[[str(label) == f for f in folders].index(True)] if not said else sorted(folders)[label]
        i = folders.index(name)
        assert any((values == grey(seed=10 * i + k)).all() for k in range(i + 1)), (label, name)


def test_what_is_left_out_of_a_folder_is_said(tmp_path):
    Image.fromarray(grey()).save(tmp_path / "a.png")
    for name in ("b.heic", "c.heic", "notes.txt", ".hidden", "Thumbs.db"):
        (tmp_path / name).write_text("x")
    (tmp_path / "more").mkdir()
    Image.fromarray(grey()).save(tmp_path / "more" / "a.png")
    said = read(tmp_path)[1]
    assert "2 .heic, 1 .txt, the folder more" in said
    assert "hidden" not in said


def test_folders_without_pictures_say_what_to_do(tmp_path):
    for name in ("train", "val"):
        (tmp_path / "split" / name / "cat").mkdir(parents=True)
        Image.fromarray(grey()).save(tmp_path / "split" / name / "cat" / "a.png")
    refused(tmp_path / "split", "two folders down", str(Path("split") / "train"))
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "x.npy", np.zeros((2, 2)))
    refused(tmp_path / "arrays", "give the path of one file in it", "x.npy")
    (tmp_path / "store.zarr").mkdir()
    (tmp_path / "store.zarr" / "zarr.json").write_text("{}")
    refused(tmp_path / "store.zarr", "zarr store")


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
    for name in ("digits", "mnist"):
        save_checkpoint(name, other, ModelCard())
    with pytest.raises(InputError, match=r"builtin:digits for the one, \./digits for the other"):
        load_checkpoint("digits")
    with pytest.raises(InputError, match="lies here"):
        fast_sample("digits", n_chains=1)
    assert load_checkpoint("builtin:digits").path == bundled_path("digits")
    for source in ("./digits", Path("digits"), "mnist"):  # none of the last name is bundled
        assert load_checkpoint(source).model.spec.dim == 3
    with pytest.raises(InputError, match="known are"):
        load_checkpoint("builtin:dogits")


# --- arrays


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


@pytest.mark.parametrize("form", ["npy", "idx", "array", "tensor"])
@pytest.mark.parametrize("colours", [1, 3])
def test_colours_first_are_recognised(tmp_path, form, colours):
    last = np.random.default_rng(0).integers(0, 256, (5, 9, 12, colours), dtype=np.uint8)
    first = np.ascontiguousarray(last.transpose(0, 3, 1, 2))
    if form == "npy":
        np.save(tmp_path / "x", first)
    (tmp_path / "x.idx").write_bytes(struct.pack(">HBB4I", 0, 8, 4, *first.shape) + first.tobytes())
    forms = {"npy": tmp_path / "x.npy", "idx": tmp_path / "x.idx", "array": first, "tensor": torch.from_numpy(first)}
    expected = last if colours == 3 else last[..., 0]
    data, said = read(forms[form])
    assert_same(raw_of(data), expected)
    assert "colours come first" in said
    silent, said = read(forms[form], channels="first")
    assert_same(raw_of(silent), expected)
    assert said == ""
    assert data.sha256 == silent.sha256 == load_dataset(last).sha256
    assert load_dataset(forms[form], channels="none").sample_shape == first.shape[1:]


@pytest.mark.parametrize("shape", [(5, 3, 8, 3), (5, 1, 8, 3), (5, 3, 3, 3), (600, 580, 3), (3, 28, 28)])
def test_shapes_that_can_be_read_two_ways_are_asked_about(shape):
    values = np.zeros(shape, np.uint8)
    refused(values, "channels=", "'none'")
    for channels in ("first", "last") if len(shape) == 4 else ("last" if shape[-1] == 3 else "first",):
        data = load_dataset(values, channels=channels)
        assert len(data) == (shape[0] if len(shape) == 4 else 1)
    assert load_dataset(values, channels="none").sample_shape == shape[1:]
    refused(values, "unknown channels", channels="middle")


@pytest.mark.parametrize(
    "labels",
    [
        np.arange(4)[:, None],
        np.arange(4)[None],
        np.arange(4.0),
        torch.arange(4).reshape(4, 1),
        [0, 1, 2, 3],
        np.arange(4, dtype=np.uint64),
    ],
)
def test_labels_of_every_form(labels):
    data = load_dataset(np.zeros((4, 2)), labels=labels)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        (np.eye(4), "argmax"),
        (np.array([0.5, 1, 2, 3]), "whole number"),
        (np.array([np.nan, 1, 2, 3]), "whole number"),
        (np.array([2**63, 1, 2, 3], np.uint64), "whole number"),
        (np.arange(3), "(3,)"),
        (np.array(list("abcd")), "real numbers"),
        ("no/such.csv", "no such file"),
    ],
)
def test_labels_that_are_none(labels, part):
    refused(np.zeros((4, 2)), part, labels=labels)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        np.asfortranarray,
        lambda x: x[::-1][::-1],
        torch.from_numpy,
        lambda x: torch.from_numpy(x).requires_grad_(),
        lambda x: torch.from_numpy(x).double(),
        lambda x: list(torch.from_numpy(x)),
        lambda x: x.tolist(),
        lambda x: list(x),
        np.ma.masked_array,
    ],
)
def test_arrays_and_tensors_in_memory(make):
    values = np.random.default_rng(0).uniform(-1, 1, (6, 2, 3)).astype(np.float32)
    before = values.copy()
    data = load_dataset(make(values))
    assert torch.equal(data.data, torch.from_numpy(values.reshape(6, 6)))
    assert data.sample_shape == (2, 3)
    data.data.zero_()
    assert (values == before).all(), "the caller's array was changed"


def test_half_precision_of_torch():
    values = torch.linspace(-1, 1, 12).reshape(3, 4)
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        assert torch.equal(load_dataset(values.to(dtype)).data, values.to(dtype).float())


class Examples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(2), i


@pytest.mark.parametrize(
    ("source", "part"),
    [
        (None, "a NoneType is no data"),
        (3.5, "a float is no data"),
        ({"data": np.zeros(3)}, "a dict is no data"),
        (Examples(), "torch.stack"),
        (torch.utils.data.DataLoader(Examples()), "torch.stack"),
        ((np.zeros((4, 2)), np.zeros(4)), "labels="),
        ([[1.0, 2.0], [3.0]], "of one shape"),
        (np.ma.masked_array(np.zeros((2, 2)), mask=np.eye(2, dtype=bool)), "2 values are masked"),
        (torch.zeros(2, 2).to_sparse(), "to_dense"),
        (torch.zeros(2, 2, dtype=torch.complex64), "real numbers"),
        (torch.zeros(2, 2, device="meta"), "meta"),
        (np.array(["a"]), "real numbers"),
        (np.array([{}]), "real numbers"),
        (np.zeros((0, 3)), "at least one example"),
        (np.full((2, 2), np.nan), "NaN"),
        (b"bytes", "no data"),
    ],
)
def test_what_is_no_data(source, part):
    refused(source, part)


def test_everything_that_takes_data_takes_arrays(tmp_path):
    values = np.random.default_rng(0).uniform(-1, 1, (9, 4)).astype(np.float32)
    spec, recipe = ModelSpec((4, 8, 4)), TrainingRecipe(steps=40, held_out=2)
    np.save(tmp_path / "x.npy", values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [train(x, spec=spec, recipe=recipe) for x in (values, torch.from_numpy(values), tmp_path / "x.npy")]
    assert len({result.card.dataset["sha256"] for result in made}) == 1
    for name, tensor in made[0].model.state_dict().items():
        assert all(torch.equal(tensor, other.model.state_dict()[name]) for other in made)
    save_checkpoint(tmp_path / "m.safetensors", made[0].model, made[0].card)
    checkpoint = load_checkpoint(tmp_path / "m.safetensors")
    for source in (values, torch.from_numpy(values), load_dataset(values), str(tmp_path / "x.npy")):
        reference = find_reference(checkpoint, source)
        assert reference.train is not None
        assert reference.held_out is not None
        assert (len(reference.train), len(reference.held_out)) == (7, 2)
    result = fast_sample(made[0].model, n_chains=50, tol=1e-3)
    found = [attractors(result, made[0].model, data=x).nearest for x in (values, torch.from_numpy(values))]
    found.append(attractors(result, made[0].model, data=load_dataset(values)).nearest)
    assert all(torch.equal(found[0], other) for other in found)
    with pytest.raises(InputError, match=r"give \(m, 4\)"):
        attractors(result, made[0].model, data=values[:, :3])


def test_arrays_for_start_states_and_measures():
    model = load_checkpoint("digits").model
    starts = np.random.default_rng(0).uniform(-1, 1, (3, 64)).astype(np.float32)
    runs = [fast_sample(model, n_chains=3, burn_in=4, z0=z0).final for z0 in (starts, torch.from_numpy(starts))]
    assert torch.equal(*runs)
    assert torch.equal(*(recovered(model, x, 0.1) for x in (starts, torch.from_numpy(starts))))
    with pytest.raises(InputError, match=r"torch\.from_numpy"):
        sample_op(model, z0=starts)
    with pytest.raises(InputError, match=r"torch\.from_numpy"):
        manifold_scores(starts, starts)


def test_a_dataset_takes_arrays():
    data = Dataset("a", np.zeros((3, 4), np.float32), labels=np.arange(3)[:, None])
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2]
    taken = [data.take(rows) for rows in (torch.tensor([2, 0]), np.array([2, 0]), [2, 0])]
    assert len({part.sha256 for part in taken}) == 1


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


# A row of spaces cannot have an empty cell, so the index column is drawn for the other marks alone.
@QUICK
@given(
    mark=st.sampled_from([",", ";", "\t", " "]),
    names=st.booleans(),
    label=st.sampled_from([None, 0, 1, 2]),
    index=st.booleans(),
    values=st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=5),
)
def test_tables(tmp_path, mark, names, label, index, values):
    rows = [[repr(a), repr(b)] for a, b in values]
    header = ["a", "b"]
    if names and label is not None:
        for i, row in enumerate([header, *rows]):
            row.insert(label, "Label" if i == 0 else str(i))
    index = index and names and mark != " "
    if index:
        for i, row in enumerate([header, *rows]):
            row.insert(0, "" if i == 0 else str(i))
    lines = [mark.join(row) for row in ([header, *rows] if names else rows)]
    (tmp_path / "x.csv").write_text("\ufeff# made by a test\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    data, said = read(tmp_path / "x.csv")
    assert torch.equal(data.data, torch.tensor(values, dtype=torch.float64).float())
    assert ("index" in said) == index
    assert ("'Label' holds the classes" in said) == (names and label is not None)
    if names and label is not None:
        assert data.labels is not None
        assert data.labels.tolist() == list(range(1, len(values) + 1))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a,b\n1,cat\n", "cat"),
        ("1,2\n3\n", "columns"),
        ("", "no line"),
        ("a,b\n", "no line"),
        ("1,,2\n", "table"),
        ("1;0,5\n", "table"),
        ("0,,0\n1,0,0\n", "names or an example, with ''"),
        ("0 n/a\n1 0\n", "names or an example, with 'n/a'"),
        ("?\n1\n", "names or an example"),
        ("label\n1\n2\n", "at least one"),
        ("0.1,nan\n", "NaN"),
        ("1e999,0\n", "infinite"),
    ],
)
def test_tables_that_are_none(tmp_path, text, part):
    (tmp_path / "x.csv").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        refused(tmp_path / "x.csv", part)


def test_labels_in_a_table(tmp_path):
    for text in ("label\n1\n2\n", "1\n2\n", ",class\n0,1\n1,2\n"):
        (tmp_path / "y.csv").write_text(text)
        data = load_dataset(np.zeros((2, 3)), labels=tmp_path / "y.csv")
        assert data.labels is not None
        assert data.labels.tolist() == [1, 2]


def test_files_of_other_programs_are_named(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "x.pt")
    torch.save(torch.zeros(3), tmp_path / "unknown")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(np.zeros(3)))
    save_checkpoint(tmp_path / "m.safetensors", KaleidoMLP(ModelSpec((3, 3))), ModelCard())
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", b"")
    others = {
        "x.h5": b"\x89HDF\r\n\x1a\n",
        "x.mat": b"MATLAB 5.0",
        "x.parquet": b"PAR1",
        "x.json": b'{"a": 1}',
        "x.mp4": b"\0\0\0\x18ftypmp42",
        "x.heic": b"\0\0\0\x18ftypheic",
        "x.tar": bytes(257) + b"ustar",
        "x.npy.xz": b"\xfd7zXZ\0",
        "x.csv.gz": gzip.compress(b"1,2\n"),
        "x.svg": b"<svg>",
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    kinds = {
        "x.pt": "torch.save",
        "unknown": "torch.save",
        "x.pkl": "a pickle, which can run code",
        "m.safetensors": "safetensors.numpy",
        "x.zip": "unpack it first",
        "x.h5": "HDF5",
        "x.mat": "MATLAB",
        "x.parquet": "Parquet",
        "x.json": "JSON",
        "x.mp4": "film",
        "x.heic": "HEIC",
        "x.tar": "tar archive",
        "x.npy.xz": "compressed by xz",
        "x.csv.gz": "unpack it first",
        "x.svg": "SVG",
    }
    for name, part in kinds.items():
        refused(tmp_path / name, name, part)


def test_faint_bytes_are_doubted():
    values = np.random.default_rng(0).integers(0, 17, (5, 8, 8)).astype(np.uint8)
    assert "value_range=(0, 16)" in read(values)[1]
    assert read(values, value_range=(0, 16))[1] == ""
    assert read(values * 15)[1] == ""


def test_numbered_columns_beside_named_classes_are_names(tmp_path):
    (tmp_path / "x.csv").write_text(",0,1,class\n0,.5,-.5,3\n1,.25,1,4\n")
    data, _ = read(tmp_path / "x.csv")
    assert data.data.tolist() == [[0.5, -0.5], [0.25, 1.0]]
    assert data.labels is not None
    assert data.labels.tolist() == [3, 4]


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
    assert fast_sample(n_chains=2, burn_in=1, engine="reference").model_hash == load_checkpoint().model_hash
