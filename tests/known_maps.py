"""Networks built by hand, whose attractors are known."""

from __future__ import annotations

import torch

from kaleido_fast import KaleidoMLP, ModelSpec


def staircase(targets: list[float], thresholds: list[float] | None = None) -> KaleidoMLP:
    """A map of the line that sends the i-th interval to ``targets[i]``, by steep hidden tanh.

    f(x) = tanh(target_0 + sum_i jump_i * step(x - threshold_i)): between thresholds it is flat, so each state lands
    exactly (to rounding) on a target.

    Args:
        targets: inside (-1, 1), one an interval.
        thresholds: between the intervals, ascending; None cuts [-1, 1] into equal ones.
    """
    n, steep = len(targets), 400.0
    levels = torch.atanh(torch.tensor(targets, dtype=torch.float64))
    cuts = torch.linspace(-1, 1, n + 1, dtype=torch.float64)[1:-1] if thresholds is None else torch.tensor(thresholds)
    model = KaleidoMLP(ModelSpec((1, n - 1, 1), activation="tanh"))
    with torch.no_grad():
        first, last = model.linears
        first.weight.fill_(steep)
        first.bias.copy_(-steep * cuts)
        jumps = levels.diff()
        last.weight.copy_((jumps / 2)[None])
        last.bias.fill_(float(levels[0] + jumps.sum() / 2))
    return model.eval()


def cycle_map(period: int) -> KaleidoMLP:
    """A map of the line that permutes ``period`` attracting points in one cycle."""
    points = torch.linspace(-0.8, 0.8, period, dtype=torch.float64)
    return staircase(points.roll(-1).tolist(), ((points[1:] + points[:-1]) / 2).tolist())
