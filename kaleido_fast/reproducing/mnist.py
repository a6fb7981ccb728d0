"""The MNIST kaleidoscope by three recipes at equal training time: the published one, attractors, and a flow."""

from __future__ import annotations

from dataclasses import asdict, replace

from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.diagnostics import evenly
from kaleido_fast.evaluating.evaluation import (
    LONG_BURN_IN,
    N_COMPARED,
    REAL,
    SAMPLES,
    WITHOUT_JITTER,
    Evaluation,
    also_sampled,
)
from kaleido_fast.evaluating.reference import Reference
from kaleido_fast.evaluating.scorer import Scorer
from kaleido_fast.model import ModelSpec
from kaleido_fast.names import PUBLISHED_EPS, PUBLISHED_RUNS
from kaleido_fast.presets import NETWORKS, PUBLISHED_RECIPE, PUBLISHED_SAMPLING, Preset, TrainingRecipe, find_preset
from kaleido_fast.reading.datasets import Dataset, built_in, load_dataset
from kaleido_fast.reproducing.between import show_between
from kaleido_fast.reproducing.flows import against_steps, against_time, report_curve, show_any
from kaleido_fast.reproducing.images import (
    N_CHAINS,
    SHEET,
    SHEET_WIDTH,
    ShownModel,
    measure,
    sample_sheets,
    score_table,
)
from kaleido_fast.reproducing.models import Trained, network_spec, trained, trained_for, trained_within
from kaleido_fast.reproducing.report import Report
from kaleido_fast.reproducing.settings import Settings
from kaleido_fast.sampling import fast_sample
from kaleido_fast.showing.animation import enlarged
from kaleido_fast.showing.pictures import image_grid

SHORT = "short, without noise"
HELD_OUT = 2000  # examples that no model sees
HELD_SHARE = 5  # of fewer examples, one in this many is kept back
PUBLISHED, ATTRACTORS, FLOW = "published", "attractors", "flow"  # also what file names begin with


def run(settings: Settings, report: Report) -> None:
    """Train all, sample, and write the report; see `kaleido_fast.reproducing.reproduction.reproduce`."""
    attracting, flowing = find_preset("mnist", ATTRACTORS), find_preset("mnist")
    rest, held_out = _load(settings, network_spec(flowing.network))
    few = evenly_taken(rest, attracting.limit)
    flow_recipe = _fitting(flowing.recipe, rest)
    made = _train(settings, rest, few, attracting, replace(flowing, recipe=flow_recipe))
    contestants = {
        PUBLISHED: ShownModel("Published recipe", made[PUBLISHED].checkpoint, rest, PUBLISHED_SAMPLING),
        ATTRACTORS: ShownModel("Attractors", made[ATTRACTORS].checkpoint, few),
        FLOW: ShownModel("Flow", made[FLOW].checkpoint, rest),
    }
    found = {slug: measure(settings, shown, held_out) for slug, shown in contestants.items()}
    found[PUBLISHED] = _without_noise(settings, contestants[PUBLISHED], found[PUBLISHED], held_out)
    report.text(_story(made, len(few), len(rest)))
    report.heading("Measured")
    score_table(report, [(contestants[slug], scores) for slug, scores in found.items()])
    report.text(_as_published(found[PUBLISHED]))
    report.text(_stability([(contestants[slug].title, scores.stable_share) for slug, scores in found.items()]))
    for slug, shown in contestants.items():
        show_any(settings, report, shown, held_out, slug)
        sample_sheets(report, shown, found[slug], slug)
        show_between(settings, report, shown, slug)
        if shown.sampling:
            _long_run_sheet(settings, report, shown, slug)
    _curves(settings, report, rest, held_out, made[FLOW], flow_recipe, found[FLOW])
    report.record(
        training_seconds={slug: trained.seconds for slug, trained in made.items()},
        training_steps={slug: trained.steps for slug, trained in made.items()},
        evaluations={slug: scores.to_dict() for slug, scores in found.items()},
        recipes={PUBLISHED: asdict(PUBLISHED_RECIPE), ATTRACTORS: asdict(attracting.recipe), FLOW: asdict(flow_recipe)},
        seed=settings.seed,
    )


def _fitting(recipe: TrainingRecipe, data: Dataset) -> TrainingRecipe:
    """A recipe that holds out no more than one of `HELD_SHARE` examples."""
    return replace(recipe, held_out=min(recipe.held_out, len(data) // HELD_SHARE))


def _train(settings: Settings, rest: Dataset, few: Dataset, attracting: Preset, flowing: Preset) -> dict[str, Trained]:
    """The three models: the flow by its recipe, the others for as long as that took."""
    flow = trained(
        settings, "mnist-flow", rest, network_spec(flowing.network), flowing.recipe, sampling=flowing.sampling
    )
    published = trained_for(
        settings, "mnist-published", rest, network_spec(NETWORKS["mnist"]), PUBLISHED_RECIPE, seconds=flow.seconds
    )
    attractors = trained_within(
        settings,
        "mnist-attractors",
        few,
        network_spec(attracting.network),
        attracting.recipe,
        seconds=flow.seconds,
        sampling=attracting.sampling,
    )
    return {PUBLISHED: published, ATTRACTORS: attractors, FLOW: flow}


def _curves(
    settings: Settings,
    report: Report,
    rest: Dataset,
    held_out: Dataset,
    made: Trained,
    recipe: TrainingRecipe,
    found: Evaluation,
) -> None:
    """How good the flow's samples are for their steps, and for the time of training."""
    scorer = Scorer.of(Reference(rest, held_out), made.checkpoint.model.spec, N_COMPARED, found.k, settings.seed, None)
    by_steps = against_steps(settings, made.checkpoint, scorer)
    by_time = against_time(settings, "mnist-flow", rest, made, recipe, scorer)
    real = found.sets[REAL]
    report.heading("More steps, more training")
    report.text(
        "The same starts, taken to samples in more or fewer steps by the flow above. A step is one evaluation of the "
        "network."
    )
    report_curve(report, "flow-by-steps", by_steps, real, x="steps", caption="Quality against steps of a draw")
    report.text(
        f"Trainings of the flow for parts of its steps, each with a whole schedule of the learning rate; seconds of "
        f"{made.clock}."
    )
    report_curve(report, "flow-by-training", by_time, real, x="seconds", caption="Quality against training time")
    report.record(
        by_steps=[point.to_dict() for point in by_steps],
        by_training=[point.to_dict() for point in by_time],
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


def _story(made: dict[str, Trained], n_few: int, n_rest: int) -> str:
    cards = {slug: trained.checkpoint.card.recipe for slug, trained in made.items()}
    flow, attractors = cards[FLOW], cards[ATTRACTORS]
    seconds = ", ".join(f"{slug} {trained.seconds:.0f} s" for slug, trained in made.items())
    widths = {slug: _widths(trained.checkpoint.model.spec) for slug, trained in made.items()}
    return (
        f"Three recipes, each trained for about the same time ({seconds}; {made[FLOW].clock}); no network sees the "
        f"held-out digits.\n\n"
        f"* **Published**: {widths[PUBLISHED]}, plain reconstruction error: Adam, learning rate 1e-4, batches of 1,000 "
        f"out of {n_rest:,} digits, {made[PUBLISHED].steps:,} steps in that time (it asks for "
        f"{PUBLISHED_RECIPE.steps:,}).\n"
        f"* **Attractors**: {widths[ATTRACTORS]}, moves each of {n_few:,} digits up to {attractors['pair_mix']:.0%} of "
        f"the way towards another, adds noise of {attractors['noise']:g}, and asks for the clean digit: "
        f"{made[ATTRACTORS].steps:,} steps, batches of {attractors['batch_size']}. Chains end at the digits it saw.\n"
        f"* **Flow**: {widths[FLOW]}, replaces shares from 0 to 1 of each of {n_rest:,} digits by noise, and asks for "
        f"the clean digit: {made[FLOW].steps:,} steps, batches of {flow['batch_size']}; {flow['held_out']:,} of them "
        "choose the best weights instead. A sample is reached from noise in parts of the way."
    )


def _widths(spec: ModelSpec) -> str:
    """Such as 784-500x10-784 with relu, for hidden layers of one width."""
    first, *hidden, last = spec.widths
    inner = f"{hidden[0]}x{len(hidden)}" if len(set(hidden)) == 1 else "-".join(map(str, hidden))
    return f"{first}-{inner}-{last} with {spec.activation}"


def _stability(shares: list[tuple[str, float | None]]) -> str:
    known = "; ".join(f"{title}: {share:.0%}" for title, share in shares if share is not None)
    return (
        f"Training examples that are stable attractors, to which chains near them return: {known}. A flow is not "
        "judged by them."
    )
