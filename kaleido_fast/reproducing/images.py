"""What the kaleidoscopes of pictures share: strips, sheets, animations, and the table that compares recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kaleido_fast.checkpoint import Checkpoint
from kaleido_fast.evaluating.classifier import Trees
from kaleido_fast.evaluating.diagnostics import evenly
from kaleido_fast.evaluating.evaluation import REAL, SAMPLES, Evaluation, evaluate
from kaleido_fast.evaluating.feature_distance import distance_words
from kaleido_fast.evaluating.reference import Reference
from kaleido_fast.evaluating.scorer import SetScores
from kaleido_fast.evaluating.sheet import look_sheet
from kaleido_fast.names import DEFAULT_SETTLE
from kaleido_fast.planning.jitter import run_words
from kaleido_fast.planning.request import Trace
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.reproducing.report import Report
from kaleido_fast.reproducing.settings import Settings
from kaleido_fast.sampling import fast_sample
from kaleido_fast.showing.animation import enlarged, make_frames, strip, write_gif
from kaleido_fast.showing.page import write_page
from kaleido_fast.showing.pictures import image_grid
from kaleido_fast.showing.states import Shown, chosen_sampler, sample_shown

N_CHAINS = 1000
STRIP_CHAINS = 10
STRIP_STEPS = (0, 1, 2, *range(5, 14), 50, 300)
SHEET = 120
SHEET_WIDTH = 1160  # pixels, at most
MOVED, MOVED_FRAMES = 24, 20  # chains and frames of animations of small pictures
LARGE = 400  # values of a picture from which on there are fewer of both: noise hardly compresses
FEW_MOVED, FEW_FRAMES = 15, 13
GIF_COLOURS = 32
EXAMPLES = 14
SEARCHED = 400  # chains among which those are looked for that change their class most often
WANDERERS = 10
STATIONS = 14  # clean states of a wandering chain
SURE = 0.4  # share of the trees' votes from which on a state counts as one of a class


@dataclass(frozen=True)
class ShownModel:
    """A model that is shown.

    Args:
        title: heading, and name in tables.
        checkpoint: the model.
        train: what it was trained on.
        sampling: options of `fast_sample` that its samples are drawn with; empty for what its card recommends.
    """

    title: str
    checkpoint: Checkpoint
    train: Dataset
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def sampler(self) -> str:
        """The sampler that its samples are drawn with."""
        return chosen_sampler(self.checkpoint, self.sampling)

    @property
    def recommended_jitter(self) -> float:
        """The jitter that the model's card recommends."""
        return float(self.checkpoint.card.sampling.get("jitter", 0.0))


def show_model(settings: Settings, report: Report, shown: ShownModel, slug: str) -> None:
    """Pictures of one model: recovered examples, the same chains over the steps, samples, an animation.

    Args:
        settings: seed, device and sizes.
        report: where they go.
        shown: the model to show.
        slug: what their file names begin with.
    """
    report.heading(shown.title)
    report.picture(
        f"{slug}-recovered",
        _recovered(shown),
        "Training examples (top row), what one step makes of them, and where 300 steps take them",
    )
    still = sample_shown(
        shown.checkpoint,
        n_chains=STRIP_CHAINS,
        n_steps=max(STRIP_STEPS),
        steps=STRIP_STEPS,
        jitter=0.0,
        seed=settings.seed,
        device=settings.device,
    )
    report.picture(f"{slug}-steps", strip(still), "The same chains over the steps, without jitter: noise, then burn-in")
    large = shown.checkpoint.model.spec.dim >= LARGE
    moving = sample_shown(
        shown.checkpoint,
        n_chains=FEW_MOVED if large else MOVED,
        n_steps=60,
        most_frames=FEW_FRAMES if large else MOVED_FRAMES,
        seed=settings.seed,
        device=settings.device,
        **_noise_of(shown),
    )
    with report.file(f"{slug}-chains.gif", f"{len(moving.states)} chains over {_noise_words(shown)}") as path:
        write_gif(make_frames(moving), path, frames_per_second=4, colours=GIF_COLOURS)


def _noise_of(shown: ShownModel) -> dict[str, Any]:
    """The noise that a contestant is sampled with, as options of `fast_sample`."""
    jitter = shown.sampling.get("jitter", shown.recommended_jitter)
    return {"jitter": jitter, "noise": shown.sampling.get("noise", "normal")}


def _noise_words(shown: ShownModel) -> str:
    settle = int(shown.checkpoint.card.sampling.get("settle", DEFAULT_SETTLE))
    return run_words({"burn_in": 59, "n_draws": 1, "thin": 1, "settle": settle, **_noise_of(shown)})


def _recovered(shown: ShownModel) -> Any:
    """Examples, f(x), f^300(x) as three rows."""
    model = shown.checkpoint.model
    rows = [evenly(shown.train.data, EXAMPLES)]
    with torch.no_grad():
        rows.append(model(rows[0]))
        state = rows[1]
        for _ in range(299):
            state = model(state)
    columns = len(rows[0])
    sheet = image_grid(torch.cat([*rows, state]), model.spec, shown.checkpoint.card.scaling, columns=columns)
    return enlarged(sheet, SHEET_WIDTH)


def show_wanderers(settings: Settings, report: Report, shown: ShownModel, held_out: Dataset, slug: str) -> None:
    """Single chains with jitter: those that pass through the most classes; nothing for a model without jitter."""
    if not shown.recommended_jitter:
        return
    card, spec = shown.checkpoint.card, shown.checkpoint.model.spec
    thin = int(card.sampling.get("settle", 2)) + 4
    searched = min(SEARCHED, settings.n_chains or SEARCHED)
    result = fast_sample(
        shown.checkpoint,
        n_chains=searched,
        burn_in=0,
        n_draws=STATIONS,
        thin=thin,
        seed=settings.seed,
        device=settings.device,
        trace=Trace(tuple(range(searched)), (0,)),
    )
    assert result.trace is not None
    draws = result.draws.cpu().float()
    chosen = _most_varied(draws, held_out)
    states = torch.cat([result.trace.cpu().float(), draws], dim=1)[chosen]
    steps = tuple(range(0, (STATIONS + 1) * thin, thin))
    report.picture(
        f"{slug}-wanderers",
        strip(Shown(states, steps, spec, card.scaling)),
        f"Single chains with jitter {shown.recommended_jitter:g}, seen after clean steps: the {len(chosen)} of "
        f"{searched} that pass through the most classes",
    )
    wandering = sample_shown(
        shown.checkpoint,
        n_chains=FEW_MOVED if spec.dim >= LARGE else MOVED,
        n_steps=60,
        most_frames=MOVED_FRAMES,
        seed=settings.seed,
        device=settings.device,
    )
    with report.file(f"{slug}-chains.html", "A page with a slider over the steps; click a chain", show=False) as path:
        write_page(wandering, path, f"{report.title}: chains over the steps")


def _most_varied(draws: Tensor, held_out: Dataset) -> Tensor:
    """Chains of draws (n, k, D) that show the most classes, (m,); the first ones where there are no labels."""
    if held_out.labels is None:
        return torch.arange(min(WANDERERS, len(draws)))
    trees = Trees(held_out.data, held_out.labels)
    places, sure = (part.view(draws.shape[:2]) for part in trees.predict(draws.flatten(0, 1)))
    seen = torch.zeros(len(draws), len(trees.classes), dtype=torch.bool)
    seen.scatter_(1, torch.where(sure > SURE, places, places[:, -1:]), True)
    return seen.sum(dim=1).argsort(descending=True, stable=True)[:WANDERERS]


def measure(settings: Settings, shown: ShownModel, held_out: Dataset) -> Evaluation:
    """Scores of a model's samples against examples that no contestant has seen."""
    settings.tell(f"measuring: {shown.title}")
    n_chains = settings.n_chains or N_CHAINS
    reference = Reference(shown.train, held_out)
    return evaluate(
        shown.checkpoint,
        reference,
        n_chains=n_chains,
        sampling=shown.sampling,
        seed=settings.seed,
        device=settings.device,
    )


def sample_sheets(report: Report, shown: ShownModel, found: Evaluation, slug: str) -> None:
    """Samples as they were measured, and the nearest training example below each."""
    spec, scaling = shown.checkpoint.model.spec, shown.checkpoint.card.scaling
    report.picture(
        f"{slug}-samples",
        enlarged(image_grid(found.samples[:SHEET], spec, scaling, columns=20), SHEET_WIDTH),
        f"Samples after {run_words(found.runs[SAMPLES])}, not chosen: chains 0 to {min(SHEET, len(found.samples)) - 1}",
    )
    sheet = look_sheet(found.samples, shown.train.data, spec, scaling)
    caption = "Samples, and below each row of them the nearest training examples"
    report.picture(f"{slug}-nearest", enlarged(sheet, SHEET_WIDTH), caption)


COLUMNS = (
    "samples",
    "coverage",
    "precision",
    "density",
    "class entropy",
    "Fréchet distance",
    "nearest example",
    "authentic",
    "copying z",
    "blank or blob",
    "fixed points",
)


def score_table(report: Report, found: Sequence[tuple[ShownModel, Evaluation]]) -> None:
    """The table: every contestant as it was sampled, and real data as the ceiling."""
    rows = []
    for shown, scores in found:
        for name, run in scores.runs.items():
            rests = run["sampler"] != "flow" and not run["jitter"]
            fixed = f"{run['outcome_shares']['fixed_point']:.3f}" if rests else "-"
            rows.append((f"{shown.title}: {run_words(run)}", *score_cells(scores.sets[name]), fixed))
    last = found[-1][1]
    if REAL in last.sets:
        rows.append(("training examples themselves", *score_cells(last.sets[REAL]), "-"))
    report.table(COLUMNS, rows)
    first = found[0][1]
    if last.frechet is not None:
        real = last.sets.get(REAL)
        report.text(
            f"{distance_words(last.frechet, None if real is None else real.frechet_range)}. Copies drive it down: read "
            "it beside the nearest example, the authentic share (samples that are no copies of the nearest "
            "example) and the copying test (below -3 copies), which in the last row are those of held-out examples."
        )
    report.text(
        f"Against {first.n_compared} {first.compared_with}, k = {first.k} neighbours. The nearest example is the "
        "median of the mean squared difference to the nearest training example, in squared units of half the data "
        "range: below 0.02 is a copy; in the last row it is that of held-out examples. Blank or blob: less or more ink "
        "than any training example. Coverage, class entropy and the distance are to be read together: a blur wins "
        "precision and density, copies win the distance."
    )


def score_cells(scores: SetScores) -> tuple[str, ...]:
    """Scores as they stand in a table, below all of `COLUMNS` but the first and the last."""

    def text(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    unusual = None if scores.blank is None or scores.blob is None else scores.blank + scores.blob
    near = None if scores.nearest is None else scores.nearest["50%"]
    shares = (scores.coverage, scores.precision, scores.density, scores.entropy)
    copies = "-" if scores.copying_z is None else f"{scores.copying_z:+.1f}"
    novelty = (text(scores.frechet), text(near, 3), text(scores.authentic), copies)
    return (*map(text, shares), *novelty, text(unusual, 3))
