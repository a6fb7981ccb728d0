"""Networks whose attractors are known."""

from __future__ import annotations

import math

import torch
from conftest import random_mlp

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


def contracting(widths=(5, 16, 5), scale=0.55, seed=3) -> KaleidoMLP:
    return random_mlp(*widths, scale=scale, seed=seed)


def lingering() -> KaleidoMLP:
    """Its chains settle after 20 to 70 steps."""
    return contracting(scale=1.2)


def rotation(period: int, dim: int = 2) -> KaleidoMLP:
    """tanh(gain * R x) with R a turn by 2 pi / period: its attractor is a cycle of that period (2 flips the sign)."""
    angle = 2 * math.pi / period
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    model = KaleidoMLP(ModelSpec((2, 2), bias=(False,)))
    with torch.no_grad():
        model.linears[0].weight.copy_(turn * 2.0)
    return model.eval()


# Fixed points 0 and 8, a cycle of two (1 <-> 3), of three (2 -> 9 -> 5) and of seven (the others), mixed on the line.
MIXED = [0, 3, 9, 1, 6, 2, 7, 10, 8, 5, 11, 12, 13, 4]
MIXED_PERIODS = [1, 2, 3, 2, 7, 3, 7, 7, 1, 3, 7, 7, 7, 7]


def mixed_map() -> KaleidoMLP:
    """Sends the i-th of 14 equal intervals of [-1, 1] to the middle of the interval ``MIXED[i]``."""
    return staircase(middles()[torch.tensor(MIXED)].tolist())


def middles() -> torch.Tensor:
    edges = torch.linspace(-1, 1, len(MIXED) + 1, dtype=torch.float64)
    return (edges[1:] + edges[:-1]) / 2
