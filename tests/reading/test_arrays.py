"""Arrays, tensors and labels of every form, wherever data are taken."""

from __future__ import annotations

import struct
import warnings

import numpy as np
import pytest
import torch
from example_data import assert_same, raw_of, read, refused

from kaleido_fast import (
    Dataset,
    InputError,
    ModelSpec,
    attractors,
    fast_sample,
    load_checkpoint,
    load_dataset,
    sample_op,
    save_checkpoint,
    train,
)
from kaleido_fast.evaluating.attractors import recovered
from kaleido_fast.evaluating.quality import manifold_scores
from kaleido_fast.evaluating.reference import find_reference
from kaleido_fast.presets import TrainingRecipe


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
