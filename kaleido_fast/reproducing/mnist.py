"""The MNIST kaleidoscope: 784-500x10-784, tanh; the published recipe and ours at equal training time."""

from __future__ import annotations

from dataclasses import asdict

from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.diagnostics import evenly
from kaleido_fast.evaluating.evaluation import LONG_BURN_IN, SAMPLES, WITHOUT_JITTER, Evaluation, also_sampled
from kaleido_fast.evaluating.reference import Reference
from kaleido_fast.model import ModelSpec
from kaleido_fast.names import PUBLISHED_EPS, PUBLISHED_RUNS
from kaleido_fast.presets import NETWORKS, PUBLISHED_RECIPE, PUBLISHED_SAMPLING, find_preset
from kaleido_fast.reading.datasets import Dataset, built_in, load_dataset
from kaleido_fast.reproducing.images import (
    N_CHAINS,
    SHEET,
    SHEET_WIDTH,
    ShownModel,
    measure,
    sample_sheets,
    score_table,
    show_model,
    show_wanderers,
)
from kaleido_fast.reproducing.models import Trained, network_spec, trained, trained_for
from kaleido_fast.reproducing.report import Report
from kaleido_fast.reproducing.settings import Settings
from kaleido_fast.sampling import fast_sample
from kaleido_fast.showing.animation import enlarged
from kaleido_fast.showing.pictures import image_grid

SHORT = "short, without noise"
HELD_OUT = 2000  # examples that neither model sees
HELD_SHARE = 5  # of fewer examples, one in this many is kept back


def run(settings: Settings, report: Report) -> None:
    """Train both, sample, and write the report; see `kaleido_fast.reproducing.reproduction.reproduce`."""
    spec, preset = network_spec(NETWORKS["mnist"]), find_preset("mnist", "attractors")
    rest, held_out = _load(settings, spec)
    few = evenly_taken(rest, preset.limit)
    ours = trained(settings, "mnist", few, network_spec(preset.network), preset.recipe, sampling=preset.sampling)
    published = trained_for(settings, "mnist-published", rest, spec, PUBLISHED_RECIPE, seconds=ours.seconds)
    contestants = (
        ShownModel("Published recipe", published.checkpoint, rest, PUBLISHED_SAMPLING),
        ShownModel("Our recipe", ours.checkpoint, few),
    )
    found = [(shown, measure(settings, shown, held_out)) for shown in contestants]
    found[0] = (contestants[0], _without_noise(settings, *found[0], held_out))
    report.text(_story(ours, published, len(few), len(rest)))
    report.heading("Measured")
    score_table(report, found)
    report.text(_as_published(found[0][1]))
    report.text(_stability([(shown.title, scores.stable_share) for shown, scores in found]))
    for (shown, scores), slug in zip(found, ("published", "ours"), strict=True):
        show_model(settings, report, shown, slug)
        sample_sheets(report, shown, scores, slug)
        if shown.sampling:
            _long_run_sheet(settings, report, shown, slug)
        show_wanderers(settings, report, shown, held_out, slug)
    report.record(
        training_seconds={"ours": ours.seconds, "published": published.seconds},
        training_steps={"ours": preset.recipe.steps, "published": published.checkpoint.card.recipe["steps"]},
        evaluations={slug: scores.to_dict() for (_, scores), slug in zip(found, ("published", "ours"), strict=True)},
        recipes={"ours": asdict(preset.recipe), "published": asdict(PUBLISHED_RECIPE)},
        seed=settings.seed,
    )


def _without_noise(settings: Settings, shown: ShownModel, found: Evaluation, held_out: Dataset) -> Evaluation:
    """The evaluation, with as many steps as the published sampler makes but without its noise."""
    return also_sampled(
        found,
        shown.checkpoint,
        Reference(shown.train, held_out),
        SHORT,
        n_chains=settings.n_chains or N_CHAINS,
        seed=settings.seed,
        burn_in=PUBLISHED_SAMPLING["burn_in"],
        jitter=0.0,
        device=settings.device,
    )


def _long_run_sheet(settings: Settings, report: Report, shown: ShownModel, slug: str) -> None:
    """The same chains as on the sheet of samples, 300 steps without noise."""
    result = fast_sample(
        shown.checkpoint,
        n_chains=SHEET,
        burn_in=LONG_BURN_IN,
        jitter=0.0,
        seed=settings.seed,
        device=settings.device,
    )
    sheet = image_grid(result.final.cpu(), shown.checkpoint.model.spec, shown.checkpoint.card.scaling, columns=20)
    report.picture(f"{slug}-settled", enlarged(sheet, SHEET_WIDTH), "The same chains after 300 steps without noise")


def _as_published(found: Evaluation) -> str:
    """What noise and steps do to the published recipe, in one paragraph."""
    noisy, short, long = (found.sets[name].coverage or 0.0 for name in (SAMPLES, SHORT, WITHOUT_JITTER))
    return (
        f"The published code samples with {PUBLISHED_RUNS} steps and adds noise of {PUBLISHED_EPS:g} after each, also "
        f"the last one: that is the first row, coverage {noisy:.2f}. The same steps without noise: {short:.2f}; 300 "
        f"steps without noise: {long:.2f}."
    )


def evenly_taken(data: Dataset, n: int | None) -> Dataset:
    """``n`` examples spread evenly over the data, or all of them."""
    import torch

    return data if n is None or n >= len(data) else data.take(evenly(torch.arange(len(data)), n))


def _load(settings: Settings, spec: ModelSpec) -> tuple[Dataset, Dataset]:
    """What models may be trained on, and what is held out."""
    data = load_dataset(built_in("mnist") if settings.data is None else settings.data, bound=spec.bound)
    if data.sample_shape != spec.sample_shape:
        raise InputError(
            f"data {data.name} has examples of shape {data.sample_shape}, the MNIST kaleidoscope takes "
            f"{spec.sample_shape}: give such images"
        )
    rest, held_out = data.split(max(1, min(HELD_OUT, len(data) // HELD_SHARE)))
    assert held_out is not None
    return rest, held_out


def _story(ours: Trained, published: Trained, n_few: int, n_rest: int) -> str:
    recipe, steps = ours.checkpoint.card.recipe, published.checkpoint.card.recipe["steps"]
    return (
        f"One network, 784-500x10-784 with a tanh, trained twice for the same time ({published.seconds:.0f} s and "
        f"{ours.seconds:.0f} s: {ours.clock}). The published recipe minimises the plain reconstruction error: Adam, "
        f"learning rate 1e-4, batches of 1,000 out of {n_rest:,} digits, {steps:,} steps in that time (it asks for "
        f"{PUBLISHED_RECIPE.steps:,}). Ours moves each of {n_few:,} digits up to {recipe['pair_mix']:.0%} of the way "
        f"towards another, adds noise of {recipe['noise']:g}, and asks for the clean digit: {recipe['steps']:,} steps, "
        f"batches of {recipe['batch_size']}. Neither sees the held-out digits."
    )


def _stability(shares: list[tuple[str, float | None]]) -> str:
    known = "; ".join(f"{title}: {share:.0%}" for title, share in shares if share is not None)
    return f"Training examples that are stable attractors, to which chains near them return: {known}."
