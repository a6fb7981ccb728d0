"""Plots of curves, through matplotlib (the ``plots`` extra)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from kaleido_fast.errors import InputError
from kaleido_fast.files import atomic_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kaleido_fast.training import HistoryEntry


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def loss_curve(history: Sequence[HistoryEntry], path: Path) -> None:
    """Write the loss over the training steps as a PNG: training batches, and the measure that chose the best weights.

    Raises:
        InputError: matplotlib is missing, the history is empty, or the path cannot be written.
    """
    if not can_plot():
        raise InputError("a loss curve needs matplotlib: pip install 'kaleido-fast[plots]'")
    if not history:
        raise InputError("no loss curve to draw: the history is empty")
    from matplotlib.figure import Figure

    kept = [entry for entry in history if entry.attempt == history[-1].attempt]
    steps = [entry.step for entry in kept]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [entry.loss for entry in kept], color="0.65", label="training batches")
    axes.plot(steps, [entry.held_out for entry in kept], color="tab:blue", label="held-out measure")
    best = min(kept, key=lambda entry: entry.held_out)
    axes.plot(best.step, best.held_out, "o", color="tab:red", label=f"weights kept (step {best.step:,})")
    axes.set(xlabel="training step", ylabel="mean squared error", yscale="log")
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
