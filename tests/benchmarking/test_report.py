"""Tables, pages and pictures of a benchmark."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from rich.console import Console

from kaleido_fast.benchmarking import bars, report, timing
from kaleido_fast.errors import InputError


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


def test_markdown_has_a_line_a_network_and_says_how_it_was_made(small_report):
    lines = report.markdown_table(small_report).splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) == 2
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1, "columns differ"
    assert small_report.about["command"] in lines[-1]
    assert small_report.about["date"][:10] in lines[-2]


def test_ties_are_named_in_the_table():
    assert report.ratio_text(timing.Ratio(1.04, 0.9, 1.2)) == "1.04 tie"
    assert report.ratio_text(timing.Ratio(2.5, 2.4, 2.6)) == "2.50"


@pytest.mark.parametrize(("value", "text"), [(4_670_000, "4.67M"), (326_123, "326k"), (12.34, "12.3"), (5e9, "5G")])
def test_short_numbers(value, text):
    assert report.short(value) == text


def test_readme_is_written_between_its_markers_only(small_report, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{report.BEGIN}\nold table\n{report.END}\nafter\n")
    report.write_readme(small_report, readme)
    once = readme.read_text()
    assert once.startswith(f"# Title\n{report.BEGIN}\n| network")
    assert once.endswith(f"{report.END}\nafter\n")
    assert "old table" not in once
    report.write_readme(small_report, readme)
    assert readme.read_text() == once


@pytest.mark.parametrize("text", ["no markers", f"{report.BEGIN} only", f"{report.END}\n{report.BEGIN}"])
def test_readme_without_a_place_is_refused_and_left_alone(small_report, tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(InputError, match="no place for the table"):
        report.write_readme(small_report, readme)
    assert readme.read_text() == text


def test_bars_are_drawn(small_report, tmp_path):
    pytest.importorskip("matplotlib")
    bars.save_bars(small_report, tmp_path / "bars.png")
    assert Image.open(tmp_path / "bars.png").width > 400
