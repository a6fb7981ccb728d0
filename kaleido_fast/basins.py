"""The attractor catalogue: where chains end, how many end there, and how firmly they are held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from kaleido_fast.checkpoint import Scaling
from kaleido_fast.diagnostics import STABLE_MSE, STABLE_RESIDUAL, STABLE_STEPS, spectral_radii
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.pictures import image_grid
from kaleido_fast.quality import nearest_examples
from kaleido_fast.result import Outcome, SampleResult
from kaleido_fast.sampling import fast_sample, resolve_subject

DEFAULT_DISTANCE = 0.05
MAX_ATTRACTORS = 10_000
_BLOCK = 4096
_RADII = 1000


@dataclass(frozen=True)
class Catalogue:
    """Attractors of a run, the most visited first.

    Args:
        states: (k, D) one state of each, in model values; of a cycle the state that is lowest along a fixed direction.
        counts: (k,) int64, chains that ended there.
        periods: (k,) int32: 1 for a fixed point, p for a cycle.
        radii: (k,) spectral radius of the Jacobian of f^period there: below 1 holds chains. Found for the first 1000
            attractors, NaN after that.
        nearest, nearest_mse: (k,) index of the nearest training example and the mean squared difference to it, in
            squared model units; None without data.
        n_chains: chains of the run.
        n_settled: chains whose end is known: fixed points and cycles.
    """

    states: Tensor
    counts: Tensor
    periods: Tensor
    radii: Tensor
    nearest: Tensor | None
    nearest_mse: Tensor | None
    n_chains: int
    n_settled: int

    @property
    def shares(self) -> Tensor:
        """(k,) basin shares: chains that ended there, of all chains."""
        return self.counts / self.n_chains

    def rows(self) -> list[dict[str, Any]]:
        """Plain values of each attractor, for JSON."""
        rows = []
        for i, share in enumerate(self.shares.tolist()):
            row = {
                "share": share,
                "chains": int(self.counts[i]),
                "period": int(self.periods[i]),
                "spectral_radius": float(self.radii[i]) if i < _RADII else None,
                "state": self.states[i].tolist(),
            }
            if self.nearest is not None and self.nearest_mse is not None:
                row |= {"nearest_example": int(self.nearest[i]), "nearest_mse": float(self.nearest_mse[i])}
            rows.append(row)
        return rows

    def sheet(self, model: KaleidoMLP, scaling: Scaling, *, most: int = 400) -> Image.Image:
        """A picture of the first ``most`` attractors, the most visited first, row by row."""
        return image_grid(self.states[:most], model.spec, scaling)


def attractors(
    result: SampleResult,
    model: nn.Module | str | Path,
    *,
    distance: float = DEFAULT_DISTANCE,
    data: Tensor | None = None,
) -> Catalogue:
    """Gather the end states of a run.

    End states within ``distance`` of an attractor's first chain count as the same; the distance is the root of the
    mean squared difference, in units of half the data range. Chains that were still moving are counted in
    ``n_chains`` alone. Works in blocks: memory is bounded by ``MAX_ATTRACTORS`` states.

    Args:
        result: a run without jitter, with ``tol``.
        model: the network that was sampled: a `KaleidoMLP`, a plain ``nn.Sequential``, or a checkpoint.
        distance: above 0.
        data: (m, D) training examples in model values, for the nearest one of each attractor.

    Raises:
        InputError: no chain of the run settled, a distance that is not above 0, a model or data of another size, or
            more distinct end states than the catalogue holds.
    """
    module = resolve_subject(model).module
    if not isinstance(module, KaleidoMLP):
        raise InputError(f"attractors of a {type(module).__name__}: a KaleidoMLP or a plain Sequential is needed")
    if not distance > 0:
        raise InputError(f"distance is {distance!r}: it must be above 0")
    ends, periods = _end_states(result, module)
    scale = distance * (module.spec.high - module.spec.low) / 2 * module.spec.dim**0.5
    states, counts, period_of = _gather(ends, periods, scale)
    nearest = nearest_mse = None
    if data is not None:
        nearest, nearest_mse = nearest_examples(states, data)
    return Catalogue(
        states,
        counts,
        period_of,
        _radii(module, states, period_of),
        nearest,
        nearest_mse,
        n_chains=len(result.residual),
        n_settled=len(ends),
    )


def recovered(
    model: KaleidoMLP, examples: Tensor, sigma: float, *, seed: int = 0, engine: str = "auto", device: str = "auto"
) -> Tensor:
    """Which examples (n, D) draw chains back that start from them with noise: bool (n,).

    The start is the example plus ``sigma`` times standard normal noise, in units of half the data range, clamped to the
    range. It is recovered if after 300 steps the chain has settled within a mean squared difference of 0.02 of the
    example (same units): with ``sigma`` 0 that says which examples are stable attractors.

    Raises:
        InputError: a sigma below 0, or examples of another size than the model's or outside its range.
    """
    if not 0 <= sigma < float("inf"):
        raise InputError(f"sigma is {sigma!r}: give a finite number of half data ranges, 0 or more")
    spec = model.spec
    half = (spec.high - spec.low) / 2
    noise = torch.randn(examples.shape, generator=torch.Generator().manual_seed(seed))
    starts = (examples.cpu() + sigma * half * noise).clamp(spec.low, spec.high)
    result = fast_sample(
        model,
        n_chains=len(examples),
        burn_in=STABLE_STEPS - 1,
        z0=starts,
        tol=STABLE_RESIDUAL * half,
        engine=engine,
        device=device,
    )
    error = ((result.final.cpu().float() - examples.cpu()) / half).square().mean(dim=1)
    return (error <= STABLE_MSE) & (result.outcome.cpu() == Outcome.FIXED_POINT)


def _end_states(result: SampleResult, model: KaleidoMLP) -> tuple[Tensor, Tensor]:
    """One state and the period of every chain that settled."""
    if result.final.shape[1] != model.spec.dim:
        raise InputError(f"the run has {result.final.shape[1]} values a chain, the model {model.spec.dim}")
    settled = (result.outcome == Outcome.FIXED_POINT) | (result.outcome == Outcome.CYCLE)
    if not bool(settled.any()):
        raise InputError("no chain of this run settled: sample with jitter=0, a tol, and more burn_in")
    states = result.final[settled].cpu().float()
    periods = result.period[settled].cpu().clamp_min(1)
    for period in periods.unique().tolist():
        if period > 1:
            rows = periods == period
            states[rows] = _lowest_state(model, states[rows], period)
    return states, periods


def _lowest_state(model: KaleidoMLP, states: Tensor, period: int) -> Tensor:
    """The state of each orbit that is lowest along one fixed direction: the same for every chain on that cycle."""
    direction = torch.randn(states.shape[1], generator=torch.Generator().manual_seed(0))
    best, lowest, x = states.clone(), states @ direction, states
    with torch.no_grad():
        for _ in range(period - 1):
            x = model(x)
            height = x @ direction
            better = height < lowest
            best[better], lowest[better] = x[better], height[better]
    return best


def _gather(ends: Tensor, periods: Tensor, distance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Leader clustering: each end state joins the nearest leader within ``distance`` or becomes one itself."""
    leaders, leader_period = ends[:0], periods[:0]
    counts = torch.zeros(0, dtype=torch.int64)
    for block, block_periods in zip(ends.split(_BLOCK), periods.split(_BLOCK), strict=True):
        near, place = _nearest_leader(block, leaders)
        known = near <= distance
        counts += torch.bincount(place[known], minlength=len(leaders))
        block, block_periods = block[~known], block_periods[~known]
        while len(block):
            same = torch.linalg.vector_norm(block - block[0], dim=1) <= distance
            leaders = torch.cat((leaders, block[:1]))
            leader_period = torch.cat((leader_period, block_periods[:1]))
            counts = torch.cat((counts, same.sum()[None]))
            block, block_periods = block[~same], block_periods[~same]
            if len(leaders) > MAX_ATTRACTORS:
                raise InputError(
                    f"more than {MAX_ATTRACTORS:,} distinct end states: pass a larger distance, or sample longer"
                )
    order = counts.argsort(descending=True, stable=True)
    return leaders[order], counts[order], leader_period[order]


def _nearest_leader(block: Tensor, leaders: Tensor) -> tuple[Tensor, Tensor]:
    if not len(leaders):
        return torch.full((len(block),), torch.inf), torch.zeros(len(block), dtype=torch.int64)
    nearest = torch.cdist(block, leaders).min(dim=1)
    # The matrix product behind cdist loses small distances: measure the winner again.
    return torch.linalg.vector_norm(block - leaders[nearest.indices], dim=1), nearest.indices


def _radii(model: KaleidoMLP, states: Tensor, periods: Tensor) -> Tensor:
    radii = torch.full((len(states),), torch.nan)
    for period in periods[:_RADII].unique().tolist():
        rows = (periods[:_RADII] == period).nonzero().squeeze(1)
        radii[rows] = spectral_radii(_repeated(model, period), states[rows]).float()
    return radii


def _repeated(model: KaleidoMLP, times: int) -> Callable[[Tensor], Tensor]:
    def map_(x: Tensor) -> Tensor:
        for _ in range(times):
            x = model(x)
        return x

    return map_
