"""Figures of any number of chains in constant memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from kaleido_fast.running.mixing import Mixing
from kaleido_fast.running.result import ChainFigures, Outcome, histogram_of, quantiles_of, shares_of
from kaleido_fast.storing.layout import BlockOutput

_DROPPED_BITS = 12  # of a float32's 23 bits of mantissa: a bin is 2^-11 of its value wide
_N_BINS = 0x7F800000 >> _DROPPED_BITS  # of finite values from 0 on


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

    def add_blocks(self, output: BlockOutput, blocks: Iterable[int]) -> None:
        """Count the chains of blocks that were written earlier."""
        for block in blocks:
            self.add(*(output.read(name, block) for name in ("residual", "steps", "outcome")))

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

    def figures(self, *, freezes: bool, mixing: Mixing | None) -> ChainFigures:
        """Figures of all chains counted, with the histogram of a run that ``freezes`` them, and with ``mixing``."""
        return ChainFigures(
            residual_quantiles=self.residual_quantiles(),
            outcome_shares=self.outcome_shares(),
            steps_quantiles=self.steps_quantiles(),
            steps_histogram=self.steps_histogram() if freezes else {},
            mixing=mixing,
        )

    def outcome_shares(self) -> dict[str, float]:
        """Share of chains by outcome, every outcome named."""
        return shares_of(self.outcomes.tolist())

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
        """Chains that arrived, by their steps: see `kaleido_fast.running.result.steps_histogram`."""
        settled = self.settled
        most = max(settled, default=0)
        return histogram_of(most, lambda first, last: sum(n for t, n in settled.items() if first <= t <= last))


def _count(counter: Counter[int], values: np.ndarray) -> None:
    kinds, counts = np.unique(values, return_counts=True)
    counter.update(dict(zip(kinds.tolist(), counts.tolist(), strict=True)))


def _quantiles(values: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Quantiles of ``counts`` copies of ascending ``values``."""
    ends = counts.cumsum()
    n = int(ends[-1]) if len(ends) else 0
    return quantiles_of(n, lambda places: values[np.searchsorted(ends, places, side="right")].tolist())
