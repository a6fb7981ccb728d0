"""Tuning: the whole path under the interpreter with an injected clock, the tables, and what is said without a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from conftest import random_mlp

pytest.importorskip("triton")

from pathlib import Path

import pytest

from kaleido_fast import InputError
from kaleido_fast.benchmarking.faults import DeviceLostError, device_answers
from kaleido_fast.benchmarking.tuning import (
    FusedRun,
    check_fused,
    engine_measure,
    is_table,
    tune_model,
    tune_shape,
    write_table,
)
from kaleido_fast.cli import cli
from kaleido_fast.planning.facts import DeviceFacts
from kaleido_fast.system.devices import device_facts
from kaleido_fast.system.folders import user_data
from kaleido_fast.system.tuned import table_name, tuned_tiles
from kaleido_fast.system.versions import library_versions
from kaleido_kernels.choice import choose
from kaleido_kernels.graph.plan import GraphTile
from kaleido_kernels.proving.trials import expected_milliseconds, trial_tiles
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.tile import GpuFacts, Tile
from kaleido_kernels.tuned import read_tuned, tile_to_json, tuned_key
from kaleido_kernels.wide.plan import WideTile

CPU = torch.device("cpu")
FACTS = DeviceFacts("cpu", has_triton=True, interpreter=True)
MNIST = NetShape((784, *[500] * 10, 784))
POINTS = NetShape((2, 50, 50, 2))


def paced(pace: dict, default: float = 3.0):
    """A measurement that gives a tile the seconds in a table, with a small spread."""

    def measure(tile):
        seconds = pace.get(tile, default)
        if isinstance(seconds, Exception):
            raise seconds
        return [seconds, 1.01 * seconds, 0.99 * seconds]

    return measure


def test_the_fastest_tile_is_kept_and_the_gain_is_told():
    default = choose(POINTS, "fp16", GpuFacts()).tile
    other = Tile("narrow", 128, 8)
    seen = []
    found = tune_shape(
        "points", POINTS, "fp16", GpuFacts(), paced({default: 2.0, other: 1.0}), lambda *at: seen.append(at)
    )
    assert (found.default, found.best, found.gain) == (default, other, 2.0)
    assert "2.00 times as fast as narrow 64 chains" in found.explain()
    assert [share for share, _ in seen] == sorted(share for share, _ in seen) and seen[-1][0] == 1.0


def test_a_difference_inside_the_spread_keeps_the_plans_own_choice():
    default = choose(POINTS, "fp16", GpuFacts()).tile
    found = tune_shape("points", POINTS, "fp16", GpuFacts(), paced({default: 2.0}, default=1.995))
    assert found.best == default and "stays" in found.explain()


def test_tiles_that_fail_are_left_out_and_counted():
    default = choose(POINTS, "fp16", GpuFacts()).tile
    found = tune_shape("points", POINTS, "fp16", GpuFacts(), paced({default: RuntimeError("no\nmore")}))
    assert found.best != default and found.gain is None and "1 failed" in found.explain()
    assert found.record()["trials"][0]["problem"] == "no"
    with pytest.raises(InputError, match="could be timed; the first said: broken"):
        tune_shape("points", POINTS, "fp16", GpuFacts(), paced({}, default=RuntimeError("broken")))


def test_a_tile_that_takes_the_gpu_ends_the_tuning_and_is_named():
    """In that process every other tile would fail too, and a table be made of what was measured before."""
    default, tried = choose(POINTS, "fp16", GpuFacts()).tile, []

    def measure(tile):
        tried.append(tile)
        if len(tried) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        return [1.0, 1.0, 1.0]

    def tune(answers):
        tried.clear()
        return tune_shape("points", POINTS, "fp16", GpuFacts(), measure, answers=answers)

    with pytest.raises(DeviceLostError) as caught:
        tune(lambda: False)
    assert tried[0] == default and len(tried) == 2
    assert str(caught.value).startswith(f"points, {tried[1].name}: CUDA error: an illegal memory access")
    assert "\n" not in str(caught.value)
    assert len(tune(lambda: True).trials) == len(tried) > 2, "a tile that fails otherwise costs itself alone"


def test_a_device_is_lost_when_it_cannot_be_waited_for(monkeypatch):
    assert device_answers(CPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert device_answers(torch.device("cuda"))

    def fails(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    assert not device_answers(torch.device("cuda"))


@pytest.mark.parametrize("precision", ["fp16x3", "ieee", "fp16", "bf16"])
@pytest.mark.parametrize("shape", [POINTS, NetShape((64, *[256] * 5, 64)), MNIST], ids=str)
def test_trials_are_pruned_but_keep_the_default(shape, precision):
    facts = GpuFacts()
    tiles = trial_tiles(shape, precision, facts)
    assert tiles[0] == choose(shape, precision, facts).tile
    assert len(set(tiles)) == len(tiles) <= 30
    kernels = {tile.kernel for tile in tiles}
    assert "graph" in kernels or shape != MNIST or precision == "fp16x3", "it may be faster than the model says"
    assert len(tiles) <= 12 or "onchip" not in kernels, "60 seconds a network"
    assert "narrow" not in kernels or max(shape.widths) <= 128
    assert all(expected_milliseconds(shape, precision, tile, facts) > 0 for tile in tiles)


@pytest.mark.interpreter
def test_the_whole_path_under_the_interpreter(tmp_path):
    model = random_mlp(3, 9, 3).requires_grad_(False)
    tiles = [Tile("narrow", 16, 1), WideTile(16, 16, 16, 16, 4, 2, use_tma=False), GraphTile(16, rows=8, cols=16)]
    measure = engine_measure(model, "fp32", CPU, FACTS, 20, rounds=3)
    found = tune_model("tiny", model, "fp32", CPU, FACTS, 20, measure=measure, tiles=tiles)
    problems = [trial.problem for trial in found.trials]
    assert problems == [""] * 4, problems
    assert all(len(trial.seconds) == 3 and min(trial.seconds) > 0 for trial in found.trials)
    triton = library_versions("triton")["triton"]
    assert write_table(tmp_path / table_name("My GPU"), "My GPU", triton, [found]) == 1
    assert tuned_tiles("My GPU", [tmp_path]) == {found.key: tile_to_json(found.best)}


@pytest.mark.interpreter
def test_a_tile_with_wrong_states_is_not_timed():
    model = random_mlp(3, 9, 3).requires_grad_(False)
    other = random_mlp(3, 9, 3, seed=1).requires_grad_(False)
    run = FusedRun(other, "fp32", CPU, FACTS, 5, Tile("narrow", 16, 1))
    with pytest.raises(InputError, match="differs from the reference"):
        check_fused(run, model, "fp32")


def make_table(folder, tile: Tile, device: str = "My GPU", **more) -> str:
    key = tuned_key(POINTS, "fp16")
    table = {"device": device, "triton": library_versions("triton")["triton"], "tiles": {key: tile_to_json(tile)}}
    folder.mkdir(exist_ok=True)
    (folder / "My_GPU.json").write_text(json.dumps({**table, **more}))
    return key


def test_a_persons_own_table_wins_over_the_shipped_one(tmp_path, recwarn):
    key = make_table(tmp_path / "own", Tile("narrow", 32, 4))
    make_table(tmp_path / "shipped", Tile("narrow", 16, 1))
    assert tuned_tiles("My GPU", [tmp_path / "own", tmp_path / "shipped"])[key]["block_chains"] == 32
    assert tuned_tiles("My GPU", [tmp_path / "none", tmp_path / "shipped"])[key]["block_chains"] == 16
    assert not recwarn.list


@pytest.mark.parametrize("more", [{"device": "A GPU"}, {"triton": "2.1.0"}, {"triton": None}, {"tiles": 3}])
def test_a_table_of_another_gpu_or_triton_is_passed_over_with_one_line(tmp_path, more):
    make_table(tmp_path, Tile("narrow", 32, 4), **more)
    with pytest.warns(UserWarning, match="ignored: .*My_GPU.json is no tuned table for here") as caught:
        assert tuned_tiles("My GPU", [tmp_path]) == {}
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


def test_writing_keeps_the_entries_of_an_earlier_run_but_not_of_another_triton(tmp_path):
    found = tune_shape("points", POINTS, "bf16", GpuFacts(), paced({}))
    key, path = make_table(tmp_path, Tile("narrow", 32, 4)), tmp_path / "My_GPU.json"
    triton = library_versions("triton")["triton"]
    assert write_table(path, "My GPU", triton, [found]) == 2 and key in json.loads(path.read_text())["tiles"]
    assert write_table(path, "My GPU", "99.0", [found]) == 1
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside it"


def test_tables_lie_where_the_platform_keeps_data(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert user_data() == tmp_path / "kaleido-fast"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert user_data().parts[-3:] == (".local", "share", "kaleido-fast")
    monkeypatch.setattr("sys.platform", "darwin")
    assert user_data().parts[-2:] == ("Application Support", "kaleido-fast")
    assert table_name("NVIDIA H200 / x") == "NVIDIA_H200_x.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    result = CliRunner().invoke(cli, ["tune", "--net", "points1d"])
    assert isinstance(result.exception, InputError) and "there is none here" in str(result.exception)
    assert not any(tmp_path.iterdir())


@pytest.mark.gpu
def test_tuning_on_a_gpu_writes_a_table_that_the_next_run_uses(tmp_path):
    out = tmp_path / "table.json"
    options = ["--net", "points1d", "--precision", "fp16", "--chains", "5000", "--rounds", "5", "--out", str(out)]
    result = CliRunner().invoke(cli, ["tune", *options])
    assert result.exception is None, result.output
    shape = NetShape((1, *[10] * 9, 1))
    facts = device_facts(torch.device("cuda"))
    tiles = read_tuned(out, facts.name, library_versions("triton")["triton"])
    assert set(tiles) == {tuned_key(shape, "fp16")}
    assert choose(shape, "fp16", facts.gpu, tiles).tuned


def test_a_table_of_tiles_is_added_to_only_where_it_is_of_this_gpu(folder):
    path = Path("table.json")
    assert not is_table(path, "My GPU", "3.7.1")
    path.write_text(json.dumps({"device": "My GPU", "triton": "3.7.0", "tiles": {}}))
    assert is_table(path, "My GPU", "3.7.1")
    for change in ({"device": "Other"}, {"triton": "3.6.0"}, {"tiles": 3}):
        path.write_text(json.dumps({"device": "My GPU", "triton": "3.7.0", "tiles": {}, **change}))
        assert not is_table(path, "My GPU", "3.7.1")
    path.write_bytes(b"\xff\xfe")
    assert not is_table(path, "My GPU", "3.7.1")
