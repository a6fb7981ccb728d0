"""Stores of draws seen from outside: every command that reads draws, xarray, loaders of batches; what does not fit."""

from __future__ import annotations

import json
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call, random_mlp
from PIL import Image

from kaleido_fast import ModelCard, fast_sample, open_draws, sample_to, save_checkpoint
from kaleido_fast.storing.draws import read_draws

pytest.importorskip("zarr")

N = 4096 + 100
RUN: dict[str, Any] = {"n_chains": N, "seed": 5, "burn_in": 3, "device": "cpu"}
MODEL = random_mlp(16, 24, 16, sample_shape=(4, 4))


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    """A folder with a checkpoint, and one run of it in three encodings."""
    folder = tmp_path_factory.mktemp("stores")
    save_checkpoint(folder / "m.safetensors", MODEL, ModelCard("m"))
    save_checkpoint(folder / "other.safetensors", random_mlp(16, 24, 16, seed=1), ModelCard("other"))
    for dtype in ("float32", "float16", "uint8"):
        sample_to(folder / f"{dtype}.zarr", folder / "m.safetensors", **RUN, dtype=dtype, chunk_chains=4096)
    return folder


def refusal(monkeypatch, capsys, *args: object) -> str:
    """The one line with which the program refuses."""
    status, out, errors = call(monkeypatch, capsys, *args)
    assert (status, out, errors.count("\n")) == (2, "", 1), errors
    return errors


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 5e-4), ("uint8", 1 / 255 + 1e-6)])
def test_values_are_those_of_the_run_as_far_as_the_type_goes(stores, dtype, error):
    want = fast_sample(stores / "m.safetensors", **RUN).draws
    assert float((open_draws(stores / f"{dtype}.zarr")[:].float() - want).abs().max()) <= error


def test_info_tells_what_a_store_holds(stores, monkeypatch, capsys):
    status, out, _ = call(monkeypatch, capsys, "info", stores / "uint8.zarr", "--json")
    facts = json.loads(out)
    assert status == 0
    assert (facts["chains"], facts["chains done"], facts["finished"], facts["chains per chunk"]) == (N, N, True, 4096)
    assert facts["encoding"]["dtype"] == "uint8"
    assert facts["request"]["seed"] == 5
    values = open_draws(stores / "uint8.zarr")[:]
    assert facts["range"] == [float(values.min()), float(values.max())]


def test_info_looks_at_some_chunks_of_a_large_store(stores, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kaleido_fast.cli.info.MOST_CHUNKS", 3)
    run = {**RUN, "n_chains": 4096 * 7, "burn_in": 0}
    sample_to(tmp_path / "a.zarr", stores / "m.safetensors", **run, chunk_chains=4096)
    facts = json.loads(call(monkeypatch, capsys, "info", tmp_path / "a.zarr", "--json")[1])
    seen = torch.cat([open_draws(tmp_path / "a.zarr")[4096 * block : 4096 * (block + 1)] for block in (0, 3, 6)])
    assert facts["range of 3 chunks"] == [float(seen.min()), float(seen.max())]
    assert "range" not in facts


def test_show_draws_a_store_as_it_draws_a_file(stores, tmp_path, monkeypatch, capsys):
    sample_to(tmp_path / "a.npy", stores / "m.safetensors", **RUN)
    for file in (stores / "float32.zarr", tmp_path / "a.npy"):
        png = tmp_path / f"{file.suffix[1:]}.png"
        assert call(monkeypatch, capsys, "show", file, "--first", 4090, "--chains", 20, "--out", png, "--quiet")[0] == 0
    sheets = [np.asarray(Image.open(tmp_path / name)) for name in ("zarr.png", "npy.png")]
    assert np.array_equal(*sheets)
    assert sheets[0].std() > 0


def test_evaluate_measures_stored_draws_as_fresh_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ("--chains", 60, "--seed", 0, "--sigma", 0.3, "--no-classes", "--overwrite", "--json")
    monkeypatch.setattr("kaleido_fast.evaluating.evaluation.WATCHED", 20)
    monkeypatch.setattr("kaleido_fast.evaluating.evaluation.RADIUS_EXAMPLES", 5)
    sample_to("a.zarr", "digits", n_chains=200)
    sample_to("a.npy", "digits", n_chains=200)
    fresh, store, file = (
        json.loads(call(monkeypatch, capsys, "evaluate", "digits", *options, *more)[1])
        for more in ((), ("--draws", "a.zarr"), ("--draws", "a.npy"))
    )
    assert fresh["sets"]["samples"] == store["sets"]["samples"] == file["sets"]["samples"]
    assert fresh["sets"]["samples"]["coverage"] > 0
    for name, value in store["runs"]["samples"].items():
        if name in fresh["runs"]["samples"] and name != "n_draws":
            assert fresh["runs"]["samples"][name] == value, name
    assert store["runs"]["samples"]["file"] == "a.zarr"
    assert "without jitter" not in store["sets"], "nothing is sampled"
    status, out, _ = call(monkeypatch, capsys, "evaluate", "digits", *options[:-1], "--draws", "a.npy", "--quiet")
    assert (status, out) == (0, "")


def test_draws_that_cannot_be_measured_are_refused(stores, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(stores)
    before = sorted(stores.iterdir())

    def refused(*args: object) -> str:
        return refusal(monkeypatch, capsys, "evaluate", *args)

    assert "give the model first, and --draws float32.zarr" in refused("float32.zarr")
    assert "draws of 16 values" in refused("digits", "--draws", "float32.zarr")
    other = refused("other.safetensors", "--draws", "float32.zarr", "--held-out", "digits")
    assert "was drawn from another model" in other
    assert "--jitter is for samples that are drawn now" in refused("digits", "--draws", "float32.zarr", "--jitter", 1)
    assert "gone.zarr does not exist" in refused("digits", "--draws", "gone.zarr")
    assert sorted(stores.iterdir()) == before


def test_an_unfinished_store_says_so(stores, tmp_path, monkeypatch, capsys):
    from kaleido_fast.storing.zarr_output import ZarrOutput

    sample_to(tmp_path / "a.zarr", stores / "m.safetensors", **RUN, chunk_chains=4096)
    ZarrOutput.open(tmp_path / "a.zarr", writable=True).forget(1)
    facts = json.loads(call(monkeypatch, capsys, "info", tmp_path / "a.zarr", "--json")[1])
    assert (facts["finished"], facts["chains done"]) == (False, 4096)
    text = refusal(monkeypatch, capsys, "show", tmp_path / "a.zarr", "--first", 4096)
    assert "block 1 (draws/c.1.0.0) is missing: the run is unfinished" in text
    assert call(monkeypatch, capsys, "show", tmp_path / "a.zarr", "--chains", 9, "--quiet")[0] == 0


def test_xarray_decodes_a_store(stores):
    xarray = pytest.importorskip("xarray")
    for dtype in ("float32", "float16", "uint8"):
        opened = xarray.open_zarr(stores / f"{dtype}.zarr", consolidated=False)
        want = open_draws(stores / f"{dtype}.zarr")
        assert opened.sizes == {"chain": N, "draw": 1, "dim": 16, "block": 2, "mark": 7}
        assert np.allclose(opened["draws"].values, want[:].numpy(), atol=1e-6)
        assert np.array_equal(opened["residual"].values, want.per_chain("residual"))
        assert opened.attrs["kaleido_fast"]["record"]["request"]["seed"] == 5


def test_loaders_read_stores_in_processes_of_their_own(stores):
    draws = open_draws(stores / "uint8.zarr")
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(draws, batch_size=999, shuffle=True, generator=generator, num_workers=2)
    rows = torch.cat(list(loader))
    assert rows.shape == draws[:].shape
    assert torch.equal(rows.sum(0).round(), draws[:].sum(0).round())
    assert not torch.equal(rows, draws[:])


def test_chains_at_work_at_once_change_no_byte_of_a_store(stores, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing about chunks, which were not asked for
        for name, more in (("a", {}), ("b", {"block_chains": 100})):
            sample_to(tmp_path / f"{name}.zarr", stores / "m.safetensors", **RUN, **more)
    first, second = (
        {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}
        for store in (tmp_path / "a.zarr", tmp_path / "b.zarr")
    )
    assert first == second


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--out", "file.zarr"), "file.zarr is a file: give the folder of a store"),
        (("--out", "folder.zarr"), "folder.zarr cannot be read as a store of draws"),
        (("--out", "folder.zarr", "--overwrite"), "folder.zarr was not written by kaleido-fast and stays as it is"),
        (("--out", "store.npy"), "store.npy is a folder"),
        (("--out", "float32.zarr", "--chunk-chains", "9000"), "has chunks of 4,096 chains, asked for are 9,000"),
        (("--out", "float32.zarr", "--dtype", "uint8"), "encoding.dtype was float32, is now uint8"),
        (("--out", "new.zarr", "--chunk-chains", "0"), "chunk_chains is 0"),
        (("--out", "new.zarr", "--chunk-chains", "99999999999", "--chains", "99999999999"), "chains fit"),
        (("--out", "new.zarr", "--chunk-chains", "many"), "'many' is not a valid integer"),
        (("--out", "new.zar"), "unknown format"),
    ],
)
def test_outputs_and_chunks_that_do_not_fit_are_refused(stores, monkeypatch, capsys, args, text):
    monkeypatch.chdir(stores)
    Path("file.zarr").write_text("mine")
    for name in ("folder.zarr", "store.npy"):
        Path(name).mkdir(exist_ok=True)
        (Path(name) / "thesis.tex").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in stores.rglob("*")}
    command = ("sample", "--model", "m.safetensors", "--seed", "5", "--burn-in", "3", "--quiet")
    chains = () if "--chains" in args else ("--chains", N)
    assert text in refusal(monkeypatch, capsys, *command, *chains, *args)
    assert {path: path.stat().st_mtime_ns for path in stores.rglob("*") if path != stores} == {
        path: value for path, value in before.items() if path != stores
    }


def test_draws_are_indexed_like_an_array_and_are_a_data_set(tmp_path):
    model, run = (
        random_mlp(3, 5, 3),
        {"n_chains": 4096 * 3 + 77, "burn_in": 1, "n_draws": 2, "seed": 3, "device": "cpu"},
    )
    sample_to(tmp_path / "a.zarr", model, **run, chunk_chains=4096)
    draws = pickle.loads(pickle.dumps(open_draws(tmp_path / "a.zarr")))
    whole = fast_sample(model, **run).draws
    rng = random.Random(0)
    picks = [rng.randrange(len(whole)) for _ in range(50)]
    for index in (0, -1, slice(4000, 4200, 3), slice(-5, None), picks, (slice(0, 9), 1), (3, 0, 2)):
        assert torch.equal(draws[index], whole[index]), index
    with pytest.raises(IndexError):
        draws[len(whole)]
    loader = torch.utils.data.DataLoader(draws, batch_size=1000)
    assert torch.equal(torch.cat(list(loader)), whole)
    values = read_draws(tmp_path / "a.zarr").draws
    assert np.array_equal(np.asarray(values), whole.numpy())
    assert values.shape == tuple(whole.shape)
