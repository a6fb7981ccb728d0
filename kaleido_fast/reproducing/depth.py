"""Does depth help? Every measure of quality against the number of layers, at equal width and equal training loss.

The paper shows pictures and says that deeper networks over-generalise more. Here the 8 x 8 digits are learned by
networks of 2 to 16 layers, each stopped as soon as its loss is down to one and the same value, plainly as published and
with noise on the inputs, several seeds each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from kaleido_fast.checkpoint import Checkpoint, ModelCard, load_checkpoint
from kaleido_fast.evaluating.attractors import recovered
from kaleido_fast.evaluating.diagnostics import RADIUS_EXAMPLES, evenly, spectral_radii
from kaleido_fast.evaluating.reference import Reference
from kaleido_fast.evaluating.scorer import Scorer
from kaleido_fast.model import ModelSpec
from kaleido_fast.presets import TrainingRecipe
from kaleido_fast.reading.datasets import Dataset, built_in, load_dataset
from kaleido_fast.reproducing.depth_trends import MEASURES, RECOVERY_NOISE, Row, Treatment, draw, spread_text, trend
from kaleido_fast.reproducing.models import cached_path, keep
from kaleido_fast.reproducing.report import Report
from kaleido_fast.reproducing.settings import Settings
from kaleido_fast.sampling import fast_sample
from kaleido_fast.system.devices import resolve_device

DEPTHS = (2, 3, 4, 6, 8, 10, 12, 16)
DEEP = 6  # layers from which on trends are looked at a second time: does depth still help there?
N_SEEDS = 8
HIDDEN = 128
N_EXAMPLES = 100  # so few that networks of every depth can reach the loss asked for
N_COMPARED = 500
N_CHAINS = 1000
MAX_STEPS = 4000
SIGNIFICANT = 0.001  # of the p-value of a trend; some thirty trends are looked at


TREATMENTS = (
    Treatment("plain", "plain loss, as published", 0.0, 0.004, "tab:red"),
    Treatment("denoising", "denoising, noise 0.3", 0.3, 0.016, "tab:blue"),
)


def run(settings: Settings, report: Report) -> None:
    """Train, measure, and write the report; see `kaleido_fast.reproducing.reproduction.reproduce`."""
    rows = study(settings)
    matched = [row for row in rows if row["reached"]]
    report.text(_setting(settings, rows))
    report.heading("Found")
    report.text(_in_short(matched))
    trends = {
        (treatment.name, least): [trend(matched, treatment.name, measure.name, least) for measure in MEASURES]
        for treatment in TREATMENTS
        for least in (min(DEPTHS), DEEP)
    }
    for treatment in TREATMENTS:
        report.text(_finding(treatment, trends[treatment.name, min(DEPTHS)], trends[treatment.name, DEEP]))
    report.picture(
        "depth",
        draw(matched, TREATMENTS, DEPTHS),
        "Every number against the number of layers: mean over the seeds, bars of one standard deviation (of the "
        "residual: of its logarithm)",
    )
    report.heading("Trends")
    report.text(
        "Spearman's rank correlation with the number of layers, over all networks; in bold where p < "
        f"{SIGNIFICANT:g}. +1: rises with every layer, -1: falls, 0: no trend."
    )
    _trend_table(report, trends)
    for treatment in TREATMENTS:
        report.heading(f"By depth: {treatment.title}")
        _depth_table(report, [row for row in rows if row["treatment"] == treatment.name])
    report.record(
        rows=rows,
        trends=[
            {"treatment": name, "layers_from": least, "measure": measure.name, "rho": rho, "p": p}
            for (name, least), found in trends.items()
            for measure, (rho, p) in zip(MEASURES, found, strict=True)
        ],
        treatments=[asdict(treatment) for treatment in TREATMENTS],
        hidden=HIDDEN,
        n_examples=N_EXAMPLES,
        n_compared=N_COMPARED,
        n_chains=settings.n_chains or N_CHAINS,
        seed=settings.seed,
    )


def study(settings: Settings) -> list[Row]:
    """Train (or take from the cache) and measure every network: one row each."""
    digits = load_dataset(built_in("digits"))
    data = load_dataset(built_in("digits"), limit=N_EXAMPLES)
    seen = evenly_spaced(len(digits), N_EXAMPLES)
    reference = Reference(data, digits.take(seen.logical_not().nonzero()[:, 0]))
    scorer = Scorer.of(reference, _spec(2), N_COMPARED, 5, settings.seed, True)
    rows: list[Row] = []
    for treatment in TREATMENTS:
        for layers in DEPTHS:
            began = time.perf_counter()
            for seed in range(settings.seed, settings.seed + N_SEEDS):
                checkpoint = _trained(settings, treatment, data, layers, seed)
                rows.append(_measure(settings, treatment, checkpoint, data, scorer, seed))
            reached = sum(row["reached"] for row in rows[-N_SEEDS:])
            settings.tell(
                f"{treatment.name}, {layers} layers: {reached} of {N_SEEDS} networks reached the loss of "
                f"{treatment.loss:g}, {time.perf_counter() - began:.0f} s"
            )
    return rows


def evenly_spaced(n: int, m: int) -> Any:
    """Which of n examples `load_dataset` keeps with ``limit=m``: bool (n,)."""
    import torch

    kept = torch.zeros(n, dtype=torch.bool)
    kept[torch.arange(m) * n // m] = True
    return kept


def _spec(layers: int) -> ModelSpec:
    return ModelSpec((64, *[HIDDEN] * (layers - 1), 64), sample_shape=(8, 8))


def _trained(settings: Settings, treatment: Treatment, data: Dataset, layers: int, seed: int) -> Checkpoint:
    """A network whose loss has just come down to the treatment's, or that has made all steps without reaching it."""
    from kaleido_fast.training.run import TrainingRun

    recipe = TrainingRecipe(
        steps=settings.steps or MAX_STEPS,
        batch_size=N_EXAMPLES,
        learning_rate=1e-3,
        noise=treatment.noise,
        schedule="constant",
    )
    spec = _spec(layers)
    name = f"depth-{treatment.name}-{layers}"
    path = cached_path(settings, name, [data.sha256, spec.to_json(), asdict(recipe), seed, treatment.loss])
    if path.is_file():
        return load_checkpoint(path)
    run = TrainingRun(data, spec, recipe, seed, resolve_device(settings.device))
    while run.step < recipe.steps and not (run.history and run.history[-1].held_out <= treatment.loss):
        run.advance()
    card = ModelCard(
        name=name,
        recipe={**asdict(recipe), "seed": seed},
        dataset={"name": data.name, "sha256": data.sha256, "n_examples": len(data)},
        scaling=data.scaling,
        final_loss=run.history[-1].held_out,
        diagnostics={"training_steps": run.step},
    )
    return keep(path, run.model.cpu().eval(), card)


def _measure(
    settings: Settings, treatment: Treatment, checkpoint: Checkpoint, data: Dataset, scorer: Scorer, seed: int
) -> Row:
    """All numbers of one network; chains run 300 steps without jitter."""
    model, card = checkpoint.model, checkpoint.card
    result = fast_sample(
        checkpoint,
        n_chains=settings.n_chains or N_CHAINS,
        burn_in=299,
        jitter=0.0,
        tol=1e-4,
        seed=seed,
        device=settings.device,
    )
    scores = asdict(scorer.score(result.final.cpu().float()))
    back = [recovered(model, data.data, sigma, seed=seed, device=settings.device) for sigma in (0.0, RECOVERY_NOISE)]
    stable, again = (float(which.double().mean()) for which in back)
    assert card.final_loss is not None
    return {
        "treatment": treatment.name,
        "layers": len(model.spec.widths) - 1,
        "seed": seed,
        "loss": card.final_loss,
        "reached": card.final_loss <= treatment.loss,
        "training_steps": card.diagnostics["training_steps"],
        **{name: scores[name] for name in ("precision", "recall", "density", "coverage", "copying_z", "authentic")},
        **{name: scores[name] for name in ("entropy", "confidence")},
        "nearest": scores["nearest"]["50%"],
        **result.stats.outcome_shares,
        "steps": result.stats.steps_quantiles["50%"],
        "residual": result.stats.residual_quantiles["50%"],
        "stable": stable,
        "recovered": again,
        "spectral_radius": float(spectral_radii(model, evenly(data.data, RADIUS_EXAMPLES)).median()),
    }


def _setting(settings: Settings, rows: Sequence[Row]) -> str:
    reached = sum(row["reached"] for row in rows)
    losses = "; ".join(f"{treatment.title}: {treatment.loss:g}" for treatment in TREATMENTS)
    return (
        f"{N_EXAMPLES} of the 8 x 8 digits; networks 64-{HIDDEN}x(layers - 1)-64 with ReLU and tanh, Adam at 1e-3, "
        f"whole batches, Kaiming's initial weights, {N_SEEDS} seeds each. Each stops as soon as its training loss, the "
        f"mean squared error on training inputs, is down to one value ({losses}); {reached} of {len(rows)} got there "
        f"within {settings.steps or MAX_STEPS:,} steps, and only those count below. Samples: "
        f"{settings.n_chains or N_CHAINS:,} chains from uniform noise, 300 steps without jitter, "
        f"against {N_COMPARED} digits that were not trained on. "
        "docs/quality.md defines the numbers."
    )


def _in_short(rows: Sequence[Row]) -> str:
    """The two numbers that say most, at both ends of depth, and whether noise on the inputs does more than depth."""
    ends = {}
    for treatment in TREATMENTS:
        here = [row for row in rows if row["treatment"] == treatment.name]
        if not here:
            return "A way of training reached its loss with no network: there is nothing to compare."
        layers = sorted({row["layers"] for row in here})
        ends[treatment.name] = [[row for row in here if row["layers"] == end] for end in (layers[0], layers[-1])]

    def mean(name: str, end: int, measure: str) -> float:
        return fmean(row[measure] for row in ends[name][end])

    parts = [
        f"{treatment.title}, {shallow[0]['layers']} to {deep[0]['layers']} layers: coverage "
        f"{mean(treatment.name, 0, 'coverage'):.2f} to {mean(treatment.name, 1, 'coverage'):.2f}, stable training "
        f"examples {mean(treatment.name, 0, 'stable'):.0%} to {mean(treatment.name, 1, 'stable'):.0%}"
        for treatment, (shallow, deep) in zip(TREATMENTS, ends.values(), strict=True)
    ]
    plain, denoising = (treatment.name for treatment in TREATMENTS)
    more = mean(denoising, 0, "coverage") > mean(plain, 1, "coverage")
    return (
        f"At equal training loss: {'; '.join(parts)}. The shallowest networks trained with noise cover "
        f"{'more' if more else 'no more'} than the deepest ones trained without."
    )


def _finding(treatment: Treatment, overall: Sequence[tuple[float, float]], deep: Sequence[tuple[float, float]]) -> str:
    """What the trends say, whichever way they fall."""

    def titles(trends: Sequence[tuple[float, float]], sign: int) -> list[str]:
        judged = zip(MEASURES, trends, strict=True)
        return [m.title for m, (rho, p) in judged if p < SIGNIFICANT and rho * m.better * sign > 0]

    def words(names: list[str]) -> str:
        return ", ".join(names) if names else "nothing"

    flat = [m.title for m, (_, p) in zip(MEASURES, overall, strict=True) if m.better and p >= SIGNIFICANT]
    better, worse = words(titles(overall, 1)), words(titles(overall, -1))
    deep_better, deep_worse = words(titles(deep, 1)), words(titles(deep, -1))
    return (
        f"**{treatment.title}.** Better with more layers: {better}. Worse: {worse}. No clear trend: {words(flat)}. "
        f"From {DEEP} layers on, better: {deep_better}; worse: {deep_worse}."
    )


def _trend_table(report: Report, trends: dict[tuple[str, int], list[tuple[float, float]]]) -> None:
    signs = {1: "more", -1: "less", 0: "depends"}

    def cell(pair: tuple[float, float]) -> str:
        return f"**{pair[0]:+.2f}**" if pair[1] < SIGNIFICANT else f"{pair[0]:+.2f}"

    heads = [
        f"{treatment.name}, {'all' if least == min(DEPTHS) else f'{least} layers and more'}"
        for treatment in TREATMENTS
        for least in (min(DEPTHS), DEEP)
    ]
    found = [trends[treatment.name, least] for treatment in TREATMENTS for least in (min(DEPTHS), DEEP)]
    report.table(
        ("number", "better is", *heads),
        [
            (measure.title, signs[measure.better], *(cell(column[i]) for column in found))
            for i, measure in enumerate(MEASURES)
        ],
    )


def _depth_table(report: Report, rows: Sequence[Row]) -> None:
    """Mean and standard deviation of every measure at every depth, of the networks that reached the loss."""
    counts, columns = [], []
    for layers in DEPTHS:
        here = [row for row in rows if row["layers"] == layers]
        matched = [row for row in here if row["reached"]]
        counts.append(f"{len(matched)} of {len(here)}")
        columns.append([spread_text([row[measure.name] for row in matched], measure.form) for measure in MEASURES])
    report.table(
        ("layers", *DEPTHS),  # type: ignore[arg-type]
        [
            ("reached the loss", *counts),
            *((measure.title, *(column[i] for column in columns)) for i, measure in enumerate(MEASURES)),
        ],
    )
