"""How independent the draws of a chain are: split R-hat and effective sample sizes of Vehtari et al. 2021.

"Rank-normalization, folding, and localization: an improved R-hat for assessing convergence of MCMC", Bayesian Analysis
16(2). ArviZ's functions do it where arviz-stats is installed (the extra ``diagnostics``); the ones here are the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kaleido_fast.names import MIXED_R_HAT, MIXED_SHARE
from kaleido_fast.system.versions import library_versions

LEAST_DRAWS = 4  # a half of a chain needs two
LEAST_DRAWS_ESS = 10  # of less, no autocorrelation is looked at, and the size would be n log10(n) whatever they are
MOST_CHAINS, FEWEST_CHAINS = 64, 4
MOST_DRAWS = 2**15  # of all watched chains together: longer chains are watched in smaller numbers
MOST_VALUES = 8
LOOKED_AT = 32  # draws of a chain among which the values that vary most are looked for
TAILS = (0.05, 0.95)
ARVIZ = "arviz-stats"

Measure = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Mixing:
    """How independent draws of a chain are, by the worst of the values that were watched.

    Args:
        r_hat: the largest split R-hat, rank-normalised, of the values or of their distance from the median (folded):
            1 for draws whose chains look alike, infinite for chains that stand still in different places;
            None for one chain, and where no value moves but in the middle draw.
        ess_bulk, ess_tail: the smallest effective sample sizes: as many independent draws would show the middle of the
            distribution, or its 5 % and 95 % quantiles, as well as these ``n_chains * n_draws``. None for less than 10
            draws a chain.
        n_chains, n_draws: chains watched (the first ones, those with NaN left out), and draws of each (the first).
        n_values: values of a draw watched.
        source: what computed it.
    """

    r_hat: float | None
    ess_bulk: float | None
    ess_tail: float | None
    n_chains: int
    n_draws: int
    n_values: int
    source: str

    @property
    def ess_share(self) -> float | None:
        """`ess_bulk` as a share of all draws that were watched."""
        return None if self.ess_bulk is None else self.ess_bulk / (self.n_chains * self.n_draws)

    @property
    def mixes(self) -> bool:
        """Whether draws of a chain may pass for independent: R-hat up to 1.05, half of the draws effective."""
        if self.r_hat is None or self.ess_share is None:
            return False
        return self.r_hat <= MIXED_R_HAT and self.ess_share >= MIXED_SHARE

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which knows no infinity: there it is None, as is what is not defined."""
        facts = {**asdict(self), "ess_share": self.ess_share}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts.items()}


def watched_chains(n_draws: int) -> int:
    """Chains whose draws are watched: 64, fewer of more than 512 draws each, but 4."""
    return max(FEWEST_CHAINS, min(MOST_CHAINS, MOST_DRAWS // n_draws))


def measure_mixing(draws: Tensor) -> Mixing | None:
    """R-hat and effective sample sizes of draws (n_chains, n_draws, D) of the first chains.

    Watched are the 8 values of a draw that vary most, and the mean of all; of 64 chains (`watched_chains`), and of
    chains longer than 8,192 draws the first of these.

    Returns:
        The worst of these values; None for less than 4 draws a chain, and where no value varies.
    """
    if draws.shape[1] < LEAST_DRAWS:
        return None
    values = _watched_values(draws[: watched_chains(draws.shape[1]), : MOST_DRAWS // FEWEST_CHAINS])
    if not len(values):
        return None
    measures, source = _measures()
    _, n_chains, n_draws = values.shape
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.array([[measure(value) for measure in measures] for value in values])
    found[(np.ptp(values, axis=2) == 0).all(axis=1), 0] = math.inf  # a variance of rounding errors is none
    r_hats = found[~np.isnan(found[:, 0]), 0]  # undefined for a value that moves in the middle draw alone
    r_hat = float(r_hats.max()) if n_chains > 1 and len(r_hats) else None
    bulk, tail = found[:, 1:].min(axis=0).tolist() if n_draws >= LEAST_DRAWS_ESS else (None, None)
    return Mixing(r_hat, bulk, tail, n_chains, n_draws, len(values), source)


def _watched_values(draws: Tensor) -> np.ndarray:
    """What is watched of draws (n, n_draws, D): (values, chains, n_draws) fp64, without chains that hold NaN."""
    mean = draws.mean(dim=2, dtype=torch.float64)
    whole = torch.isfinite(mean).all(dim=1)
    draws, mean = draws[whole], mean[whole]
    if not len(draws):
        return np.zeros((0, 0, 0))
    some = draws[:, :: -(-draws.shape[1] // LOOKED_AT)].double()
    most = some.flatten(0, 1).var(dim=0, correction=0).sort(descending=True, stable=True).indices[:MOST_VALUES]
    columns = [*draws[:, :, most].double().unbind(dim=2), *([mean] if draws.shape[2] > 1 else [])]
    values = torch.stack(columns).cpu().numpy()
    return values[np.ptp(values, axis=(1, 2)) > 0]


@functools.cache
def _measures() -> tuple[tuple[Measure, Measure, Measure], str]:
    """Functions of draws (chains, draws) for R-hat, the bulk and the tail, and their name."""
    try:
        from arviz_stats.base import array_stats
    except ImportError:
        return (split_r_hat, ess_bulk, ess_tail), "kaleido-fast"
    axes = {"chain_axis": 0, "draw_axis": 1}
    return (
        lambda x: float(array_stats.rhat(x, method="rank", **axes)) if len(x) > 1 else math.nan,
        lambda x: float(array_stats.ess(x, method="bulk", **axes)),
        lambda x: float(array_stats.ess(x, method="tail", prob=TAILS, **axes)),
    ), f"{ARVIZ} {library_versions(ARVIZ)[ARVIZ]}"


def split_r_hat(draws: np.ndarray) -> float:
    """Rank-normalised split R-hat of draws (chains, draws): the larger of that of the values and of the folded ones."""
    halves = _split(draws)
    if len(draws) < 2:
        return math.nan  # as ArviZ has it
    return max(_r_hat(_normal_scores(halves)), _r_hat(_normal_scores(np.abs(halves - np.median(halves)))))


def ess_bulk(draws: np.ndarray) -> float:
    """Effective sample size of draws (chains, draws), by their normal scores."""
    return _ess(_normal_scores(_split(draws)))


def ess_tail(draws: np.ndarray) -> float:
    """Effective sample size of draws (chains, draws) for the 5 % and the 95 % quantile: the smaller."""
    return min(_ess(_split(draws <= np.quantile(draws, tail)).astype(float)) for tail in TAILS)


def _split(draws: np.ndarray) -> np.ndarray:
    """Halves of chains (chains, draws) as chains; the middle draw of an odd number is left out."""
    half = draws.shape[1] // 2
    return np.vstack((draws[:, :half], draws[:, -half:]))


def _normal_scores(values: np.ndarray) -> np.ndarray:
    """Ranks (equal values share theirs) as quantiles of the normal distribution, with Blom's offset of 3/8."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[place].reshape(values.shape)
    return torch.special.ndtri(torch.from_numpy((ranks - 0.375) / (values.size + 0.25))).numpy()


def _r_hat(chains: np.ndarray) -> float:
    """Potential scale reduction: (chains, draws)."""
    n = chains.shape[1]
    between, within = n * chains.mean(axis=1).var(ddof=1), chains.var(axis=1, ddof=1).mean()
    return float(np.sqrt((between / within + n - 1) / n))


def _ess(chains: np.ndarray) -> float:
    """Effective sample size of (chains, draws), by Geyer's initial monotone sequence, step by step as ArviZ."""
    n_chains, n = chains.shape
    if np.ptp(chains) < np.finfo(float).resolution:
        return float(chains.size)
    centred = chains - chains.mean(axis=1, keepdims=True)
    power = np.abs(np.fft.rfft(centred, n=2 * n, axis=1)) ** 2
    covariance = np.fft.irfft(power.mean(axis=0), n=2 * n)[:n] / n
    within = covariance[0] * n / (n - 1)
    variance = covariance[0] + (chains.mean(axis=1).var(ddof=1) if n_chains > 1 else 0.0)
    rho = 1 - (within - covariance) / variance
    rho[0] = 1
    # Of a reversible chain, sums of neighbours are positive and fall: the first that is not is noise, and all later.
    end, pair = 1, (rho[0], rho[1])
    while end < n - 3 and sum(pair) > 0:
        pair = (rho[end + 1], rho[end + 2])
        end += 2
    kept = rho[: end - 1].copy()
    for i in range(2, len(kept), 2):
        if kept[i : i + 2].sum() > kept[i - 2 : i].sum():
            kept[i : i + 2] = kept[i - 2 : i].sum() / 2
    tail = pair[0] if pair[0] > 0 or sum(pair) >= 0 else 0.0
    tau = max(-1 + 2 * kept.sum() + tail, 1 / math.log10(chains.size))
    return float(chains.size / tau)
