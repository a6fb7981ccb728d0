"""Tables, pages and pictures of a benchmark."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from rich.console import Console

from kaleido_fast.benchmarking import bars, report, timing


def test_the_table_fits_80_columns(small_report):
    output = io.StringIO()
    Console(width=80, file=output).print(*report.tables(small_report))
    assert "…" not in output.getvalue()


def test_the_table_names_engines_peers_ratios_and_who_is_missing(small_report):
    output = io.StringIO()
    Console(width=100, file=output).print(*report.tables(small_report))
    text = "\n".join([output.getvalue(), *report.remarks(small_report)])
    for words in (
        "points2d",
        "reference",
        "chunked",
        "GFLOP/s",
        "not timed: jax: jax not installed",
        "30 x 2",
        "is x",
    ):
        assert words in text, words


def test_ties_are_named_in_the_table():
    assert report.ratio_text(timing.Ratio(1.04, 0.9, 1.2)) == "1.04 tie"
    assert report.ratio_text(timing.Ratio(2.5, 2.4, 2.6)) == "2.50"


@pytest.mark.parametrize(("value", "text"), [(4_670_000, "4.67M"), (326_123, "326k"), (12.34, "12.3"), (5e9, "5G")])
def test_short_numbers(value, text):
    assert report.short(value) == text


def test_bars_are_drawn(small_report, tmp_path):
    pytest.importorskip("matplotlib")
    bars.save_bars(small_report, tmp_path / "bars.png")
    assert Image.open(tmp_path / "bars.png").width > 400
