"""What the two kaleidoscopes of points share: training, end points, basins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kaleido_fast.evaluating.diagnostics import spectral_radii
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.planning.request import Trace
from kaleido_fast.presets import PRESETS
from kaleido_fast.reading.datasets import Dataset, built_in, load_dataset
from kaleido_fast.reproducing.models import Trained, network_spec, trained
from kaleido_fast.reproducing.report import Report
from kaleido_fast.reproducing.settings import Settings
from kaleido_fast.running.result import SampleResult
from kaleido_fast.sampling import fast_sample

REACHED = 0.02  # a chain this near to a training point has arrived there
N_CHAINS = 10_000
BURN_IN = 299
TOL = 1e-6  # chains that start beside an unstable fixed point leave it so slowly that 1e-4 would call them arrived
SHOWN = 2000  # chains in pictures
MOVED = 400  # chains in the animation


@dataclass(frozen=True)
class Ends:
    """Where chains end.

    Args:
        basin: (n,) int64 number of the training point, -1 further than `REACHED` from all.
        distance: (n,) largest difference of a value to the nearest point.
        shares: share of chains at each point.
    """

    basin: Tensor
    distance: Tensor
    shares: list[float]

    def held(self, model: KaleidoMLP, final: Tensor) -> list[float]:
        """Share of all chains that each point attracts: chains (n, D) that end at it, where the spectral radius is
        below 1. Where it is above, they rest within the tolerance beside a state that repels."""
        arrived = self.basin >= 0
        stays = torch.zeros_like(arrived)
        if arrived.any():
            stays[arrived] = spectral_radii(model, final[arrived]) < 1
        counts = torch.bincount(self.basin[stays], minlength=len(self.shares))
        return (counts / len(final)).tolist()


def train_points(settings: Settings, name: str) -> tuple[Dataset, Trained]:
    """The preset's points and its network, trained on them."""
    preset = PRESETS[name]
    data = load_dataset(built_in(name), bound=preset.network.bound)
    return data, trained(settings, name, data, network_spec(preset.network), preset.recipe, sampling=preset.sampling)


def find_ends(final: Tensor, points: Tensor) -> Ends:
    """Which point (k, D) every end state (n, D) is at."""
    far = (final[:, None] - points[None]).abs().amax(dim=2)
    distance, basin = far.min(dim=1)
    basin = torch.where(distance <= REACHED, basin, -1)
    counts = torch.bincount(basin[basin >= 0], minlength=len(points))
    return Ends(basin, distance, (counts / len(final)).tolist())


def sample_points(settings: Settings, made: Trained, init: str, steps: tuple[int, ...] = (0,)) -> SampleResult:
    """Chains of the kaleidoscope with the states of some of them at ``steps``."""
    n = settings.n_chains or N_CHAINS
    return fast_sample(
        made.checkpoint,
        n_chains=n,
        seed=settings.seed,
        init=init,
        burn_in=BURN_IN,
        tol=TOL,
        device=settings.device,
        trace=Trace(tuple(range(min(n, SHOWN))), steps),
        progress=settings.progress,
    )


def point_name(point: list[float]) -> str:
    """A training point in a table."""
    return ", ".join(f"{value:g}" for value in point)


def describe(report: Report, made: Trained, data: Dataset, result: SampleResult, ends: Ends) -> None:
    """The table of points, and the sentence that says how the chains ended."""
    n, held = len(ends.basin), ends.held(made.checkpoint.model, result.final.cpu())
    arrived = int((ends.basin >= 0).sum())
    quantiles = result.stats.steps_quantiles
    report.text(
        f"Trained on {len(data)} points in {made.seconds:.1f} s ({made.clock}). {arrived:,} of {n:,} chains end within "
        f"{REACHED} of a training point, the furthest {float(ends.distance.max()):.4f} away; half of them have arrived "
        f"after {quantiles['50%']:.0f} steps, 99 % after {quantiles['99%']:.0f}."
    )
    report.table(
        ("training point", "attractor", "basin share"),
        [
            (point_name(point), "yes" if stays > 0 else "no", f"{share:.3f}")
            for point, stays, share in zip(data.data.tolist(), held, ends.shares, strict=True)
        ],
    )
    report.record(
        n_chains=n,
        chains_at_a_point=arrived,
        furthest=float(ends.distance.max()),
        attractors=sum(share > 0 for share in held),
        basin_shares=ends.shares,
        steps_quantiles=result.stats.steps_quantiles,
        training_seconds=made.seconds,
        recipe=made.checkpoint.card.recipe,
        diagnostics=made.checkpoint.card.diagnostics,
        seed=result.request.seed,
    )
