"""The 1-D kaleidoscope: X = {-0.8, -0.2, 0.2, 0.8}, 10 layers of 10, tanh."""

from __future__ import annotations

import numpy as np
import torch

from kaleido_fast.reproducing.losses import OURS, PUBLISHED, compare_losses, describe_losses
from kaleido_fast.reproducing.models import Trained
from kaleido_fast.reproducing.points import MOVED, describe, find_ends, sample_points, train_points
from kaleido_fast.reproducing.report import Report
from kaleido_fast.reproducing.settings import Settings
from kaleido_fast.showing import plots
from kaleido_fast.showing.animation import make_frames, write_gif
from kaleido_fast.showing.states import Shown, frame_steps

SHOWN_STEPS = (0, 1, 2, 3, 5, 10, 20, 50)
COBWEB_STARTS = (-0.97, -0.55, -0.42, -0.02, 0.05, 0.45, 0.56, 0.95)
COBWEB_STEPS = 12


def run(settings: Settings, report: Report) -> None:
    """Train, sample, and write the report; see `kaleido_fast.reproducing.reproduction.reproduce`."""
    data, made = train_points(settings, "points1d")
    spec = made.checkpoint.model.spec
    steps = tuple(sorted({*SHOWN_STEPS, *frame_steps(max(SHOWN_STEPS))}))
    result = sample_points(settings, made, "uniform", steps)
    ends = find_ends(result.final.cpu(), data.data)
    describe(report, made, data, result, ends)
    x, y = _curve(made)
    points = data.data[:, 0].numpy()
    report.picture(
        "function",
        plots.learned_function(x, y, points),
        "The learned function is flat, or nearly so, around each training point: a whole interval is sent to it",
    )
    report.picture(
        "loss",
        plots.loss_profile(x, (y - x) ** 2, points),
        "The loss: deep at the training points, and at the unstable fixed points between them, which repel chains",
    )
    assert result.trace is not None
    states = result.trace.cpu()
    shown = [steps.index(step) for step in SHOWN_STEPS]
    report.picture(
        "chains",
        plots.positions_1d(states[:, shown, 0].numpy(), SHOWN_STEPS, points, (spec.low, spec.high)),
        f"{len(states):,} chains from uniform noise over the steps",
    )
    report.picture(
        "cobweb",
        plots.cobweb(x, y, _paths(made), points),
        "Cobweb plot: chains go up or down to the function, across to the diagonal, and so on to a training point",
    )
    moving = [i for i, step in enumerate(steps) if step <= 20]
    seen = tuple(steps[i] for i in moving)
    frames = make_frames(Shown(states[:MOVED, moving], seen, spec, made.checkpoint.card.scaling))
    with report.file("chains.gif", f"{MOVED} chains: value from left to right, one row a chain") as path:
        write_gif(frames, path, frames_per_second=3)
    found = compare_losses(settings, "points1d", data, "uniform")
    describe_losses(settings, report, "points1d", data, found)
    for title, slug in ((OURS, "ours"), (PUBLISHED, "published")):
        one = found[title][0]
        x, y = _curve(one.made)
        report.picture(
            f"{slug}-cobweb",
            plots.cobweb(x, y, _paths(one.made), points),
            f"{title[0].upper()}{title[1:]}, seed {settings.seed}: {one.n_attracting} of {len(data)} points attract",
        )


def _curve(made: Trained) -> tuple[np.ndarray, np.ndarray]:
    """The learned function over the data range: x and f(x), (2001,) each."""
    model = made.checkpoint.model
    grid = torch.linspace(model.spec.low, model.spec.high, 2001)[:, None]
    with torch.no_grad():
        return grid[:, 0].numpy(), model(grid)[:, 0].numpy()


def _paths(made: Trained) -> np.ndarray:
    """Eight chains over twelve steps, (8, 13)."""
    paths = [torch.tensor(COBWEB_STARTS)[:, None]]
    with torch.no_grad():
        for _ in range(COBWEB_STEPS):
            paths.append(made.checkpoint.model(paths[-1]))
    return torch.cat(paths, dim=1).numpy()
