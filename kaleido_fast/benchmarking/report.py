"""Results as a table on the terminal, as Markdown, and as JSON with every raw timing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from kaleido_fast.benchmarking.peers import PEERS
from kaleido_fast.benchmarking.runner import BenchReport, NetworkResult
from kaleido_fast.benchmarking.timing import Ratio, spread
from kaleido_fast.errors import InputError
from kaleido_fast.system.files import atomic_path, check_writable
from kaleido_fast.system.valid_json import json_text

FORMAT_VERSION = 1
BEGIN = "<!-- kaleido-fast bench: begin -->"
END = "<!-- kaleido-fast bench: end -->"


def as_record(report: BenchReport) -> dict[str, Any]:
    """Everything that was measured as plain values: raw seconds first, figures derived from them beside."""
    return {
        "format": "kaleido-fast bench",
        "version": FORMAT_VERSION,
        "quick": report.quick,
        **report.about,
        "results": [_result_record(result) for result in report.results],
        "lost": report.lost,
        "unmeasured": report.unmeasured,
    }


def _result_record(result: NetworkResult) -> dict[str, Any]:
    return {
        "network": result.network.name,
        "model": result.network.path,
        "n_chains": result.size.n_chains,
        "n_steps": result.size.n_steps,
        "precision": result.precision,
        "flops_per_step": result.flops_per_step,
        "ceiling": {
            "seconds": result.ceiling_seconds,
            "flops": result.ceiling_flops,
            "flops_per_second": result.ceiling(),
        },
        "contestants": {
            name: {
                **asdict(timing),
                **asdict(spread(timing.seconds)),
                "chain_steps_per_second": asdict(result.speed(name)),
                "flops_per_second": result.flops(name),
                "ceiling_share": result.flops(name) / result.ceiling(),
            }
            for name, timing in result.timings.items()
        },
        "ratios": {
            engine: {
                peer: {**asdict(result.ratio(engine, peer)), "tie": result.ratio(engine, peer).tie}
                for peer in result.peers
            }
            for engine in result.engines
        },
        "first_calls": {
            engine: {kind: asdict(call) for kind, call in calls.items()} for engine, calls in result.first_calls.items()
        },
        "skipped": result.skipped,
    }


def write_json(report: BenchReport, path: Path) -> None:
    """Write `as_record` to a file."""
    with atomic_path(path) as temporary:
        temporary.write_text(json_text(as_record(report), indent=1, sort_keys=False) + "\n")


def tables(report: BenchReport) -> list[Table]:
    """Speeds with ratios to the peers, and first calls; `remarks` say who was left out."""
    first_calls = any(result.first_calls for result in report.results)
    return [_speed_table(report), *([_first_call_table(report)] if first_calls else [])]


def _speed_table(report: BenchReport) -> Table:
    engines = list(dict.fromkeys(name for result in report.results for name in result.engines))
    table = Table(
        title="chain-steps/s, and how many times faster than each row an engine is",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("network", "engine", "median", "p20", "p80", "GFLOP/s", "ceiling", *(f"{x}\nis x" for x in engines)):
        table.add_column(name, justify="left" if name in ("network", "engine") else "right")
    for result in report.results:
        size = f"{result.size.n_chains:,} x {result.size.n_steps}"
        names = [*result.engines, *result.peers]
        labels = [result.network.name, size] if len(names) > 1 else [f"{result.network.name}\n{size}"]
        labels += [""] * (len(names) - len(labels))
        for label, name in zip(labels, names, strict=True):
            speed = result.speed(name)
            table.add_row(
                label,
                Text(name, style="bold" if name in result.engines else ""),
                *(short(value) for value in (speed.median, speed.p20, speed.p80)),
                f"{result.flops(name) / 1e9:,.1f}",
                f"{result.flops(name) / result.ceiling():.0%}",
                *(_ratio_cell(result, engine, name) for engine in engines),
            )
    return table


def short(value: float) -> str:
    """A number with three digits and a unit: 4.67M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _first_call_table(report: BenchReport) -> Table:
    table = Table(title="first call, in a process of its own", title_justify="left", box=None, pad_edge=False)
    for name in ("network", "engine", "start", "import s", "compile s", "pack s", "peak MiB"):
        table.add_column(name, justify="left" if name in ("network", "engine", "start") else "right")
    for result in report.results:
        for engine, calls in result.first_calls.items():
            for kind, call in calls.items():
                seconds = (call.import_seconds, call.compile_seconds, call.pack_seconds)
                table.add_row(result.network.name, engine, kind, *(f"{x:.3f}" for x in seconds), _mib(call.peak_bytes))
    return table


def peer_names(report: BenchReport) -> list[str]:
    """Peers timed on any network, in the registry's order."""
    timed = {name for result in report.results for name in result.peers}
    return [name for name in PEERS if name in timed]


def _ratio_cell(result: NetworkResult, engine: str, other: str) -> str:
    """How many times faster an engine is; empty where either was not timed, or they are the same."""
    if engine == other or not {engine, other} <= result.timings.keys():
        return "-"
    return ratio_text(result.ratio(engine, other))


def ratio_text(ratio: Ratio) -> str:
    """A ratio; one inside the spread of the timings says so."""
    return f"{ratio.value:.2f}{' tie' if ratio.tie else ''}"


def _peak(result: NetworkResult, name: str) -> str:
    calls = result.first_calls.get(name)
    return _mib(calls["cached"].peak_bytes) if calls else "-"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f}"


def remarks(report: BenchReport) -> list[str]:
    """Who was left out and why, the ceiling, and how the figures were made: a line each."""
    left_out: dict[str, dict[str, None]] = {}  # names by reason, each once
    for result in report.results:
        for name, reason in result.skipped.items():
            left_out.setdefault(reason, {})[name] = None
    lines = [f"not timed: {', '.join(names)}: {reason}" for reason, names in left_out.items()]
    ceilings = [result.ceiling() / 1e9 for result in report.results]
    lines.append(f"ceiling: a 2048 x 2048 x 2048 product ran at {min(ceilings):,.0f} to {max(ceilings):,.0f} GFLOP/s")
    lines.append(_made_with(report))
    load = report.about["machine"]["load_average"]
    if load and load[0] > 0.5 * report.about["machine"]["cores"]:
        lines.append(f"the machine was busy when this began (load {load[0]:.1f}): do not quote these figures")
    return lines


def _made_with(report: BenchReport) -> str:
    about, machine = report.about, report.about["machine"]
    commit = ((about["commit"] or "")[:10] or "installed package") + (" with local changes" if about["dirty"] else "")
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores"
    libraries = ("torch", "jax", "onnxruntime", "openvino")
    versions = ", ".join(
        f"{name} {about['versions'][name]}"
        for name in libraries
        if about["versions"].get(name, "not installed") != "not installed"
    )
    return f"{device}; {about['date'][:10]}; {commit}; {versions}"


def markdown_table(report: BenchReport) -> str:
    """The table for a README: one line a network and engine, then how it was made."""
    peers = peer_names(report)
    head = ["network", "chains x steps", "engine", "chain-steps/s", "GFLOP/s", "of ceiling", "peak MiB"]
    heads = [*head, *(f"x {name}" for name in peers)]
    lines = [_row(heads), _row(["---", "---:", "---", *["---:"] * (len(heads) - 3)])]
    for result in report.results:
        for engine in result.engines:
            flops = result.flops(engine)
            cells = [
                f"`{result.network.name}`",
                f"{result.size.n_chains:,} x {result.size.n_steps}",
                engine,
                short(result.speed(engine).median),
                f"{flops / 1e9:,.1f}",
                f"{flops / result.ceiling():.0%}",
                _peak(result, engine),
            ]
            lines.append(_row([*cells, *(_ratio_cell(result, engine, peer) for peer in peers)]))
    notes = [
        f"`x NAME`: how many times faster than that peer ({', '.join(f'{n}: {PEERS[n].about}' for n in peers)})."
        if peers
        else "",
        f"Measured on {_made_with(report)}.",
        f"Made by `{report.about['command']}`.",
    ]
    return "\n".join([*lines, "", *filter(None, notes)])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def check_readme(path: Path, begin: str = BEGIN, end: str = END) -> None:
    """Refuse a README without exactly one pair of marker comments, before anything is timed."""
    if not path.is_file():
        raise InputError(f"README {path} is not a file: give the file that holds {begin!r} and {end!r}")
    check_writable(path)
    text = path.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise InputError(f"{path} has no place for the table: put the lines {begin!r} and {end!r} there")


def write_readme(report: BenchReport, path: Path) -> None:
    """Replace what stands between the marker comments by `markdown_table`."""
    write_between(path, BEGIN, END, markdown_table(report))


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marker comments of a file."""
    check_readme(path, begin, end)
    before, rest = path.read_text().split(begin)
    _, after = rest.split(end)
    with atomic_path(path) as temporary:
        temporary.write_text(f"{before}{begin}\n{text}\n{end}{after}")
