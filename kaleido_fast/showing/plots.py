"""Plots of curves, through matplotlib (the ``plots`` extra)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from kaleido_fast.errors import InputError
from kaleido_fast.system.files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kaleido_fast.progress import HistoryEntry

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")
ELSEWHERE = "0.6"  # grey of chains that end at no example


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def check_can_plot(what: str) -> None:
    """Refuse what needs matplotlib where it is missing: `InputError`."""
    if not can_plot():
        raise InputError(f"{what} needs matplotlib: pip install 'kaleido-fast[plots]'")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a figure as PNG; it appears when whole."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def colours_of(basin: np.ndarray) -> list[str]:
    """A colour for each basin number (n,); grey for -1, which is none."""
    return [ELSEWHERE if k < 0 else COLOURS[k % len(COLOURS)] for k in basin.tolist()]


def samples_plot(samples: np.ndarray, title: str) -> Figure:
    """Samples (n, 1) as a histogram or (n, 2) as points.

    Raises:
        InputError: matplotlib is missing, or samples have more than two values.
    """
    check_can_plot("a plot of samples")
    dim = samples.shape[1]
    if dim > 2:
        raise InputError(f"samples have {dim} values: plots show 1 or 2; pass --shape HEIGHT,WIDTH to draw pictures")
    figure = new_figure(5, 4 if dim == 1 else 5)
    axes = figure.subplots()
    if dim == 1:
        axes.hist(samples[:, 0], bins=100)
        axes.set(xlabel="value", ylabel="chains", title=title)
    else:
        axes.plot(samples[:, 0], samples[:, 1], ".", markersize=3, alpha=0.5)
        axes.set(xlabel="first value", ylabel="second value", title=title, aspect="equal")
    return figure


def learned_function(x: np.ndarray, y: np.ndarray, points: np.ndarray) -> Figure:
    """A function (n,) of one value against the diagonal, with the training points (k,)."""
    figure = new_figure(5, 5)
    axes = figure.subplots()
    axes.plot(x, x, color="0.7", label="diagonal: fixed points")
    axes.plot(x, y, color="tab:blue", label="learned function")
    axes.plot(points, points, "o", color="tab:red", label="training points")
    axes.set(xlabel="x", ylabel="f(x)", aspect="equal")
    axes.legend(frameon=False)
    return figure


def loss_profile(x: np.ndarray, loss: np.ndarray, points: np.ndarray) -> Figure:
    """The loss (f(x) - x)^2 over x, with the training points marked."""
    figure = new_figure(7, 3.2)
    axes = figure.subplots()
    axes.semilogy(x, loss.clip(1e-12), color="tab:blue", label="loss")
    _mark_points(axes, points)
    axes.set(xlabel="x", ylabel="(f(x) - x)²")
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    return figure


def positions_1d(states: np.ndarray, steps: Sequence[int], points: np.ndarray, bounds: tuple[float, float]) -> Figure:
    """Histograms of chains (n, steps) at each step, one above the other."""
    figure = new_figure(7, 1.1 * len(steps) + 0.6)
    for i, (axes, step) in enumerate(zip(figure.subplots(len(steps), 1, sharex=True), steps, strict=True)):
        axes.hist(states[:, i], bins=101, range=bounds, color="tab:blue", label="chains")
        _mark_points(axes, points)
        axes.set_yticks([])
        axes.set_ylabel("start" if step == 0 else f"step {step}", rotation=0, ha="right", va="center")
    axes.set_xlabel("value of the chain")
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside upper right", ncols=2)
    return figure


def _mark_points(axes: Axes, points: np.ndarray) -> None:
    """Training points (k,) as dotted lines, named once."""
    for i, point in enumerate(points):
        name = "training points" if i == 0 else None
        axes.axvline(point, color="tab:red", linestyle=":", linewidth=1, label=name)


def cobweb(x: np.ndarray, y: np.ndarray, paths: np.ndarray, points: np.ndarray) -> Figure:
    """Cobweb plot: paths (k, steps) bounce between the function and the diagonal."""
    figure = new_figure(5, 5)
    axes = figure.subplots()
    axes.plot(x, x, color="0.7", label="diagonal: fixed points")
    axes.plot(x, y, color="0.2", label="learned function")
    for path, colour in zip(paths, COLOURS * len(paths), strict=False):
        corners_x = path.repeat(2)[:-1]
        corners_y = path.repeat(2)[1:]
        axes.plot(corners_x, corners_y, color=colour, linewidth=1)
        axes.plot(path[0], path[0], "o", color=colour, markersize=4)
    axes.plot(points, points, "s", color="black", label="training points")
    axes.plot([], [], "o-", color="0.5", linewidth=1, markersize=4, label="a chain, from its start")
    axes.set(xlabel="x", ylabel="f(x)", aspect="equal")
    axes.legend(frameon=False)
    return figure


def surface(grid: np.ndarray, bounds: tuple[float, float], points: np.ndarray, label: str) -> Figure:
    """Values above 0 on a square grid (rows: second value) in logarithmic colours, with training points (k, 2)."""
    from matplotlib.colors import LogNorm

    figure = new_figure(5.6, 4.6)
    axes = figure.subplots()
    image = axes.imshow(grid.clip(1e-8), origin="lower", extent=(*bounds, *bounds), norm=LogNorm(), cmap="viridis")
    axes.plot(points[:, 0], points[:, 1], "o", color="tab:red", markeredgecolor="white")
    axes.set(xlabel="first value", ylabel="second value")
    figure.colorbar(image, label=label)
    return figure


def positions_2d(
    states: np.ndarray, steps: Sequence[int], basin: np.ndarray, points: np.ndarray, bounds: tuple[float, float]
) -> Figure:
    """Chains (n, steps, 2) at each step, coloured by the basin (n,) that they end in."""
    columns = min(4, len(steps))
    rows = -(-len(steps) // columns)
    figure = new_figure(2.6 * columns, 2.7 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[len(steps) :]:
        axes.axis("off")
    colours = colours_of(basin)
    for i, step in enumerate(steps):
        panels[i].plot(points[:, 0], points[:, 1], "+", color="0.6", markersize=14, zorder=1)
        panels[i].scatter(states[:, i, 0], states[:, i, 1], s=5, c=colours, zorder=2)
        panels[i].set(title="start" if step == 0 else f"step {step}", aspect="equal", xlim=bounds, ylim=bounds)
    figure.supxlabel("first value")
    figure.supylabel("second value")
    return figure


def basin_map(grid: np.ndarray, bounds: tuple[float, float], points: np.ndarray) -> Figure:
    """Basin numbers on a square grid (rows: second value) as colours; -1 is grey."""
    from matplotlib.colors import ListedColormap

    figure = new_figure(5, 5)
    axes = figure.subplots()
    palette = ListedColormap([ELSEWHERE, *COLOURS[: len(points)]])
    area, last = (*bounds, *bounds), len(points) - 0.5
    axes.imshow(grid, origin="lower", extent=area, cmap=palette, interpolation="nearest", vmin=-1.5, vmax=last)
    axes.plot(points[:, 0], points[:, 1], "o", color="white", markeredgecolor="black")
    axes.set(xlabel="first value of the start", ylabel="second value of the start")
    return figure


def loss_curve(history: Sequence[HistoryEntry], path: Path) -> None:
    """Write the loss over the training steps as a PNG: training batches, and the measure that chose the best weights.

    Raises:
        InputError: matplotlib is missing, the history is empty, or the path cannot be written.
    """
    check_can_plot("a loss curve")
    if not history:
        raise InputError("no loss curve to draw: the history is empty")
    kept = [entry for entry in history if entry.attempt == history[-1].attempt]
    steps = [entry.step for entry in kept]
    figure = new_figure(7, 4)
    axes = figure.subplots()
    axes.plot(steps, [entry.loss for entry in kept], color="0.65", label="training batches")
    axes.plot(steps, [entry.held_out for entry in kept], color="tab:blue", label="held-out measure")
    best = min(kept, key=lambda entry: entry.held_out)
    axes.plot(best.step, best.held_out, "o", color="tab:red", label=f"weights kept (step {best.step:,})")
    axes.set(xlabel="training step", ylabel="loss, and held-out error", yscale="log")
    axes.legend(frameon=False)
    save_figure(figure, path)
