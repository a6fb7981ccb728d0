"""The 2-D kaleidoscope: the four points {0.2, 0.8} x {0.2, 0.8}, 7 layers of 50, sigmoid."""

from __future__ import annotations

import numpy as np
import torch

from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.reproducing.losses import OURS, PUBLISHED, compare_losses, describe_losses
from kaleido_fast.reproducing.models import Trained
from kaleido_fast.reproducing.points import BURN_IN, MOVED, TOL, describe, find_ends, sample_points, train_points
from kaleido_fast.reproducing.report import Report
from kaleido_fast.reproducing.settings import Settings
from kaleido_fast.sampling import fast_sample
from kaleido_fast.showing import plots
from kaleido_fast.showing.animation import make_frames, write_gif
from kaleido_fast.showing.states import Shown

SHOWN_STEPS = (0, 1, 2, 3, 5, 10, 20, 50)
GRID = 200


def run(settings: Settings, report: Report) -> None:
    """Train, sample, and write the report; see `kaleido_fast.reproducing.reproduction.reproduce`."""
    data, made = train_points(settings, "points2d")
    model, spec = made.checkpoint.model, made.checkpoint.model.spec
    steps = (*range(21), 50)
    # Normal start noise is around the middle of the range, with half the range as its standard deviation: 0.5 and 0.5.
    result = sample_points(settings, made, "normal", steps)
    ends = find_ends(result.final.cpu(), data.data)
    describe(report, made, data, result, ends)
    assert result.trace is not None
    states, points, bounds = result.trace.cpu(), data.data.numpy(), (spec.low, spec.high)
    line = torch.linspace(spec.low, spec.high, GRID)
    starts = torch.cartesian_prod(line, line).flip(1)  # rows of the grid: second value
    with torch.no_grad():
        loss = (model(starts) - starts).square().mean(dim=1).reshape(GRID, GRID)
    report.picture(
        "loss",
        plots.surface(loss.numpy(), bounds, points, "mean squared error of f(x) against x"),
        "The loss: deep at the four training points, and at unstable fixed points on the borders of their basins",
    )
    shown = [steps.index(step) for step in SHOWN_STEPS]
    basin = ends.basin[: len(states)].numpy()
    report.picture(
        "chains",
        plots.positions_2d(states[:, shown].numpy(), SHOWN_STEPS, basin, points, bounds),
        f"{len(states):,} chains from normal noise (mean 0.5, standard deviation 0.5, clipped to the square), coloured "
        "by where they end; crosses: training points",
    )
    report.picture(
        "basins",
        plots.basin_map(_basins(settings, made, data, starts), bounds, points),
        "Basins: every start in the square, coloured by the training point it ends at (grey: none)",
    )
    frames = make_frames(Shown(states[:MOVED, :21], steps[:21], spec, made.checkpoint.card.scaling))
    with report.file("chains.gif", f"{MOVED} chains over the steps") as path:
        write_gif(frames, path, frames_per_second=3)
    found = compare_losses(settings, "points2d", data, "normal")
    describe_losses(settings, report, "points2d", data, found)
    for title, slug in ((OURS, "ours"), (PUBLISHED, "published")):
        one = found[title][0]
        report.picture(
            f"{slug}-basins",
            plots.basin_map(_basins(settings, one.made, data, starts), bounds, points),
            f"{title[0].upper()}{title[1:]}, seed {settings.seed}: {one.n_attracting} of {len(data)} points attract "
            f"{sum(one.held):.1%} of the chains (grey: starts that end at no point)",
        )


def _basins(settings: Settings, made: Trained, data: Dataset, starts: torch.Tensor) -> np.ndarray:
    """The number of the point at which each start (GRID**2, 2) ends, (GRID, GRID); -1 for none."""
    mapped = fast_sample(
        made.checkpoint, n_chains=len(starts), z0=starts, burn_in=BURN_IN, tol=TOL, device=settings.device
    )
    return find_ends(mapped.final.cpu(), data.data).basin.reshape(GRID, GRID).numpy()
