"""Tables between the marker comments of a README: one an instruction set, none lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaleido_fast.benchmarking import readme
from kaleido_fast.benchmarking.readme import BEGIN, END, Section
from kaleido_fast.errors import InputError

ROOT = Path(__file__).parents[2]
NAMES = ("AMX", "AVX-512", "AVX2", "NEON", "NVIDIA H100")
dates = st.dates().map(str)


def made(name: str, date: str, n_rows: int) -> Section:
    rows = "\n".join(["| a | b |", "| --- | --- |", *["| `x` | 1 |"] * n_rows])
    notes = f"Measured on a machine, {name}, 2 threads; {date}; abc; torch 2.\nMade by `kaleido-fast bench`."
    return Section(name, f"{rows}\n\n{notes}\nNote: older.")


sections = st.lists(st.builds(made, st.sampled_from(NAMES), dates, st.integers(0, 3)), unique_by=lambda one: one.name)


@given(sections)
def test_what_is_written_is_read_again(found):
    assert readme.parse_sections(readme.sections_text(found)) == found


@given(sections, st.builds(made, st.sampled_from(NAMES), dates, st.integers(4, 5)))
def test_a_table_replaces_that_of_its_own_instruction_set_alone_and_the_newest_is_first(found, new):
    after = readme.with_section(found, new)
    assert new in after
    assert {one for one in after if one != new} == {one for one in found if one.name != new.name}
    assert [one.date for one in after] == sorted((one.date for one in after), reverse=True)
    assert next(one for one in after if one.date == new.date) == new
    assert readme.with_section(after, new) == after


def page(text: str) -> str:
    return f"# Title\n{BEGIN}\n{text}\n{END}\nafter\n"


def test_readme_is_written_between_its_markers_only(small_report, tmp_path):
    path = tmp_path / "README.md"
    other = made("PDP-11", "1970-01-02", 2)
    path.write_text(page(readme.sections_text([other])))
    readme.write_readme(small_report, path)
    once = path.read_text()
    own = small_report.about["machine"]["instruction_set"]
    assert once.startswith(f"# Title\n{BEGIN}\n#### {own}\n\n| network")
    assert once.endswith(f"#### PDP-11\n\n{other.text}\n{END}\nafter\n")
    readme.write_readme(small_report, path)
    assert path.read_text() == once


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("# Title", "no place for the table"),
        (f"{BEGIN} only", "no place for the table"),
        (f"{END}\n{BEGIN}", "no place for the table"),
        (page("| an older table |"), "would be lost"),
        (page("by hand"), "'by hand' is none of this command's lines"),
        (page(readme.sections_text([made("AVX2", "2026-01-01", 1)]) + "\n## Another heading"), "would be lost"),
        (page("#### AVX2\n\n| a |\n"), "has no line 'Measured on"),
        (page(readme.sections_text([made("AVX2", "2026-01-01", 1)] * 2)), "same heading"),
    ],
)
def test_a_readme_that_is_not_understood_is_refused_and_left_alone(small_report, tmp_path, text, why):
    path = tmp_path / "README.md"
    path.write_text(text)
    for refuses in (readme.check_readme, lambda path: readme.write_readme(small_report, path)):
        with pytest.raises(InputError, match=why):
            refuses(path)
    assert path.read_text() == text


def test_our_own_readme_is_understood():
    assert {one.name for one in readme.check_readme(ROOT / "README.md")} <= set(NAMES)


def test_markdown_has_a_line_a_network_and_says_how_it_was_made(small_report):
    lines = readme.markdown_table(small_report).splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) == 2
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1, "columns differ"
    assert f"Made by `{small_report.about['command']}`." in lines
    (measured,) = [line for line in lines if line.startswith("Measured on ")]
    assert f"; {small_report.about['date'][:10]}; " in measured
    assert f", {small_report.about['machine']['instruction_set']}, " in measured
