"""Results between the marker comments of a README: one table an instruction set, the newest first."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kaleido_fast.benchmarking.peers import PEERS
from kaleido_fast.benchmarking.report import busy_text, made_with, peak_text, ratio_cell, short
from kaleido_fast.benchmarking.results import BenchReport, NetworkResult
from kaleido_fast.benchmarking.timing import spread
from kaleido_fast.errors import InputError
from kaleido_fast.system.files import atomic_path, check_writable

BEGIN = "<!-- kaleido-fast bench: begin -->"
END = "<!-- kaleido-fast bench: end -->"
HEADING = "#### "
_LINES = ("|", "`x NAME`: ", "Measured on ", "Made by ", "Note: ")  # how lines of a section begin
_DATE = re.compile(r"^Measured on .*?; (\d{4}-\d{2}-\d{2});", re.MULTILINE)


@dataclass(frozen=True)
class Section:
    """One table with its notes.

    Args:
        name: the instruction set, or the GPU.
        text: without the heading.
    """

    name: str
    text: str

    @property
    def date(self) -> str:
        """When it was measured: year-month-day."""
        found = _DATE.search(self.text)
        assert found is not None, "a section is made with one"
        return found[1]


def section(report: BenchReport) -> Section:
    """What a README says of a report."""
    machine = report.about["machine"]
    return Section(machine.get("gpu") or machine["instruction_set"], markdown_table(report))


def markdown_table(report: BenchReport) -> str:
    """One line a network, precision and engine, then how it was made."""
    families = [name for name in PEERS if any(_rivals(result, name) for result in report.results)]
    head = ["network", "precision", "chains x steps", "engine", "chain-steps/s", "GFLOP/s", "of ceiling", "peak MiB"]
    heads = [*head, *(f"x {name}" for name in families)]
    lines = [_row(heads), _row(["---", "---", "---:", "---", *["---:"] * (len(heads) - 4)])]
    for result in report.results:
        for engine in result.engines:
            flops = result.flops(engine)
            cells = [
                f"`{result.network.name}`",
                result.precision,
                f"{result.n_chains:,} x {result.n_steps}",
                engine,
                short(result.speed(engine).median),
                f"{flops / 1e9:,.1f}",
                f"{flops / result.ceiling():.0%}",
                peak_text(result, engine),
            ]
            lines.append(_row([*cells, *(_family_cell(result, engine, name) for name in families)]))
    abouts = ", ".join(f"{name}: {PEERS[name].about}" for name in families)
    busy = busy_text(report)
    notes = [
        f"`x NAME`: how many times faster than that peer with operands of as many bits ({abouts})." if families else "",
        f"Measured on {made_with(report)}.",
        f"Made by `{report.about['command']}`.",
        f"Note: {busy}." if busy else "",
    ]
    return "\n".join([*lines, "", *filter(None, notes)])


def _rivals(result: NetworkResult, family: str) -> list[str]:
    """Peers of one adapter, in any precision, the fastest first."""
    found = [name for name in result.peers if name in PEERS and PEERS[name].module == family]
    return sorted(found, key=lambda name: spread(result.timings[name].seconds).median)


def _family_cell(result: NetworkResult, engine: str, family: str) -> str:
    rivals = _rivals(result, family)
    return ratio_cell(result, engine, rivals[0]) if rivals else "-"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def parse_sections(text: str) -> list[Section]:
    """The sections that stand between the markers.

    Raises:
        InputError: a line that this module does not write; it would be lost.
    """
    first, *parts = re.split(rf"^{HEADING}", text, flags=re.MULTILINE)
    strange = [line for line in first.splitlines() if line.strip()]
    found = []
    for part in parts:
        name, _, body = part.partition("\n")
        strange += [line for line in body.splitlines() if line.strip() and not line.startswith(_LINES)]
        if len(_DATE.findall(body)) != 1:
            raise InputError(f"the table under {HEADING + name!r} has no line 'Measured on ...; YEAR-MONTH-DAY; ...'")
        found.append(Section(name.strip(), body.strip()))
    if strange:
        raise InputError(f"{strange[0][:80]!r} is none of this command's lines, and would be lost: move it elsewhere")
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise InputError(f"two tables have the same heading ({', '.join(names)}): remove one")
    return found


def with_section(sections: list[Section], new: Section) -> list[Section]:
    """The sections with ``new`` in place of that of its name, the newest first."""
    kept = [one for one in sections if one.name != new.name]
    return sorted([new, *kept], key=lambda one: one.date, reverse=True)  # of the same day: the new one


def sections_text(sections: list[Section]) -> str:
    """What `parse_sections` reads."""
    return "\n\n".join(f"{HEADING}{one.name}\n\n{one.text}" for one in sections)


def check_place(path: Path, begin: str, end: str) -> None:
    """Refuse a README without exactly one pair of marker comments, before anything is timed."""
    if not path.is_file():
        raise InputError(f"README {path} is not a file: give the file that holds {begin!r} and {end!r}")
    check_writable(path)
    text = path.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise InputError(f"{path} has no place for the table: put the lines {begin!r} and {end!r} there")


def check_readme(path: Path) -> list[Section]:
    """The sections of a README; refuses one whose tables would be lost, before anything is timed."""
    check_place(path, BEGIN, END)
    try:
        return parse_sections(path.read_text().split(BEGIN)[1].split(END)[0])
    except InputError as problem:
        raise InputError(f"{path}, between its marker comments: {problem}") from problem


def write_readme(report: BenchReport, path: Path) -> None:
    """Replace the section of this report's instruction set, or add it; the others stay."""
    write_between(path, BEGIN, END, sections_text(with_section(check_readme(path), section(report))))


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marker comments of a file."""
    check_place(path, begin, end)
    before, rest = path.read_text().split(begin)
    _, after = rest.split(end)
    with atomic_path(path) as temporary:
        temporary.write_text(f"{before}{begin}\n{text}\n{end}{after}")
