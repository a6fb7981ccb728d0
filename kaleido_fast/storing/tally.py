"""Figures of any number of chains in constant memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from kaleido_fast.running.result import FIRST_BIN, Outcome

_DROPPED_BITS = 12  # of a float32's 23 bits of mantissa: a bin is 2^-11 of its value wide
_N_BINS = 0x7F800000 >> _DROPPED_BITS  # of finite values from 0 on
_POINTS = (0, 10, 50, 90, 99, 100)


class Tally:
    """Counts chains by outcome, steps and residual; residuals in bins of relative width 2^-11 (0.05 %)."""

    def __init__(self) -> None:
        self.outcomes = np.zeros(len(Outcome), np.int64)
        self.residuals = np.zeros(_N_BINS, np.int64)
        self.least, self.most = np.inf, -np.inf
        self.steps: Counter[int] = Counter()
        self.settled: Counter[int] = Counter()

    @property
    def n_chains(self) -> int:
        """Chains counted so far."""
        return int(self.outcomes.sum())

    def add(self, residual: np.ndarray, steps: np.ndarray, outcome: np.ndarray) -> None:
        """Count chains, (n,) each."""
        self.outcomes += np.bincount(outcome, minlength=len(Outcome))
        finite = residual[np.isfinite(residual)]
        if len(finite):
            self.least, self.most = min(self.least, float(finite.min())), max(self.most, float(finite.max()))
            bins, counts = np.unique(finite.view(np.int32) >> _DROPPED_BITS, return_counts=True)
            self.residuals[bins] += counts
        _count(self.steps, steps)
        _count(self.settled, steps[(outcome == Outcome.FIXED_POINT) | (outcome == Outcome.CYCLE)])

    def plain(self) -> dict[str, Any]:
        """All counts as plain values, to be sent to another process; see `include`."""
        bins = np.flatnonzero(self.residuals)
        return {
            "outcomes": self.outcomes.tolist(),
            "residuals": [bins.tolist(), self.residuals[bins].tolist()],
            "ends": [self.least, self.most] if len(bins) else None,
            "steps": [list(self.steps), list(self.steps.values())],
            "settled": [list(self.settled), list(self.settled.values())],
        }

    def include(self, plain: Mapping[str, Any]) -> None:
        """Add the counts of another tally, as it was sent."""
        self.outcomes += np.array(plain["outcomes"], np.int64)
        bins, counts = plain["residuals"]
        self.residuals[bins] += np.array(counts, np.int64)
        if plain["ends"] is not None:
            self.least, self.most = min(self.least, plain["ends"][0]), max(self.most, plain["ends"][1])
        self.steps.update(dict(zip(*plain["steps"], strict=True)))
        self.settled.update(dict(zip(*plain["settled"], strict=True)))

    def outcome_shares(self) -> dict[str, float]:
        """Share of chains by outcome, every outcome named."""
        total = max(1, self.n_chains)
        return {kind.name.lower(): float(self.outcomes[kind] / total) for kind in Outcome}

    def residual_quantiles(self) -> dict[str, float]:
        """Quantiles of the finite residuals, 0.05 % apart from the exact ones at most; NaN where there is none."""
        bins = np.flatnonzero(self.residuals)
        lower = (bins.astype(np.int32) << _DROPPED_BITS).view(np.float32) if len(bins) else np.zeros(0, np.float32)
        found = _quantiles(lower.astype(np.float64), self.residuals[bins])
        return found if not len(bins) else {**found, "0%": self.least, "100%": self.most}

    def steps_quantiles(self) -> dict[str, float]:
        """Quantiles of the steps that chains were run."""
        values = np.array(sorted(self.steps), np.float64)
        return _quantiles(values, np.array([self.steps[int(value)] for value in values], np.int64))

    def steps_histogram(self) -> dict[str, int]:
        """As `kaleido_fast.running.result.steps_histogram`."""
        counts: dict[str, int] = {}
        first, last = 1, FIRST_BIN
        while self.settled and first <= max(self.settled):
            counts[f"{first}-{last}"] = sum(n for steps, n in self.settled.items() if first <= steps <= last)
            first, last = last + 1, 2 * last
        return counts


def _count(counter: Counter[int], values: np.ndarray) -> None:
    kinds, counts = np.unique(values, return_counts=True)
    counter.update(dict(zip(kinds.tolist(), counts.tolist(), strict=True)))


def _quantiles(values: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Values at 0, 10, 50, 90, 99 and 100 % of the order of ``counts`` copies of ascending ``values``."""
    if not len(values):
        return {f"{point}%": float("nan") for point in _POINTS}
    ends = counts.cumsum()
    places = [round(point / 100 * (int(ends[-1]) - 1)) for point in _POINTS]
    return {
        f"{point}%": float(values[np.searchsorted(ends, place, side="right")])
        for point, place in zip(_POINTS, places, strict=True)
    }
