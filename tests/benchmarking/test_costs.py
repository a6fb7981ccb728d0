"""The arithmetic of benchmarks/costs.py: against a store, against runs played by chance, and at its ends."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from kaleido_fast.benchmarking.costs.arithmetic import (
    LargeRun,
    expected_seconds,
    lost_per_stop,
    simulate,
    storage,
    times,
)
from kaleido_fast.benchmarking.costs.planned import make_layout, modelled_rate
from kaleido_fast.benchmarking.costs.text import remarks
from kaleido_fast.cli import LazyGroup
from kaleido_fast.cli.costs import command as costs_command
from kaleido_fast.cli.costs import main
from kaleido_fast.storing.encoding import Encoding
from kaleido_fast.storing.layout import Layout

ROOT = Path(__file__).parents[2]
JOB = LargeRun(Layout(1_000_000, 1, 64, 1000, Encoding("uint8", 2 / 255, -1.0)), 20, rate=1e5, bandwidth=1e8)


def test_sizes_are_counted_by_hand():
    found = storage(JOB)
    assert found["blocks"] == 1000
    assert found["bytes"] == 1_000_000 * (64 + 4 + 4 + 4 + 1)
    assert found["bytes_per_draws_chunk"] == 64_000
    assert found["files"] == 6 * 1000 + 7
    assert found["gets_to_resume"] == 1000 * (1 + 3 * 2)
    assert times(replace(JOB, workers=4))["count_hours"] * 3600 == pytest.approx(7000 * 0.02 / 4)
    assert storage(replace(JOB, stored_share=0.5))["stored_bytes"] == found["bytes"] // 2


def test_times_are_counted_by_hand():
    found = times(JOB)
    assert found["device_hours"] == pytest.approx(1e6 * 20 / 1e5 / 3600)
    assert found["block_seconds"] == pytest.approx(0.2)
    assert found["write_seconds"] == pytest.approx(6 * 0.02 + 77_000 / 1e8)
    assert found["wall_hours"] * 3600 == pytest.approx(1000 * 0.2 + 120 + 0.12077)
    assert found["wall_hours_preempted"] == found["wall_hours"]
    assert (found["added_share"], found["preemptions"]) == (0, 0)
    slow = replace(JOB, operation_seconds=1.0)
    assert times(slow)["wall_hours"] * 3600 == pytest.approx(1000 * 6.00077 + 120 + 3 * 6.00077), (
        "writing sets the pace"
    )
    assert "writing is slower" in remarks(slow)[0]
    assert remarks(replace(JOB, operation_seconds=1e-3)) == []


def test_a_store_of_the_kind_is_a_store():
    zarr_stores = pytest.importorskip("kaleido_fast.storing.zarr_output")
    pytest.importorskip("zarr")
    import tempfile

    layout = Layout(2500, 1, 3, 1000, Encoding())
    with tempfile.TemporaryDirectory() as folder:
        output = zarr_stores.ZarrOutput.create(
            Path(folder) / "a.zarr", layout, {"request": {}, "encoding": layout.encoding.as_dict()}
        )
        for block in range(3):
            n = layout.length(block)
            ones = {name: np.ones((n, *shape[1:]), dtype) for name, (shape, dtype) in layout.shapes().items()}
            output.write(block, ones)
        files = sum(file.is_file() for file in output.path.rglob("*"))
        n_bytes = sum(output.arrays[name].nbytes for name in layout.shapes())
    found = storage(replace(JOB, layout=layout))
    assert (found["files"], found["bytes"], found["blocks"]) == (files, n_bytes, 3)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("hourly", [0.5, 20, pytest.param(200, marks=pytest.mark.slow)])
def test_expected_times_are_those_of_runs_by_chance(group, hourly):
    """The mean of many played runs of one group, within four of its standard errors."""
    job = replace(JOB, workers=group, group=group, preemptions=hourly / 3600, restart_seconds=5, operation_seconds=0.05)
    walls, stops = np.array([simulate(job, seed) for seed in range(400)]).T
    error = walls.std() / math.sqrt(len(walls))
    # Blocks of a start are whole ones in the play; the formula has them flow: one block of difference at most.
    assert times(job)["wall_hours_preempted"] * 3600 == pytest.approx(walls.mean(), abs=4 * error + job.paced_seconds)
    expected = times(job)["preemptions"]
    assert expected == pytest.approx(
        stops.mean(), abs=4 * (stops.std() + 0.1) / math.sqrt(len(stops)) + 0.01 * expected
    )


@given(st.floats(0.01, 100), st.floats(0, 10), st.floats(0, 1e-3))
def test_preemption_only_costs(block, lag, failures):
    whole = expected_seconds(1000, block, lag, 60, 0)
    assert expected_seconds(1000, block, lag, 60, failures) >= whole * (1 - 1e-12)
    assert lost_per_stop(block, lag, failures) <= (block / 2 + lag) * (1 + 1e-3)


def test_rare_stops_lose_half_a_block_and_what_is_not_written():
    assert lost_per_stop(10, 2, 1e-6) == pytest.approx(lost_per_stop(10, 2, 0), rel=1e-3) == pytest.approx(7)


def test_stops_faster_than_blocks_never_end():
    job = replace(JOB, rate=1, preemptions=1.0)
    assert times(job)["wall_hours_preempted"] == math.inf
    assert any("preemptions cost" in text for text in remarks(job))


def test_the_layout_is_that_of_the_plan():
    assert make_layout("digits", 10**6, 1, "uint8", None, "cpu").chunk_chains == 16_384
    assert make_layout("digits", 10**6, 1, "uint8", 5000, "cpu").chunk_chains == 5120, "whole tiles"
    assert make_layout("points2d", 10**9, 1, "float32", None, "gpu").chunk_chains == 32_768


def run(*args: object) -> str:
    """Output of the command in this process."""
    result = CliRunner().invoke(costs_command, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_json_has_every_figure():
    facts = json.loads(run("--rate", 1e6, "--workers", 8, "--chains", 1e6, "--json"))
    assert facts["blocks"] == 62 and facts["device_hours"] == pytest.approx(1e6 * 20 / 1e6 / 3600)
    endless = run("--rate", 1e-3, "--workers", 8, "--preemptions", 1e4, "--json")
    assert json.loads(endless)["wall_hours_preempted"] is None


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--workers", "7", "--group", "2"), "the groups must be equal"),
        (("--rate", "0"), "must be a finite number above 0"),
        (("--rate", "fast"), "neither a number nor one of model"),
        (("--network", "digit"), "did you mean 'digits'"),
        (("--chains", "0"), "not in the range"),
        (("--chains", "inf"), "must be a finite number"),
        (("--rate", "nan"), "must be a finite number above 0"),
        (("--rate", "1", "--chunk-chains", "99999999999", "--chains", "1e12"), "chains fit"),
    ],
)
def test_bad_input_is_one_line(args, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["costs.py", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert text in said.err


def page_examples() -> list[tuple[str, str]]:
    """Commands and what they print, from the page."""
    text = (ROOT / "docs/scaling.md").read_text()
    return re.findall(r"\$ python benchmarks/costs\.py (.*)\n((?:(?!```|\$ ).*\n)+)", text)


@pytest.mark.parametrize("number", range(4))
def test_the_page_shows_what_the_command_prints(number):
    examples = page_examples()
    assert len(examples) == 4
    args, shown = examples[number]
    assert run(*shlex.split(args)) == shown


def test_the_page_names_only_options_that_exist():
    text = (ROOT / "docs/scaling.md").read_text().replace("\\\n", " ")
    lines = re.findall(
        r"(?:kaleido-fast|-m kaleido_fast) (\w+) (.*)", "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S))
    )
    assert [name for name, _ in lines] == ["sample", "sample", "sample", "join"]
    for name, rest in lines:
        known = {option for param in LazyGroup().get_command(None, name).params for option in param.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known
    sample = LazyGroup().get_command(None, "sample")
    prose = re.findall(r"`(--[a-z-]+)[ `]", text)
    known = {option for command in (sample, costs_command) for param in command.params for option in param.opts}
    assert set(prose) <= {*known, "--draws"}
    assert len(prose) > 5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kernels are compiled where Triton is")
def test_the_rate_of_the_model_is_that_of_the_page(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert modelled_rate("points2d", "fp32") == pytest.approx(5.1e9, rel=0.02)


@pytest.mark.slow
def test_real_runs_have_the_predicted_files_bytes_operations_and_losses():
    done = subprocess.run([sys.executable, "benchmarks/costs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("predicted") > 20
