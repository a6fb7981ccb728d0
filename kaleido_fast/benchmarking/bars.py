"""A picture of the results: one panel of bars a network (matplotlib, the ``plots`` extra)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kaleido_fast.benchmarking.results import BenchReport, NetworkResult
from kaleido_fast.errors import InputError
from kaleido_fast.showing.plots import can_plot
from kaleido_fast.system.files import atomic_path, check_writable


def check_picture(path: Path) -> None:
    """Refuse a picture that cannot be made, before anything is timed."""
    if not can_plot():
        raise InputError("a picture of the results needs matplotlib: pip install 'kaleido-fast[plots]'")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"picture {path} has an unknown ending: use .png, .svg or .pdf")
    check_writable(path)


def save_bars(report: BenchReport, path: Path) -> None:
    """Speeds as bars with the 20 % and 80 % quantiles as whiskers, and the ceiling as a line."""
    check_picture(path)
    from matplotlib.figure import Figure

    columns = min(3, len(report.results))
    rows = -(-len(report.results) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, result in zip(panels, report.results, strict=False):
        _draw(axes, result)
    for axes in panels[len(report.results) :]:
        axes.set_visible(False)
    machine = report.about["machine"]
    figure.suptitle(f"{machine.get('gpu') or machine['cpu']}, {report.about['date'][:10]}", fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=120)


def _draw(axes: Any, result: NetworkResult) -> None:
    names = [*result.engines, *result.peers][::-1]
    per_step = result.flops_per_step / 1e9
    speeds = [result.speed(name) for name in names]
    axes.barh(
        names,
        [speed.median * per_step for speed in speeds],
        xerr=[
            [(speed.median - speed.p20) * per_step for speed in speeds],
            [(speed.p80 - speed.median) * per_step for speed in speeds],
        ],
        color=["tab:blue" if name in result.engines else "0.7" for name in names],
        error_kw={"lw": 1},
    )
    axes.axvline(result.ceiling() / 1e9, color="tab:red", lw=1, ls="--")
    title = f"{result.network.name}, {result.precision}: {result.n_chains:,} chains x {result.n_steps} steps"
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("GFLOP/s (dashed: large matrix product)", fontsize=8)
    axes.tick_params(labelsize=8)
