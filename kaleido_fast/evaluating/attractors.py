"""The catalogue of end states: where chains end, how many end there, and whether that is an attractor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from kaleido_fast.checkpoint import Checkpoint, Scaling
from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.diagnostics import STABLE_MSE, STABLE_RESIDUAL, STABLE_STEPS, nudged, spectral_radii
from kaleido_fast.evaluating.neighbours import distance_blocks
from kaleido_fast.evaluating.quality import nearest_examples
from kaleido_fast.model import KaleidoMLP, plain_mlp
from kaleido_fast.reading.arrays import as_points
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.running.result import Outcome, SampleResult
from kaleido_fast.running.subject import resolve_subject
from kaleido_fast.sampling import fast_sample
from kaleido_fast.scalars import real_number, whole_number
from kaleido_fast.showing.pictures import captioned_grid, sample_images
from kaleido_fast.system.neutral import neutral
from kaleido_kernels.exact import exact_products

DEFAULT_DISTANCE = 0.05
MAX_ATTRACTORS = 10_000
_BLOCK = 512
_SHEET_PIXELS = 56
_RADII = 1000
ATTRACTOR, REPELS, UNMEASURED = "attractor", "repels", "not measured"
_RADII_BLOCK = 64  # Jacobians, or vectors under them, of so many states are held at once


@dataclass(frozen=True)
class Catalogue:
    """End states of a run, the most visited first. Those with a spectral radius below 1 are attractors.

    A chain can rest where the radius is 1 or more: on a fixed point that repels, which it met exactly or beside which
    it moves by less than ``tol``. Chains near it leave it in the long run.

    Args:
        states: (k, D) one state of each, in model values; of a cycle the state that is lowest along a fixed direction.
        counts: (k,) int64, chains that ended there.
        periods: (k,) int32: 1 for a fixed point, p for a cycle.
        radii: (k,) spectral radius of the Jacobian of f^period there: below 1 holds chains. Found for the first 1000
            end states, NaN after that.
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

    @property
    def kinds(self) -> list[str]:
        """What each of the k end states is: "attractor", "repels" (a radius of 1 or more) or "not measured"."""
        return [ATTRACTOR if radius < 1 else REPELS if radius >= 1 else UNMEASURED for radius in self.radii.tolist()]

    def counted(self, kind: str) -> tuple[int, int]:
        """How many end states are of one kind, and how many chains ended there."""
        of_kind = torch.tensor([name == kind for name in self.kinds], dtype=torch.bool)
        return int(of_kind.sum()), int(self.counts[of_kind].sum())

    def rows(self) -> list[dict[str, Any]]:
        """Plain values of each end state, for JSON."""
        rows, kinds = [], self.kinds
        for i, chains in enumerate(self.counts.tolist()):
            row = {
                "share": chains / self.n_chains,
                "chains": chains,
                "period": int(self.periods[i]),
                "spectral_radius": None if kinds[i] == UNMEASURED else float(self.radii[i]),
                "kind": kinds[i],
                "state": [float(f"{value:.9g}") for value in self.states[i].tolist()],  # fp32 needs no more digits
            }
            if self.nearest is not None and self.nearest_mse is not None:
                row |= {"nearest_example": int(self.nearest[i]), "nearest_mse": float(self.nearest_mse[i])}
            rows.append(row)
        return rows

    def sheet(self, model: KaleidoMLP, scaling: Scaling, *, most: int = 400) -> Image.Image:
        """A picture of the first ``most`` end states, the most visited first, row by row.

        Under each stands its share of chains, the period of a cycle, and whether it repels.

        Raises:
            InputError: a model whose samples are not pictures.
        """
        pictures = sample_images(self.states[:most], model.spec, scaling, pixels=_SHEET_PIXELS)
        captions = [
            f"{share:.2%}" + (f" p{period}" if period > 1 else "") + (f" {REPELS}" if kind == REPELS else "")
            for share, period, kind in zip(self.shares.tolist(), self.periods.tolist(), self.kinds, strict=True)
        ]
        return captioned_grid(pictures, captions[:most])


@neutral()
@exact_products(torch.device("cpu"))
def attractors(
    result: SampleResult,
    model: nn.Module | Checkpoint | str | Path,
    *,
    distance: float = DEFAULT_DISTANCE,
    data: Any = None,
) -> Catalogue:
    """Gather the end states of a run; `Catalogue.kinds` says which of them are attractors.

    An end state within ``distance`` of the first one of a group, and of its period, counts as the same; the
    distance is the root of the mean squared difference, in units of half the data range. Chains that were still moving
    are counted in ``n_chains`` alone. Works in blocks: memory is bounded by ``MAX_ATTRACTORS`` states.

    Args:
        result: a run without jitter, with ``tol``.
        model: the network that was sampled: a `KaleidoMLP`, a plain ``nn.Sequential``, a `Checkpoint`, or the
            path or name of one.
        distance: above 0, in units of half the data range.
        data: training examples in model values, for the nearest one of each end state: a tensor or array (m, D), or a
            `Dataset`.

    Raises:
        InputError: a run of a flow, no chain that arrived, a distance that is not above 0, a model or data of another
            size, or more distinct end states than the catalogue holds.
    """
    distance = check_distance(distance)
    if result.request.sampler == "flow":
        raise InputError("a run of sampler 'flow' comes nowhere to rest: give one of sampler='kaleidoscope'")
    module = plain_mlp(model if isinstance(model, nn.Module) else resolve_subject(model).module)
    spec = module.spec
    if result.final.shape[1] != spec.dim:
        raise InputError(f"the run has {result.final.shape[1]} values a chain, the model {spec.dim}")
    examples = None if data is None else as_points(data.data if isinstance(data, Dataset) else data, spec.dim)
    leaders = _Leaders(spec.dim, distance * (spec.high - spec.low) / 2 * spec.dim**0.5)
    for states, periods in _end_states(result, module):
        leaders.add(states, periods)
    states, counts, period_of = leaders.by_count()
    if not len(states):
        raise InputError("no chain of this run arrived: sample with jitter=0, a tol, and more burn_in")
    nearest = nearest_mse = None
    if examples is not None:
        nearest, nearest_mse = nearest_examples(states, examples)
    return Catalogue(
        states,
        counts,
        period_of,
        _radii(module, states, period_of),
        nearest,
        nearest_mse,
        n_chains=len(result.residual),
        n_settled=int(counts.sum()),
    )


def check_distance(distance: float) -> float:
    """The distance as a float; one at which no end states differ is refused: `InputError`."""
    number = real_number(distance)
    if number is None or not 0 < number < float("inf"):
        raise InputError(f"distance is {distance!r}: give a finite number of half data ranges, above 0")
    return number


def check_sigma(sigma: float) -> float:
    """Noise as a float; a value below 0, or one that is no number, is refused: `InputError`."""
    number = real_number(sigma)
    if number is None or not 0 <= number < float("inf"):
        raise InputError(f"sigma is {sigma!r}: give a finite number of half data ranges, 0 or more")
    return number


@neutral()
def recovered(
    model: KaleidoMLP, examples: Tensor, sigma: float, *, seed: int = 0, engine: str = "auto", device: str = "auto"
) -> Tensor:
    """Which examples (n, D) draw chains back that start from them with noise: bool (n,).

    The start is the example plus ``sigma`` times standard normal noise, in units of half the data range, clamped to the
    range. It is recovered if after 300 steps the chain has arrived within a mean squared difference of 0.02 of the
    example (same units). With ``sigma`` 0 the start is `nudged`: that says which examples are stable attractors.

    Raises:
        InputError: a sigma below 0, or examples of another size than the model's or outside its range.
    """
    sigma, seed = check_sigma(sigma), whole_number("seed", seed, 0, 2**64 - 1)
    spec = model.spec
    examples = as_points(examples, spec.dim)
    half = (spec.high - spec.low) / 2
    noise = torch.randn(examples.shape, generator=torch.Generator().manual_seed(seed))
    starts = (examples.cpu() + sigma * half * noise).clamp(spec.low, spec.high)
    if sigma == 0:
        starts = nudged(examples.cpu(), spec.low, spec.high)
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


def _end_states(result: SampleResult, model: KaleidoMLP) -> Iterator[tuple[Tensor, Tensor]]:
    """One state (n, D) and the period (n,) of every chain that arrived, block by block, on the host."""
    for first in range(0, len(result.residual), _BLOCK):
        rows = slice(first, first + _BLOCK)
        outcome, periods = result.outcome[rows].cpu(), result.period[rows].cpu()
        arrived = (outcome == Outcome.FIXED_POINT) | (outcome == Outcome.CYCLE)
        states, periods = result.final[rows].cpu()[arrived].float(), periods[arrived]
        for period in periods[periods > 1].unique().tolist():
            same = periods == period
            states[same] = _lowest_state(model, states[same], period)
        yield states, periods


def _lowest_state(model: KaleidoMLP, states: Tensor, period: int) -> Tensor:
    """The state of each orbit that is lowest along one fixed direction: the same for every chain on that cycle."""
    direction = torch.randn(states.shape[1], generator=torch.Generator().manual_seed(0))
    best, lowest, x = states.clone(), states @ direction, states.to(model.linears[0].weight)
    with torch.no_grad():
        for _ in range(period - 1):
            x = model(x)
            here = x.float().cpu()
            height = here @ direction
            better = height < lowest
            best[better], lowest[better] = here[better], height[better]
    return best


class _Leaders:
    """Leader clustering: an end state joins the first leader within ``distance``, or becomes one itself.

    It does not matter in how large blocks states are added. Only states of one period are the same.
    """

    def __init__(self, dim: int, distance: float) -> None:
        self.limit = distance**2
        self.n = 0
        self.states = torch.empty(64, dim)  # the first ``n`` rows are in use
        self.counts: list[int] = []
        self.periods: list[int] = []

    def add(self, states: Tensor, periods: Tensor) -> None:
        """Count states (n, D) with their periods (n,)."""
        place = self._first_leaders(states, periods)
        for leader, count in zip(*place[place >= 0].unique(return_counts=True), strict=True):
            self.counts[int(leader)] += int(count)
        states, periods = states[place < 0], periods[place < 0]
        while len(states):
            same = (states - states[0]).square().sum(dim=1) <= self.limit
            same &= periods == periods[0]
            self._append(states[0], int(periods[0]), int(same.sum()))
            states, periods = states[~same], periods[~same]

    def by_count(self) -> tuple[Tensor, Tensor, Tensor]:
        """States (k, D), counts (k,) and periods (k,) of the leaders, the most frequent first."""
        counts = torch.tensor(self.counts, dtype=torch.int64)
        order = counts.argsort(descending=True, stable=True)
        return self.states[: self.n][order], counts[order], torch.tensor(self.periods, dtype=torch.int32)[order]

    def _append(self, state: Tensor, period: int, count: int) -> None:
        if self.n == MAX_ATTRACTORS:
            raise InputError(
                f"more than {MAX_ATTRACTORS:,} distinct end states: pass a larger distance, or sample longer"
            )
        if self.n == len(self.states):
            self.states = torch.cat((self.states, torch.empty_like(self.states)))
        self.states[self.n] = state
        self.counts.append(count)
        self.periods.append(period)
        self.n += 1

    def _first_leaders(self, states: Tensor, periods: Tensor) -> Tensor:
        """Places (n,) of the first leaders within the distance, -1 where there is none."""
        found = torch.full((len(states),), self.n)
        period_of = torch.tensor(self.periods, dtype=periods.dtype)
        for rows, columns, squares in distance_blocks(states, self.states[: self.n]):
            near = (squares <= self.limit) & (periods[rows, None] == period_of[columns])
            first = torch.where(near.any(dim=1), near.to(torch.uint8).argmax(dim=1) + columns.start, self.n)
            found[rows] = torch.minimum(found[rows], first)
        return torch.where(found < self.n, found, -1)


def _radii(model: KaleidoMLP, states: Tensor, periods: Tensor) -> Tensor:
    """Spectral radii (k,) of the first end states, NaN for those after."""
    radii = torch.full((len(states),), torch.nan)
    like = model.linears[0].weight
    for period in periods[:_RADII].unique().tolist():
        for rows in (periods[:_RADII] == period).nonzero().squeeze(1).split(_RADII_BLOCK):
            radii[rows] = spectral_radii(_repeated(model, period), states[rows].to(like)).float().cpu()
    return radii


def _repeated(model: KaleidoMLP, times: int) -> Callable[[Tensor], Tensor]:
    def map_(x: Tensor) -> Tensor:
        for _ in range(times):
            x = model(x)
        return x

    return map_
