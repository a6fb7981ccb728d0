"""The report of a GPU as tables: for people, for a README."""

from __future__ import annotations

import pytest

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


def test_ratios_are_per_chain_and_step_and_of_peers_with_as_many_bits():
    ours = {"kind": "kernel", "precision": "bf16", "n_chains": 100, "n_steps": 300, "seconds": [1.0] * 3}
    ours["milliseconds"] = 1000.0
    fp16 = {**ours, "kind": "peer", "precision": "fp16", "n_steps": 30, "seconds": [0.5] * 3, "milliseconds": 5000.0}
    fp32 = {**ours, "kind": "peer", "precision": "fp32", "milliseconds": 2000.0}
    timed = {"ours": ours, "eager-fp16": fp16, "eager": fp32, "published": {**fp16, "milliseconds": 1.0}}
    assert table.best_torch(timed, "bf16") == "eager-fp16" and table.best_torch(timed, "fp32") == "eager"
    assert table.ratio(ours, fp16).value == pytest.approx(5.0)
