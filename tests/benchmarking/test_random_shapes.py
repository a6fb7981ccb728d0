"""The search over random shapes: what it draws, what it finds out, and how it ends."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("numba")

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "random_shapes.py"
SMALL = ["--step-gflop", "1e-5", "--seconds", "0", "--shapes", "3"]


@pytest.fixture(scope="module")
def program():
    found = importlib.util.spec_from_file_location("random_shapes", PROGRAM)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["random_shapes"] = module
    found.loader.exec_module(module)
    return module


def test_shapes_are_what_they_are_said_to_be(program):
    shapes = [program.draw_shape(5, number, 1e9) for number in range(400)]
    assert shapes == [program.draw_shape(5, number, 1e9) for number in range(400)]
    assert shapes[:9] != [program.draw_shape(6, number, 1e9) for number in range(9)]
    for shape in shapes:
        dim, *hidden, last = shape.spec.widths
        assert dim == last and dim not in hidden
        assert set(shape.spec.widths) <= set(range(1, 2049))
        assert 2 <= shape.spec.n_layers <= 16
        assert shape.chains == 1 or shape.chains * shape.spec.flops_per_step <= 1e9
        assert 1 <= shape.chains <= 100_000
    assert {shape.spec.n_layers for shape in shapes} == set(range(2, 17))
    assert {shape.spec.activation for shape in shapes} == set(program.ACTIVATIONS)
    assert max(max(shape.spec.widths) for shape in shapes) > 1500
    few = sum(shape.chains < 32 for shape in shapes)
    assert 0.15 < few / len(shapes) < 0.7, "as many of one size as of any other"


def test_small_shapes_are_timed_and_written(program, tmp_path):
    out = tmp_path / "shapes.json"
    result = CliRunner().invoke(program.command, [*SMALL, "--json", str(out)], standalone_mode=False)
    assert result.exception is None and result.return_value == 0, result.output
    found = json.loads(out.read_text())
    assert [timing["number"] for timing in found["timings"]] == [0, 1, 2]
    for timing in found["timings"]:
        ours, eager = timing["seconds"]["ours"], timing["seconds"]["eager"]
        of_three = statistics.median(eager[:3]) / statistics.median(ours[:3])
        assert len(ours) == len(eager) == (9 if of_three < 1.1 else 3), "where it is close, there are more"
    assert "the worst 3 of 3" in result.output
    refused = CliRunner().invoke(program.command, [*SMALL, "--json", str(out)], standalone_mode=False)
    assert refused.exception is not None and "is there already" in str(refused.exception)


def test_a_spent_budget_says_how_to_go_on(program):
    arguments = [*SMALL, "--first", "7", "--budget", "0"]
    result = CliRunner().invoke(program.command, arguments, standalone_mode=False)
    assert result.exception is None
    assert "go on with --first 7" in result.output
    assert "no shape was timed" in result.output


def test_wrong_states_are_told(program, monkeypatch):
    eager = program.Pair.eager

    def halved(pair, steps: int) -> torch.Tensor:
        return eager(pair, steps) / 2

    monkeypatch.setattr(program.Pair, "eager", halved)
    result = CliRunner().invoke(program.command, [*SMALL, "--shapes", "1"], standalone_mode=False)
    assert result.return_value == 1
    assert "WRONG" in result.output and "after step 1" in result.output


def test_chunks_have_the_states_of_all_at_once(program):
    pair = program.Pair(program.draw_shape(0, 9, 1e7), "fp32")
    whole = pair.eager(3)
    pair.rows = 5
    assert len(whole) > 5
    assert torch.allclose(pair.eager(3), whole, atol=1e-5)


@pytest.mark.parametrize("arguments", [["--shapes", "0"], ["--precision", "fp8"], ["--json", "no/such/folder/x.json"]])
def test_bad_input_is_one_line_and_status_2(arguments):
    ended = subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("random_shapes.py: ") and ended.stderr.count("\n") == 1, ended.stderr
