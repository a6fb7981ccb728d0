"""``kaleido-fast evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kaleido_fast import names
from kaleido_fast.cli.output import say_json, say_table, tell
from kaleido_fast.cli.parameters import BACKGROUND, CHANNELS, Output, overwrite_option, run_option
from kaleido_fast.errors import InputError
from kaleido_fast.system.valid_json import json_text

if TYPE_CHECKING:
    from kaleido_fast.evaluating.evaluation import Evaluation

SIGMAS = (0.1, 0.3, 1.0)
SAMPLING = ("sampler", "burn_in", "jitter", "settle", "noise", "steps", "noise_from", "noise_to")


@click.command(name="evaluate", short_help="Measure how good samples are, and whether they are copies.")
@click.argument("model", default=names.DEFAULT_MODEL)
@click.option(
    "--data", "source", help="Data it was trained on, by name or path [default: by the model's card, if at hand]."
)
@click.option("--held-out", help="Examples it has not seen [default: those left out or kept back in training].")
@click.option(
    "--draws",
    type=click.Path(path_type=Path),
    help="Measure this file or store of draws of MODEL instead of sampling: last draws, of --chains chains at most.",
)
@click.option("--labels", help="File of classes for --data, where they are not found beside it.")
@click.option(
    "--value-range",
    type=float,
    nargs=2,
    metavar="LOW HIGH",
    help="Raw values that become the ends of the data range, as in training [default: as train].",
)
@BACKGROUND
@CHANNELS
@click.option("--chains", "n_chains", type=click.IntRange(min=1), default=1000, show_default=True, help="Samples.")
@click.option(
    "--compared",
    "n_compared",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="Held-out examples compared with, at most.",
)
@click.option("--k", type=int, default=5, show_default=True, help="Neighbours of precision, recall, density, coverage.")
@click.option(
    "--sigma",
    "sigmas",
    type=float,
    multiple=True,
    help="Noise to recover examples from, in units of half the data range; repeatable [default: 0.1, 0.3 and 1].",
)
@click.option(
    "--classes/--no-classes",
    default=None,
    help="Find the classes of samples, and their Fréchet distance, by small classifiers [default: if the data have "
    "labels].",
)
@run_option("sampler", text="As in sample", otherwise="as recommended")
@run_option("burn_in", text="Steps before the draw", otherwise="as recommended")
@run_option("jitter", text="Noise in units of half the data range", otherwise="as recommended")
@run_option("settle", text="Clean steps before the draw", otherwise="as recommended")
@run_option("noise", text="Kind of jitter, as in sample", otherwise="normal")
@run_option("steps", text="As in sample", otherwise="as recommended")
@run_option("noise_from", text="As in sample", otherwise="as recommended")
@run_option("noise_to", text="As in sample", otherwise="as recommended")
@run_option("seed", text="0 to 2^64-1")
@click.option("--out", type=Output(), default=Path("evaluation.json"), show_default=True, help="JSON to write.")
@click.option("--sheet", type=Output(), help="PNG to write [default: beside --out, for pictures].")
@overwrite_option
@click.option("--engine", default="auto", show_default=True, help=f"One of {', '.join(names.ENGINES)}.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    model: str,
    source: str | None,
    held_out: str | None,
    draws: Path | None,
    labels: str | None,
    value_range: tuple[float, float] | None,
    background: str,
    channels: str | None,
    out: Path,
    sheet: Path | None,
    sigmas: tuple[float, ...],
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure how good the samples of MODEL are, and whether its training examples attract chains.

    Writes the figures as JSON and, for models of pictures, a sheet: rows of samples, and under each the nearest
    training examples. docs/quality.md defines every figure.
    """
    from kaleido_fast.checkpoint import load_checkpoint
    from kaleido_fast.evaluating.evaluation import check_draws, evaluate
    from kaleido_fast.evaluating.reference import find_reference
    from kaleido_fast.evaluating.sheet import check_sheet, look_sheet
    from kaleido_fast.showing.pictures import is_image_shape, save_picture
    from kaleido_fast.storing.draws import open_draws
    from kaleido_fast.system.files import atomic_path
    from kaleido_fast.system.outputs import claimed

    if Path(model).suffix == ".zarr":
        raise InputError(f"{model} is a store of draws: give the model first, and --draws {model}")
    checkpoint = load_checkpoint(model)
    spec = checkpoint.model.spec
    if sheet is None and is_image_shape(spec.sample_shape):
        sheet = out.with_suffix(".png")
    elif sheet is not None:
        check_sheet(spec)
    inputs = {"model": checkpoint.path, "data": source, "held-out examples": held_out, "draws": draws, "labels": labels}
    claim = claimed({"list of figures": out, "sheet": sheet}, inputs, overwrite=overwrite)
    click.get_current_context().with_resource(claim)
    sampling = {name: options.pop(name) for name in SAMPLING}
    if draws is not None:
        _refuse_sampling(draws, sampling)
        options["draws"] = open_draws(draws)
        check_draws(options["draws"], checkpoint)
    reading: dict[str, Any] = {
        "labels": labels,
        "value_range": value_range,
        "background": background,
        "channels": channels,
    }
    reference = find_reference(checkpoint, source, held_out=held_out, **reading)
    evaluation = evaluate(
        checkpoint,
        reference,
        sigmas=sigmas or SIGMAS,
        sampling={name: value for name, value in sampling.items() if value is not None},
        tell=(lambda _: None) if quiet or as_json else tell,
        **options,
    )
    facts = {"model": checkpoint.card.name, "model_hash": checkpoint.model_hash, **evaluation.to_dict()}
    written = [out]
    with atomic_path(out) as temporary:
        temporary.write_text(json_text(facts, indent=1) + "\n")
    if sheet is not None:
        train = None if reference.train is None else reference.train.data
        save_picture(look_sheet(evaluation.samples, train, spec, checkpoint.card.scaling), sheet)
        written.append(sheet)
    if as_json:
        say_json({**facts, "files": [str(path) for path in written]})
    elif not quiet:
        _print(evaluation, written)


def _refuse_sampling(draws: Path, sampling: dict[str, Any]) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in sampling.items() if value is not None]
    if given:
        raise InputError(
            f"{given[0]} is for samples that are drawn now, and {draws} holds finished draws: leave one of them out"
        )


MEASURES = (
    ("precision", "precision", "{:.3f}"),
    ("recall", "recall", "{:.3f}"),
    ("density", "density", "{:.2f}"),
    ("coverage", "coverage", "{:.3f}"),
    ("Fréchet distance", "frechet", "{:.2f}"),
    ("copying z (< -3: copies)", "copying_z", "{:+.1f}"),
    ("authentic", "authentic", "{:.3f}"),
    ("blank", "blank", "{:.3f}"),
    ("blob", "blob", "{:.3f}"),
    ("class entropy", "entropy", "{:.3f}"),
    ("confidence", "confidence", "{:.2f}"),
)


def _print(evaluation: Evaluation, written: list[Path]) -> None:
    from rich.table import Table

    from kaleido_fast.cli.sample import mixing_line
    from kaleido_fast.evaluating.evaluation import REAL
    from kaleido_fast.evaluating.feature_distance import distance_words

    click.echo(f"k = {evaluation.k}, against {evaluation.n_compared:,} {evaluation.compared_with}")
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name, scores in evaluation.sets.items():
        table.add_column(f"{name} ({scores.n:,})", justify="right")
    for title, field, form in MEASURES:
        values = [getattr(scores, field) for scores in evaluation.sets.values()]
        if any(value is not None for value in values):
            table.add_row(title, *("-" if value is None else form.format(value) for value in values))
    for quantile in ("10%", "50%", "90%"):
        found = [scores.nearest for scores in evaluation.sets.values()]
        if any(found):
            title = f"nearest MSE at {quantile}"
            table.add_row(title, *("-" if nearest is None else f"{nearest[quantile]:.4f}" for nearest in found))
    say_table(table)
    if evaluation.frechet is not None:
        real = evaluation.sets.get(REAL)
        click.echo(distance_words(evaluation.frechet, None if real is None else real.frechet_range))
    for name, run in evaluation.runs.items():
        click.echo(f"{name}: {_run_line(run)}")
    if evaluation.mixing is not None:
        thin = evaluation.spacing.get("thin")
        apart = "" if thin is None else f", {thin} step{'s' * (thin > 1)} apart"
        click.echo(f"draws of a chain{apart}: {mixing_line(evaluation.mixing)}")
    if evaluation.stable_share is not None:
        back = ", ".join(f"{share:.0%} from noise {sigma}" for sigma, share in evaluation.recovery.items())
        click.echo(
            f"training examples: {evaluation.stable_share:.0%} are stable attractors (median spectral radius "
            f"{evaluation.spectral_radius_median:.2f}); recovered: {back}"
        )
    for note in evaluation.notes:
        click.echo(f"note: {note}")
    click.echo(f"written: {', '.join(map(str, written))}")


def _run_line(run: dict[str, Any]) -> str:
    from kaleido_fast.planning.jitter import run_words

    if "outcome_shares" not in run:
        return f"{run['n_chains']:,} chains of {run['file']}"
    shares = dict(run["outcome_shares"])
    if run.get("sampler") == "flow":  # whose chains are not asked where they would rest
        shares.pop("moving")
    outcomes = ", ".join(f"{share:.1%} {name.replace('_', ' ')}" for name, share in shares.items() if share)
    residual = run["residual_quantiles"]
    return (
        f"{run_words(run)}, seed {run['seed']}: {outcomes}{'; ' if outcomes else ''}residual "
        f"{residual['50%']:.2g} (median), {residual['99%']:.2g} (99 %)"
    )
