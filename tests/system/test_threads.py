"""The number of threads: runs that go on from a file end with the bits that they were begun with."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from conftest import random_mlp
from folders import contents
from stored_blocks import stop_after
from torch import nn

from kaleido_fast import InputError, fast_sample, sample_to, train
from kaleido_fast.errors import StreamInterruptedError
from kaleido_fast.model import ModelSpec
from kaleido_fast.presets import TrainingRecipe
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.storing.joining import join_stores
from kaleido_fast.storing.record import as_begun, difference
from kaleido_fast.system.threads import threads
from kaleido_fast.training.loop import TrainingInterruptedError

pytestmark = pytest.mark.filterwarnings("ignore::kaleido_fast.training.trainer.UnstableModelWarning")

# Products of 1024 x 256 by 256 x 64 in fp64, and of 16 x 784 by 784 x 64 in fp32, are summed by several threads.
WIDE = random_mlp(64, 256, 64)
RUN = {"n_chains": 1024 * 3 + 7, "burn_in": 2, "tol": None, "device": "cpu", "engine": "reference", "precision": "fp64"}
POINTS = Dataset("points", torch.rand((40, 96), generator=torch.Generator().manual_seed(3)) * 1.6 - 0.8)
SPEC, RECIPE = ModelSpec((96, 784, 96)), TrainingRecipe(steps=5, batch_size=16, noise=0.3, warmup=2)


@contextlib.contextmanager
def here(number: int):
    """As on a machine with so many cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
        assert torch.get_num_threads() == number, "the program's own number is put back"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["a.zarr", "a.npy"])
@pytest.mark.parametrize(("begun", "resumed"), [(1, 2), (2, 1), (1, 3)])
def test_a_store_goes_on_with_the_threads_that_it_was_begun_with(tmp_path, name, begun, resumed):
    pytest.importorskip("zarr")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run = {**RUN, "chunk_chains": 1024}
    with here(begun):
        sample_to(whole / name, WIDE, **run)
        with pytest.raises(StreamInterruptedError):
            sample_to(broken / name, WIDE, **run, callback=stop_after(2048))
    with here(resumed):
        assert sample_to(broken / name, WIDE, **run).stored["threads"] == begun
        want, got = contents(whole), contents(broken)
        assert [name for name in {**want, **got} if want.get(name) != got.get(name)] == [], "files that differ"
        assert sample_to(whole / name, WIDE, **run).stats is None, "finished is finished"


def test_stores_of_other_numbers_of_threads_are_not_joined(tmp_path):
    pytest.importorskip("zarr")
    parts = [tmp_path / "0.zarr", tmp_path / "1.zarr"]
    for number, part in enumerate(parts):
        with here(1 + number):
            sample_to(part, WIDE, **{**RUN, "n_chains": 1024, "first_chain": 1024 * number})
    with pytest.raises(InputError, match=r"different runs: threads was 1, is now 2"):
        join_stores(tmp_path / "all.zarr", parts)
    assert not (tmp_path / "all.zarr").exists()


def test_outputs_without_a_number_of_threads_go_on(tmp_path):
    """Those of earlier versions, and of engines on which it changes nothing."""
    asked = {"seed": 1, "threads": 2}
    assert not difference({"request": 1}, as_begun({"request": 1, "threads": 2}, {"request": 1}))
    assert as_begun(asked, {"threads": 5}) == {"seed": 1, "threads": 5}
    assert as_begun({"seed": 1}, {"threads": 5}) == {"seed": 1}
    with here(2):
        result = sample_to(tmp_path / "a.npy", WIDE, n_chains=5, burn_in=1, engine="cpu", device="cpu")
    assert "threads" not in result.stored
    assert "threads" not in json.loads((tmp_path / "a.json").read_text())


@pytest.mark.parametrize(("begun", "resumed"), [(1, 2), (2, 1)])
def test_training_goes_on_with_the_threads_that_it_was_begun_with(tmp_path, begun, resumed):
    def stop(progress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    with here(begun):
        whole = train(POINTS, spec=SPEC, recipe=RECIPE, device="cpu")
        with pytest.raises(TrainingInterruptedError):
            train(POINTS, spec=SPEC, recipe=RECIPE, device="cpu", state=tmp_path / "s", callback=stop)
    with here(resumed):
        text = f"was begun with {begun} threads and goes on with them, not with {resumed}"
        with pytest.warns(UserWarning, match=text) as caught:
            got = train(POINTS, spec=SPEC, recipe=RECIPE, device="cpu", state=tmp_path / "s")
    assert [warning.filename for warning in caught if text in str(warning.message)] == [__file__]
    assert got.history == whole.history
    for name, tensor in whole.model.state_dict().items():
        error = float((got.model.state_dict()[name] - tensor).abs().max())
        assert error == 0, f"{name} differs by {error}"
    assert got.card == whole.card


@pytest.mark.parametrize("options", [{"engine": "cpu"}, {"engine": "cpu", "jitter": 0.1}], ids=str)
def test_the_cpu_engine_has_the_same_bits_with_any_number_of_threads(options):
    run = {"n_chains": 700, "burn_in": 4, "n_draws": 2, "device": "cpu", **options}
    with here(1):
        want = fast_sample(WIDE, **run)
    for number in (2, 3):
        with here(number):
            assert torch.equal(fast_sample(WIDE, **run).draws, want.draws), f"{number} threads"


def test_a_number_that_is_not_allowed_is_said(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    text = f"7 threads are needed for the same bits, only {before} are allowed here"
    with pytest.raises(InputError, match=text), threads(7):
        raise AssertionError


def test_a_module_is_stored_with_the_same_number(tmp_path):
    options = {"n_chains": 4096 * 3, "burn_in": 1, "chunk_chains": 4096, "dim": 3, "data_range": (-1.0, 1.0)}
    with here(2), pytest.raises(StreamInterruptedError):
        sample_to(tmp_path / "a.npy", nn.Tanh(), **options, device="cpu", callback=stop_after(8192))
    seen = []
    with here(1):
        callback = lambda _: seen.append(torch.get_num_threads())  # noqa: E731
        sample_to(tmp_path / "a.npy", nn.Tanh(), **options, device="cpu", callback=callback)
    assert set(seen) == {2}
