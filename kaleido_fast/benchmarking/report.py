"""Results as a table on the terminal, and as JSON with every raw timing; `readme` makes Markdown of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from kaleido_fast.benchmarking.busy import is_busy
from kaleido_fast.benchmarking.peers import PEERS
from kaleido_fast.benchmarking.results import BenchReport, NetworkResult
from kaleido_fast.benchmarking.timing import Ratio, spread
from kaleido_fast.system.files import atomic_path
from kaleido_fast.system.valid_json import json_text

FORMAT_VERSION = 2  # 1: one precision, contestants in one process


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
        "failures": report.failures,
    }


def _result_record(result: NetworkResult) -> dict[str, Any]:
    return {
        "network": result.network.name,
        "model": result.network.path,
        "n_chains": result.n_chains,
        "n_steps": result.n_steps,
        "precision": result.precision,
        "flops_per_step": result.flops_per_step,
        "others_share": result.others_share,
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
        size = f"{result.n_chains:,} x {result.n_steps}"
        names = [*result.engines, *result.peers]
        title = result.network.name if result.precision == "fp32" else f"{result.network.name} {result.precision}"
        labels = [title, size] if len(names) > 1 else [f"{title}\n{size}"]
        labels += [""] * (len(names) - len(labels))
        for label, name in zip(labels, names, strict=True):
            speed = result.speed(name)
            table.add_row(
                label,
                Text(name, style="bold" if name in result.engines else ""),
                *(short(value) for value in (speed.median, speed.p20, speed.p80)),
                f"{result.flops(name) / 1e9:,.1f}",
                f"{result.flops(name) / result.ceiling():.0%}",
                *(ratio_cell(result, engine, name) for engine in engines),
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
                name = engine if result.precision == "fp32" else f"{engine} {result.precision}"
                seconds = (call.import_seconds, call.compile_seconds, call.pack_seconds)
                table.add_row(result.network.name, name, kind, *(f"{x:.3f}" for x in seconds), _mib(call.peak_bytes))
    return table


def peer_names(report: BenchReport) -> list[str]:
    """Peers timed on any network, in the registry's order."""
    timed = {name for result in report.results for name in result.peers}
    return [name for name in PEERS if name in timed]


def ratio_cell(result: NetworkResult, engine: str, other: str) -> str:
    """How many times faster an engine is; empty where either was not timed, or they are the same."""
    if engine == other or not {engine, other} <= result.timings.keys():
        return "-"
    return ratio_text(result.ratio(engine, other))


def ratio_text(ratio: Ratio) -> str:
    """A ratio; one inside the spread of the timings says so."""
    return f"{ratio.value:.2f}{' tie' if ratio.tie else ''}"


def peak_text(result: NetworkResult, name: str) -> str:
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
    for precision in dict.fromkeys(result.precision for result in report.results):
        found = [result.ceiling() / 1e9 for result in report.results if result.precision == precision]
        speeds = f"{min(found):,.0f} to {max(found):,.0f} GFLOP/s"
        lines.append(f"ceiling: a 2048 x 2048 x 2048 product in {precision} ran at {speeds}")
    lines.append(made_with(report))
    if busy := busy_text(report):
        lines.append(f"{busy}: do not quote these figures")
    return lines


def busy_text(report: BenchReport) -> str:
    """When others used the machine, and how much of it; empty where they left it to us."""
    shares = {"before the first timing": report.about["machine"].get("others_share")}
    shares |= {f"during {one.network.name} in {one.precision}": one.others_share for one in report.results}
    told = [
        f"{share:.0%} of the cores' time {when}"
        for when, share in shares.items()
        if share is not None and is_busy(share)
    ]
    return f"the machine was busy: other processes used {', '.join(told)}" if told else ""


def made_with(report: BenchReport) -> str:
    """The machine, the date, the commit and the versions of libraries."""
    about, machine = report.about, report.about["machine"]
    commit = ((about["commit"] or "")[:10] or "installed package") + (" with local changes" if about["dirty"] else "")
    device = machine.get("gpu") or cpu_text(machine)
    libraries = ("torch", "jax", "onnxruntime", "openvino")
    versions = ", ".join(
        f"{name} {about['versions'][name]}"
        for name in libraries
        if about["versions"].get(name, "not installed") != "not installed"
    )
    return f"{device}; {about['date'][:10]}; {commit}; {versions}"


def cpu_text(machine: dict[str, Any]) -> str:
    """The processor, its instruction set, and how much of it was used."""
    return f"{machine['cpu']}, {machine['instruction_set']}, {machine['threads']} threads on {machine['cores']} cores"
