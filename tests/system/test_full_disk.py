"""A disk without room is found before any work, or ends it in one line; what was there stays."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from kaleido_fast import InputError, ModelCard, load_checkpoint, save_checkpoint, train
from kaleido_fast.presets import TrainingRecipe
from kaleido_fast.sampling import fast_sample
from kaleido_fast.storing.writers import write_draws
from kaleido_fast.system import files
from kaleido_fast.system.tensor_files import write_tensors
from kaleido_fast.training.state import save_state

from conftest import random_mlp  # isort: skip

RECIPE = TrainingRecipe(steps=2, batch_size=2, held_out=0)


@pytest.fixture
def full(monkeypatch):
    """safetensors on a full disk: it says so in an error of its own."""

    def fails(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for module in ("system.sealed", "storing.writers"):
        monkeypatch.setattr(f"kaleido_fast.{module}.save_file", fails)


def test_a_full_disk_is_one_line_for_every_file_of_tensors(tmp_path, full):
    model = random_mlp(2, 3, 2)
    result = fast_sample(model, n_chains=2, burn_in=1, engine="reference")
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"earlier")
    for write in (
        lambda: save_checkpoint(path, model, ModelCard(name="x")),
        lambda: write_draws(path, result, {}),
        lambda: save_state(path, {}, {}, {"a": torch.zeros(2)}),
    ):
        with pytest.raises(InputError, match=r"x\.safetensors: no space left there"):
            write()
        assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]
        assert path.read_bytes() == b"earlier"


def test_a_training_that_cannot_be_saved_is_refused_before_its_first_step(tmp_path, monkeypatch):
    usage = files.shutil.disk_usage
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    steps = []
    data = np.random.default_rng(0).uniform(-1, 1, (4, 2))
    with pytest.raises(InputError, match=r"needs .* bytes, 1,000 are free"):
        train(data, recipe=RECIPE, state=tmp_path / "x.training", callback=steps.append)
    assert not steps
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_the_room_asked_for_holds_the_state_and_the_checkpoint(tmp_path, monkeypatch, average):
    asked: list[int] = []
    monkeypatch.setattr("kaleido_fast.training.trainer.check_room", lambda _, n_bytes: asked.append(n_bytes))
    state, out = tmp_path / "x.training", tmp_path / "x.safetensors"
    result = train(np.eye(4, 2), recipe=replace(RECIPE, average=average), state=state)
    save_checkpoint(out, result.model, result.card)
    written = state.stat().st_size + out.stat().st_size
    assert asked == [pytest.approx(written, rel=0.02)], written  # headers are small
    assert load_checkpoint(out).card.name == "array"


@pytest.mark.parametrize("save_every", [float("nan"), -1, True, "soon"])
def test_seconds_between_writes_are_a_number(tmp_path, save_every):
    with pytest.raises(InputError, match="save_every"):
        train(np.eye(4, 2), recipe=RECIPE, state=tmp_path / "x.training", save_every=save_every)


def test_errors_of_safetensors_that_are_not_the_disks_stay_what_they_are(tmp_path):
    def fails(*_):
        raise SafetensorError("Error while serializing: something else")

    with pytest.raises(SafetensorError):
        write_tensors(fails, {}, tmp_path / "x", {})
    with pytest.raises(OSError) as caught:
        from safetensors.numpy import save_file

        write_tensors(save_file, {"a": np.zeros(2)}, tmp_path / "nowhere" / "x", {})
    assert (caught.value.errno, caught.value.strerror) == (errno.ENOENT, os.strerror(errno.ENOENT))


def test_arrays_are_trained_on_with_a_state_as_without(tmp_path):
    data = np.random.default_rng(0).uniform(-1, 1, (4, 2))
    kept, plain = train(data, recipe=RECIPE, state=tmp_path / "x.training"), train(data, recipe=RECIPE)
    for one, other in zip(kept.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)
