"""The report of a GPU as tables: for people, for a README."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from kaleido_fast.benchmarking.gpu import table


def test_the_table_of_checks_shows_the_errors_of_what_failed_too(gpu_report):
    text = gpu_report.path.with_suffix(".md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| stream | fp16")]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3] == "0 of 1" and float(cells[4]) > 2
    assert cells[7].startswith("points2d: differs from the reference by 3") and "dim 1" in cells[7]
    (row,) = [line for line in text.splitlines() if line.startswith("| wide | fp16")]
    assert row.split("|")[3].strip() == "1 of 1" and row.split("|")[7].strip() == ""


def test_the_table_for_people_names_everything_and_says_what_it_is(gpu_report):
    text = gpu_report.path.with_suffix(".md").read_text()
    for words in ("no speed means anything", "x best torch", "`points2d`", "published", "## Tiles", "cudagraph-fp16"):
        assert words in text, words
    assert "Traceback" not in text


def test_a_report_does_not_say_where_a_machine_keeps_its_files(gpu_report):
    about = {**gpu_report.record["about"], "command": "gpu_report.py --quick --out /home/me/timing --only mnist,cifar"}
    text = table.markdown({**gpu_report.record, "about": about})
    assert "Made by `gpu_report.py --quick --out timing --only mnist,cifar`." in text


def test_ratios_are_per_chain_and_step_and_of_peers_with_as_many_bits():
    ours = {"kind": "kernel", "precision": "bf16", "n_chains": 100, "n_steps": 300, "seconds": [1.0] * 3}
    ours["milliseconds"] = 1000.0
    fp16 = {**ours, "kind": "peer", "precision": "fp16", "n_steps": 30, "seconds": [0.5] * 3, "milliseconds": 5000.0}
    fp32 = {**ours, "kind": "peer", "precision": "fp32", "milliseconds": 2000.0}
    timed = {"ours": ours, "eager-fp16": fp16, "eager": fp32, "published": {**fp16, "milliseconds": 1.0}}
    assert table.best_torch(timed, "bf16") == "eager-fp16" and table.best_torch(timed, "fp32") == "eager"
    assert table.ratio(ours, fp16).value == pytest.approx(5.0)


@given(st.floats(1e-6, 1e-3), st.floats(1e-4, 0.1), st.integers(1, 299))
def test_what_a_call_costs_is_told_beside_its_kernel_and_never_multiplied_by_steps(step, call, n_steps):
    """A kernel of ``step`` seconds, called at a fixed cost: the whole run is that cost and 300 steps."""
    common = {"n_chains": 100, "precision": "fp16", "about": "", "launch_microseconds": 50.0, "flops_per_second": 1.0}
    kernel = {**common, "kind": "kernel", "n_steps": 200, "median": 200 * step, "seconds": [200 * step]}
    kernel |= {"milliseconds": 3e5 * step, "p20": step, "p80": step}
    few = call + n_steps * step
    public = {**common, "kind": "public", "n_steps": n_steps, "median": few, "seconds": [few] * 3}
    found = {"n_chains": 100, "flops_per_step": 7, "contestants": {"triton-fp16": kernel, "fast_sample-fp16": public}}
    assert table.call_seconds(found, public) == pytest.approx(call, rel=1e-6, abs=1e-9)
    assert table.as_whole(found, public) is None, "no whole run was timed: nothing is known of one"
    row = table.speed_table({"ceilings": {}, "networks": {"digits": found}}).splitlines()[-1]
    assert f"a call beside the kernel: {1e6 * table.call_seconds(found, public):,.0f} |" in row and "~" not in row
    whole = call + 300 * step
    timed = table.as_whole(found, {**public, "whole_run_seconds": [whole] * 3})
    assert timed is not None and timed["milliseconds"] == pytest.approx(1e3 * whole)
    assert timed["flops_per_second"] == pytest.approx(7 * 100 * 300 / whole)
    assert table.ratio(timed, kernel).value == pytest.approx(300 * step / whole)
