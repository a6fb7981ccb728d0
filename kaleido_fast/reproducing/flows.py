"""What a flow shows: the way from noise to a sample, and how good samples are for their steps and for its training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from kaleido_fast.checkpoint import Checkpoint
from kaleido_fast.evaluating.diagnostics import evenly
from kaleido_fast.evaluating.scorer import Scorer, SetScores
from kaleido_fast.names import DEFAULT_STEPS
from kaleido_fast.presets import TrainingRecipe
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.reproducing.images import (
    COLUMNS,
    EXAMPLES,
    FEW_MOVED,
    GIF_COLOURS,
    LARGE,
    MOVED,
    MOVED_FRAMES,
    N_CHAINS,
    SHEET_WIDTH,
    STRIP_CHAINS,
    ShownModel,
    score_cells,
    show_model,
    show_wanderers,
)
from kaleido_fast.reproducing.models import Trained, trained
from kaleido_fast.reproducing.report import Report
from kaleido_fast.reproducing.settings import Settings
from kaleido_fast.sampling import fast_sample
from kaleido_fast.showing.animation import enlarged, make_frames, strip, write_gif
from kaleido_fast.showing.pictures import image_grid
from kaleido_fast.showing.plots import new_figure
from kaleido_fast.showing.states import sample_shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

STRIP_STATES = 14
FRAMES_OF_NOISE = 11  # of large pictures: all but the last states are noisy, and hardly compress
NOISE_SHARES = (0.9, 0.5, 0.1)  # of examples that one evaluation makes something of
STEPS = (2, 3, 5, 10, 20, 50, 100, 200)
TRAINING_SHARES = (0.125, 0.25, 0.5)  # of the steps of the recipe


def show_any(settings: Settings, report: Report, shown: ShownModel, held_out: Dataset, slug: str) -> None:
    """Pictures of one model, as they fit the sampler that its samples are drawn with; see `show_model`."""
    if shown.sampler == "flow":
        show_flow(settings, report, shown, slug)
    else:
        show_model(settings, report, shown, slug)
        show_wanderers(settings, report, shown, held_out, slug)


def show_flow(settings: Settings, report: Report, shown: ShownModel, slug: str) -> None:
    """Pictures of one flow: what it makes of noisy examples, the same chains over the steps of a draw, an animation.

    Args:
        settings: seed and device.
        report: where they go.
        shown: the model to show.
        slug: what their file names begin with.
    """
    report.heading(shown.title)
    shares = ", ".join(f"{share:g}" for share in NOISE_SHARES)
    report.picture(
        f"{slug}-denoised",
        _denoised(shown, settings.seed),
        f"Training examples (top row); the same with {shares} of noise, and below each what one evaluation makes of it",
    )
    options: dict[str, Any] = {"seed": settings.seed, "device": settings.device, **shown.sampling}
    n_steps = int(shown.sampling.get("steps", shown.checkpoint.card.sampling.get("steps", DEFAULT_STEPS)))
    last = STRIP_STATES - 1
    stations = tuple(sorted({round(n_steps * i / last) for i in range(STRIP_STATES)}))
    still = sample_shown(shown.checkpoint, n_chains=STRIP_CHAINS, steps=stations, **options)
    report.picture(
        f"{slug}-steps", strip(still), "The same chains over the steps of a draw: noise, then parts of the way"
    )
    large = shown.checkpoint.model.spec.dim >= LARGE
    moving = sample_shown(
        shown.checkpoint,
        n_chains=FEW_MOVED if large else MOVED,
        most_frames=FRAMES_OF_NOISE if large else MOVED_FRAMES,
        **options,
    )
    with report.file(f"{slug}-chains.gif", f"{len(moving.states)} chains over the {n_steps} steps of a draw") as path:
        write_gif(make_frames(moving), path, frames_per_second=4, colours=GIF_COLOURS)


def _denoised(shown: ShownModel, seed: int) -> Image.Image:
    """Examples; then for each share u the inputs (1 - u) x + u n of the training, and f of them."""
    model, scaling = shown.checkpoint.model, shown.checkpoint.card.scaling
    middle, half = (model.spec.low + model.spec.high) / 2, (model.spec.high - model.spec.low) / 2
    examples = evenly(shown.train.data, EXAMPLES)
    noise = middle + half * torch.randn(examples.shape, generator=torch.Generator().manual_seed(seed))
    rows = [examples]
    with torch.no_grad():
        for share in NOISE_SHARES:
            noisy = (1 - share) * examples + share * noise
            rows += [noisy, model(noisy)]
    sheet = image_grid(torch.cat(rows), model.spec, scaling, columns=len(examples))
    return enlarged(sheet, SHEET_WIDTH)


@dataclass(frozen=True)
class Point:
    """How good samples are at one place of a curve.

    Args:
        x: steps of a draw, or seconds of training.
        scores: of the samples.
    """

    x: float
    scores: SetScores

    def to_dict(self) -> dict[str, Any]:
        """Plain values for report.json."""
        return {"x": self.x, **asdict(self.scores)}


def against_steps(settings: Settings, checkpoint: Checkpoint, scorer: Scorer) -> list[Point]:
    """Scores of samples of the flow in `STEPS` steps a draw, from the same starts."""
    settings.tell(f"measuring draws of {STEPS[0]} to {STEPS[-1]} steps")
    return [Point(steps, _scores(settings, checkpoint, scorer, steps=steps)) for steps in STEPS]


def against_time(
    settings: Settings, name: str, dataset: Dataset, made: Trained, recipe: TrainingRecipe, scorer: Scorer
) -> list[Point]:
    """Scores of flows that were trained for parts of the steps, each with its whole schedule, and of the one given.

    Args:
        settings: seed, device, cache and sizes.
        name: of the model given, in the cache.
        dataset, made, recipe: what it was trained on, the model and its recipe.
        scorer: what samples are measured against.
    """
    card = made.checkpoint.card
    points = []
    for share in TRAINING_SHARES:
        steps = max(1, round(share * made.steps))
        shorter = trained(
            replace(settings, steps=None),
            f"{name}-{steps}",
            dataset,
            made.checkpoint.model.spec,
            replace(recipe, steps=steps, seconds=0.0, warmup=min(recipe.warmup, steps)),
            sampling=card.sampling,
        )
        points.append(Point(shorter.seconds, _scores(settings, shorter.checkpoint, scorer)))
    return [*points, Point(made.seconds, _scores(settings, made.checkpoint, scorer))]


def _scores(settings: Settings, checkpoint: Checkpoint, scorer: Scorer, **options: Any) -> SetScores:
    n_chains = settings.n_chains or N_CHAINS
    result = fast_sample(
        checkpoint, n_chains=n_chains, sampler="flow", seed=settings.seed, device=settings.device, **options
    )
    return scorer.score(result.final.cpu().float())


def report_curve(report: Report, name: str, points: Sequence[Point], real: SetScores, *, x: str, caption: str) -> None:
    """A table of the points, and a picture of them with real data's own as a dotted line.

    Args:
        report: where they go.
        name: of the picture.
        points: at least one.
        real: scores of real data in the place of samples.
        x: what ``Point.x`` is.
        caption: of the picture.
    """
    rows = [(f"{point.x:,.0f}", *score_cells(point.scores)) for point in points]
    report.table((x, *COLUMNS[1:-1]), [*rows, ("real data", *score_cells(real))])
    report.picture(name, draw_curves(points, real, x), caption)


PANELS: tuple[tuple[str, Callable[[SetScores], float | None]], ...] = (
    ("Fréchet distance", lambda scores: scores.frechet),
    ("precision", lambda scores: scores.precision),
    ("coverage", lambda scores: scores.coverage),
    ("class entropy", lambda scores: scores.entropy),
    ("nearest example", lambda scores: None if scores.nearest is None else scores.nearest["50%"]),
    ("authentic", lambda scores: scores.authentic),
)


def draw_curves(points: Sequence[Point], real: SetScores, x: str) -> Figure:
    """A panel for each measure over a logarithmic axis; one that was not measured stays empty."""
    figure = new_figure(9.6, 4.6)
    for axes, (title, value) in zip(figure.subplots(2, 3).ravel(), PANELS, strict=True):
        known = [(point.x, found) for point in points if (found := value(point.scores)) is not None]
        axes.set_title(title, fontsize=9)
        if not known:
            axes.axis("off")
            continue
        axes.plot(*zip(*known, strict=True), color="tab:blue", marker="o", markersize=3, label="samples")
        ceiling = value(real)
        if ceiling is not None:
            axes.axhline(ceiling, color="0.4", linestyle=":", label="real data")
        axes.set_xscale("log")
        if title == "Fréchet distance":
            axes.set_yscale("log")
        axes.tick_params(labelsize=7)
    figure.supxlabel(x, fontsize=9)
    handles, labels = figure.axes[1].get_legend_handles_labels()  # of precision, which all samples have
    figure.legend(handles, labels, frameon=False, loc="outside upper right", ncols=2, fontsize=8)
    return figure
