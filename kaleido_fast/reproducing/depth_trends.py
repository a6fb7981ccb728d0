"""What is followed over the depth of networks, its trends, and its figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from kaleido_fast.showing.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


RECOVERY_NOISE = 0.3

Row = dict[str, Any]


@dataclass(frozen=True)
class Treatment:
    """One way of training.

    Args:
        name, title: in report.json, and in words.
        noise: on the inputs, in units of half the data range.
        loss: mean squared error at which training stops.
        colour: of its line.
    """

    name: str
    title: str
    noise: float
    loss: float
    colour: str


@dataclass(frozen=True)
class Measure:
    """One number that is followed over depth.

    Args:
        name, title: in report.json, and in words.
        form: how its values are printed.
        better: +1 if more of it is better, -1 if less is, 0 if that depends.
    """

    name: str
    title: str
    form: str = "{:.2f}"
    better: int = 1


MEASURES = (
    Measure("coverage", "coverage"),
    Measure("precision", "precision"),
    Measure("recall", "recall"),
    Measure("density", "density", better=0),
    Measure("entropy", "class entropy"),
    Measure("confidence", "classifier's confidence", better=0),
    Measure("nearest", "nearest example (median MSE)", "{:.3f}", -1),
    Measure("copying_z", "copying z", "{:+.0f}", 0),
    Measure("authentic", "authentic share", better=0),
    Measure("fixed_point", "chains at fixed points"),
    Measure("cycle", "chains in cycles", better=-1),
    Measure("moving", "chains still moving", better=-1),
    Measure("steps", "steps until arrival (median)", "{:.0f}", -1),
    Measure("residual", "residual (median)", "{:.1g}", -1),
    Measure("stable", "stable training examples"),
    Measure("recovered", f"recovered from noise {RECOVERY_NOISE}"),
    Measure("spectral_radius", "spectral radius (median)", better=-1),
    Measure("training_steps", "training steps", "{:.0f}", -1),
)


def trend(rows: Sequence[Row], treatment: str, measure: str, least: int) -> tuple[float, float]:
    """Spearman's rank correlation of a measure with the number of layers from ``least`` on, and its p-value.

    0 and 1 where it is undefined: fewer than three networks, or no variation.
    """
    from scipy.stats import spearmanr

    chosen = [row for row in rows if row["treatment"] == treatment and row["layers"] >= least]
    layers, values = [row["layers"] for row in chosen], [row[measure] for row in chosen]
    if len(chosen) < 3 or len(set(values)) < 2 or len(set(layers)) < 2:
        return 0.0, 1.0
    found = spearmanr(layers, values)
    return float(found.statistic), float(found.pvalue)


def spread_text(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(fmean(values))} ± {form.format(stdev(values)).lstrip('+')}"


def draw(rows: Sequence[Row], treatments: Sequence[Treatment], depths: Sequence[int], columns: int = 4) -> Figure:
    """A panel for each measure against the number of layers: mean over the seeds, one standard deviation, a line for
    each treatment."""
    n_rows = math.ceil(len(MEASURES) / columns)
    figure = new_figure(3.1 * columns, 2.3 * n_rows)
    panels = figure.subplots(n_rows, columns, squeeze=False).ravel()
    for axes in panels[len(MEASURES) :]:
        axes.axis("off")
    for axes, measure in zip(panels, MEASURES, strict=False):
        logarithmic = measure.name == "residual"
        if logarithmic and rows:
            axes.set_yscale("log")
        for treatment in treatments:
            values = {
                layers: [
                    row[measure.name] for row in rows if row["layers"] == layers and row["treatment"] == treatment.name
                ]
                for layers in depths
            }
            shown = [layers for layers in depths if values[layers]]
            centres, bars = centres_and_bars([values[layers] for layers in shown], logarithmic)
            axes.errorbar(
                shown, centres, bars, color=treatment.colour, marker="o", markersize=3, capsize=2, label=treatment.title
            )
        axes.set_title(measure.title, fontsize=9)
        axes.set_xticks(list(depths))
        axes.tick_params(labelsize=7)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="lower right")
    figure.supxlabel("layers", fontsize=9)
    return figure


def centres_and_bars(groups: Sequence[Sequence[float]], logarithmic: bool) -> tuple[list[float], list[list[float]]]:
    """Mean of each group and how far one standard deviation reaches below and above it; of logarithms if so asked."""
    if logarithmic:
        groups = [[math.log(max(value, 1e-12)) for value in group] for group in groups]
    means = [fmean(group) for group in groups]
    spreads = [stdev(group) if len(group) > 1 else 0.0 for group in groups]
    back = math.exp if logarithmic else float
    centres = [back(mean) for mean in means]
    below = [back(mean) - back(mean - spread) for mean, spread in zip(means, spreads, strict=True)]
    above = [back(mean + spread) - back(mean) for mean, spread in zip(means, spreads, strict=True)]
    return centres, [below, above]
