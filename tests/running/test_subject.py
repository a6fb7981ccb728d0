"""What is sampled: a loaded checkpoint is what lies in memory, and its file is read once a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import call

import kaleido_fast.checkpoint
from kaleido_fast import (
    GeneralModuleWarning,
    InputError,
    attractors,
    fast_sample,
    load_checkpoint,
    open_draws,
    sample_to,
)
from kaleido_fast.evaluating.evaluation import check_draws
from kaleido_fast.model import model_hash
from kaleido_fast.running.subject import resolve_subject
from kaleido_fast.showing.states import sample_shown

FEW: dict[str, Any] = {"n_chains": 5, "device": "cpu", "engine": "reference"}


@pytest.fixture
def reads(monkeypatch):
    """Checkpoints whose files were read, in order."""
    read, found = kaleido_fast.checkpoint.read_sealed, []

    def counted(path):
        found.append(path.name)
        return read(path)

    monkeypatch.setattr(kaleido_fast.checkpoint, "read_sealed", counted)
    return found


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_loaded_checkpoint_is_sampled_as_its_file_is(small_checkpoint):
    by_path = fast_sample(small_checkpoint, **FEW)
    loaded = load_checkpoint(small_checkpoint)
    by_checkpoint = fast_sample(loaded, **FEW)
    assert by_checkpoint.request.burn_in == loaded.card.sampling["burn_in"], "the card recommends"
    assert by_checkpoint.record() == by_path.record()
    assert by_checkpoint.model_hash == loaded.model_hash
    assert torch.equal(by_checkpoint.draws, by_path.draws)


@pytest.mark.parametrize("name", ["a.npy", "a.zarr"])
def test_a_loaded_checkpoint_is_stored_as_its_file_is(small_checkpoint, tmp_path, name):
    if name == "a.zarr":
        pytest.importorskip("zarr")
    for kind, model in {"path": small_checkpoint, "loaded": load_checkpoint(small_checkpoint)}.items():
        (tmp_path / kind).mkdir()
        sample_to(tmp_path / kind / name, model, **FEW)
    assert contents(tmp_path / "loaded") == contents(tmp_path / "path")
    with pytest.raises(InputError, match="is read by this run"):
        source = small_checkpoint.rename(tmp_path / "m.npy")
        sample_to(source, load_checkpoint(source), **FEW)


def test_end_states_are_those_of_the_loaded_checkpoint(small_checkpoint):
    run = fast_sample(small_checkpoint, **FEW | {"n_chains": 50}, jitter=0.0, burn_in=400)
    by_path, loaded = attractors(run, small_checkpoint), attractors(run, load_checkpoint(small_checkpoint))
    assert torch.equal(by_path.states, loaded.states) and torch.equal(by_path.radii, loaded.radii)


@pytest.mark.parametrize("options", [{"dim": 3}, {"data_range": (0.0, 1.0)}])
def test_a_size_that_is_not_the_checkpoints_is_refused(small_checkpoint, options):
    messages = []
    for model in (small_checkpoint, load_checkpoint(small_checkpoint)):
        with pytest.raises(InputError) as caught:
            fast_sample(model, **FEW, **options)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_weights_that_changed_after_loading_are_what_is_sampled(small_checkpoint, tmp_path):
    loaded = load_checkpoint(small_checkpoint)
    before = fast_sample(loaded, **FEW)
    sample_to(tmp_path / "a.npy", loaded, **FEW)
    with torch.no_grad():
        loaded.model.linears[0].weight.mul_(0.5)
    after = fast_sample(loaded, **FEW)
    assert after.model_hash == model_hash(loaded.model) != loaded.model_hash == before.model_hash
    assert after.request == before.request
    assert torch.equal(after.draws, fast_sample(loaded.model, **FEW, **loaded.card.settings()).draws)
    assert not torch.equal(after.draws, before.draws)
    draws = open_draws(tmp_path / "a.npy")
    check_draws(draws, load_checkpoint(small_checkpoint))
    with pytest.raises(InputError, match="drawn from another model"):
        check_draws(draws, loaded)
    with pytest.raises(InputError, match="model_hash was"):
        sample_to(tmp_path / "a.npy", loaded, **FEW)


def test_a_module_that_changed_after_loading_runs_as_it_is(small_checkpoint):
    loaded = load_checkpoint(small_checkpoint)
    loaded.model.linears[0].register_forward_hook(lambda module, given, made: made * 0.5)
    subject = resolve_subject(loaded)
    assert subject.spec is None and subject.model_hash != loaded.model_hash
    assert subject.recommended == resolve_subject(small_checkpoint).recommended != {}
    with pytest.warns(GeneralModuleWarning):
        result = fast_sample(loaded, n_chains=5, device="cpu")
    assert result.request.burn_in == loaded.card.sampling["burn_in"]


CALLS = {
    "fast_sample": lambda path: fast_sample(path, **FEW),
    "sample_to": lambda path: sample_to(path.with_name("a.npy"), path, **FEW),
    "sample_shown": lambda path: sample_shown(path, **FEW, steps=(0, 1, 2)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_reads_its_checkpoint_once(small_checkpoint, reads, name):
    CALLS[name](small_checkpoint)
    assert reads == ["small.safetensors"]


def test_a_loaded_checkpoint_is_not_read_again(small_checkpoint, tmp_path, reads):
    loaded = load_checkpoint(small_checkpoint)
    run = fast_sample(loaded, **FEW, tol=1e6, jitter=0.0)
    attractors(run, loaded)
    sample_to(tmp_path / "a.npy", loaded, **FEW)
    sample_shown(loaded, **FEW)
    assert reads == ["small.safetensors"]


COMMANDS = {
    "sample-npy": ("sample", "--out", "a.npy"),
    "sample-npz": ("sample", "--out", "a.npz"),
    "sample-zarr": ("sample", "--out", "a.zarr"),
    "animate": ("animate", "--out", "a.gif"),
    "doctor": ("doctor",),
    "attractors": ("attractors", "--burn-in", "400", "--out", "a.json"),
    "evaluate": ("evaluate", "--data", "data.npy", "--k", "2", "--out", "e.json"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_reads_its_checkpoint_once(small_checkpoint, monkeypatch, capsys, reads, name):
    import numpy as np

    if name == "sample-zarr":
        pytest.importorskip("zarr")
    monkeypatch.chdir(small_checkpoint.parent)
    np.save("data.npy", np.linspace(-1, 1, 40 * 6, dtype=np.float32).reshape(40, 2, 3))
    command, *options = COMMANDS[name]
    model = ("small.safetensors",) if command == "evaluate" else ("--model", "small.safetensors")
    again = 2 if command == "sample" else 1  # what is finished is found without more reading
    for _ in range(again):
        status, _, errors = call(monkeypatch, capsys, command, *model, "--chains", "20", "--device", "cpu", *options)
        assert status == 0, errors
    assert reads == ["small.safetensors"] * again
