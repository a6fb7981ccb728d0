"""The published loss on the points beside ours: how many of the points attract chains, seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kaleido_fast.evaluating.diagnostics import spectral_radii
from kaleido_fast.presets import PRESETS, PUBLISHED_POINTS_RECIPE, TrainingRecipe
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.reproducing.models import Trained, network_spec, trained
from kaleido_fast.reproducing.points import Ends, find_ends, point_name, sample_points
from kaleido_fast.reproducing.report import Report
from kaleido_fast.reproducing.settings import Settings

N_SEEDS = 6
OURS, PUBLISHED, AS_PUBLISHED = "our loss", "the published loss", "the published loss and optimiser"


@dataclass(frozen=True)
class Found:
    """One network and its chains.

    Args:
        made: the network.
        ends: where its chains end.
        held: share of all chains that each point attracts, see `Ends.held`.
        radii: spectral radius at each point.
    """

    made: Trained
    ends: Ends
    held: list[float]
    radii: list[float]

    @property
    def n_attracting(self) -> int:
        """Points that attract chains."""
        return sum(share > 0 for share in self.held)


Compared = dict[str, list[Found]]  # by the name of the loss, a network a seed


def recipes(name: str) -> dict[str, TrainingRecipe]:
    """What is compared, one try each: ours, ours without its noise, which leaves the published loss, and all of the
    published training."""
    ours = replace(PRESETS[name].recipe, attempts=1)
    return {OURS: ours, PUBLISHED: replace(ours, noise=0.0), AS_PUBLISHED: PUBLISHED_POINTS_RECIPE}


def compare_losses(settings: Settings, name: str, data: Dataset, init: str) -> Compared:
    """Train the network of a preset with every recipe and seed, and run chains from ``init`` noise through it."""
    found: Compared = {title: [] for title in recipes(name)}
    settings.tell(f"training {len(found) * N_SEEDS} networks, to compare losses")
    quiet = replace(settings, progress=False, tell=lambda _: None)
    spec, sampling = network_spec(PRESETS[name].network), PRESETS[name].sampling
    for title, recipe in recipes(name).items():
        for seed in seeds(settings):
            made = trained(quiet, f"{name}-compared", data, spec, recipe, sampling=sampling, seed=seed)
            final = sample_points(quiet, made, init).final.cpu()
            ends, model = find_ends(final, data.data), made.checkpoint.model
            found[title].append(Found(made, ends, ends.held(model, final), spectral_radii(model, data.data).tolist()))
    return found


def seeds(settings: Settings) -> list[int]:
    """The seeds of the networks that are compared; the first is the settings'."""
    return [(settings.seed + i) % 2**64 for i in range(N_SEEDS)]


def describe_losses(settings: Settings, report: Report, name: str, data: Dataset, found: Compared) -> None:
    """The tables that say what each loss comes to, and the sentence that sums them up."""
    ours, as_published = PRESETS[name].recipe, PUBLISHED_POINTS_RECIPE
    report.heading("The published loss beside ours")
    report.text(
        f"Above is **our loss**: the network is shown points moved by noise of {ours.noise:g} half data ranges, and is "
        "asked for the points. **The published loss** is the plain error at the points themselves; all else is as in "
        "ours: weights at the start, steps, learning rate. **The published loss and optimiser**: torch's weights at "
        f"the start, {as_published.steps:,} steps at a rate of {as_published.learning_rate:g}, all points in each. A "
        "point attracts if chains end at it where the spectral radius is below 1. In brackets: the share of the "
        "chains that these points attract."
    )
    rows: list[tuple[str, ...]] = []
    for i, seed in enumerate(seeds(settings)):
        each = [of_loss[i] for of_loss in found.values()]
        rows.append((str(seed), *(f"{one.n_attracting} of {len(data)} ({sum(one.held):.3f})" for one in each)))
    report.table(("seed", *found), rows)
    report.text(" ".join(_summary(title, of_loss, len(data)) for title, of_loss in found.items()))
    report.text(f"Seed {settings.seed}, point by point:")
    shown = [found[title][0] for title in (OURS, PUBLISHED)]
    columns = [f"{title}: {what}" for title in (OURS, PUBLISHED) for what in ("spectral radius", "share attracted")]
    rows = []
    for i, point in enumerate(data.data.tolist()):
        cells = [f"{one.radii[i]:.2f}" if radius else f"{one.held[i]:.3f}" for one in shown for radius in (True, False)]
        rows.append((point_name(point), *cells))
    report.table(("training point", *columns), rows)
    report.record(losses={title: _facts(of_loss) for title, of_loss in found.items()}, seeds=seeds(settings))


def _summary(title: str, of_loss: Sequence[Found], n_points: int) -> str:
    """One sentence on a loss over the seeds."""
    counts = [one.n_attracting for one in of_loss]
    least, most = min(counts), max(counts)
    reach = f"{least}" if least == most else f"{least} to {most}"
    return (
        f"With {title} {reach} of {n_points} points attract; all {n_points} do with "
        f"{sum(count == n_points for count in counts)} of {len(counts)} seeds."
    )


def _facts(of_loss: Sequence[Found]) -> dict[str, Any]:
    recipe = {name: of_loss[0].made.checkpoint.card.recipe[name] for name in asdict(PUBLISHED_POINTS_RECIPE)}
    return {
        "recipe": recipe,
        "n_attracting": [one.n_attracting for one in of_loss],
        "held": [one.held for one in of_loss],
        "radii": [one.radii for one in of_loss],
    }
