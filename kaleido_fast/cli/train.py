"""``kaleido-fast train``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kaleido_fast import names
from kaleido_fast.cli.options import BACKGROUND, CHANNELS, Name
from kaleido_fast.errors import InputError
from kaleido_fast.presets import PRESETS, TrainingRecipe, find_preset

if TYPE_CHECKING:
    from kaleido_fast.datasets import Dataset
    from kaleido_fast.model import ModelSpec
    from kaleido_fast.training import TrainResult


@click.command(name="train", short_help="Train a network, write a checkpoint.")
@click.option("--preset", type=Name("preset", tuple(PRESETS)), help="Reference network with its data and recipe.")
@click.option(
    "--data",
    "source",
    help="Data set by name (points1d, points2d, digits, mnist, fashion-mnist, cifar10) or path: IDX, .npy, .npz, CSV, "
    "a picture, a folder of pictures or of folders of them (classes) [default: the preset's].",
)
@click.option("--labels", help="File of classes (IDX, .npy, .npz, CSV), where they are not found beside the data.")
@click.option(
    "--value-range", type=float, nargs=2, help="Raw values that become the ends of the data range, such as 0 16."
)
@BACKGROUND
@CHANNELS
@click.option("--limit", type=click.IntRange(min=1), help="Use at most this many examples.")
@click.option("--out", type=click.Path(path_type=Path), help="Checkpoint to write [default: NAME.safetensors].")
@click.option("--recipe", help="published (the paper's plain autoencoder), or a preset's name [default: the preset's].")
@click.option("--steps", type=int, help="Optimiser steps.")
@click.option("--batch-size", type=int, help="Examples per step.")
@click.option("--learning-rate", type=float, help="Peak learning rate.")
@click.option(
    "--noise", type=float, help="Training noise in units of half the data range; 0 trains a plain autoencoder."
)
@click.option("--pair-mix", type=float, help="Move inputs up to this share of the way to another example; 0 is off.")
@click.option("--held-out", type=int, help="Examples kept back for choosing the best weights.")
@click.option("--hidden", type=click.IntRange(min=1), help="Width of the hidden layers.")
@click.option("--layers", type=click.IntRange(min=1), help="Number of linear layers.")
@click.option("--activation", type=Name("activation", names.ACTIVATIONS), help="Hidden activation [default: relu].")
@click.option("--bound", type=Name("bound", names.BOUNDS), help="Output bound [default: the preset's, else tanh].")
@click.option("--seed", type=int, default=0, show_default=True, help="0 to 2^64-1.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ...")
@click.option(
    "--save-every",
    type=click.FloatRange(min=0),
    default=60,
    show_default=True,
    help="Seconds between writes of the unfinished run.",
)
@click.option("--curve/--no-curve", default=None, help="Write the loss curve as PNG [default: if matplotlib is there].")
@click.option("--json", "as_json", is_flag=True, help="Print the end figures as one JSON object.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors and warnings.")
def command(
    preset: str | None,
    source: str | None,
    labels: str | None,
    value_range: tuple[float, float] | None,
    background: str,
    channels: str | None,
    limit: int | None,
    out: Path | None,
    recipe: str | None,
    seed: int,
    device: str,
    save_every: float,
    curve: bool | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Train a network on examples and write a checkpoint.

    Ctrl-C keeps the unfinished run beside the checkpoint; the same command goes on from there, with the same result
    as a run that was never interrupted. Under torchrun, workers share every batch.
    """
    if preset is None and source is None:
        raise InputError(f"nothing to train on: pass --preset ({', '.join(PRESETS)}) or --data")
    import warnings

    from kaleido_fast.checkpoint import save_checkpoint
    from kaleido_fast.crew import leads_by_name
    from kaleido_fast.files import check_writable, remove_parts
    from kaleido_fast.locks import output_lock
    from kaleido_fast.plots import can_plot, loss_curve
    from kaleido_fast.training import UnstableModelWarning, train

    shape = {name: options.pop(name) for name in ("hidden", "layers", "activation", "bound")}
    reading = {"labels": labels, "value_range": value_range, "background": background, "channels": channels}
    data = _load_data(preset, source, limit, shape["bound"], reading)
    out = out or Path(f"{preset or data.name}.safetensors")
    check_writable(out)
    state = out.with_suffix(".training")
    spec = _change_spec(data, preset, shape)
    shown = not (quiet or as_json) and leads_by_name()
    with warnings.catch_warnings(record=True) as caught, _training_bar(show=shown) as callback:
        warnings.simplefilter("always", UnstableModelWarning)
        result = train(
            data,
            preset=preset,
            spec=spec,
            recipe=_change_recipe(data, preset, recipe, options),
            seed=seed,
            device=device,
            state=state,
            save_every=save_every,
            callback=callback,
        )
    if not leads_by_name():
        return
    for warning in caught:
        click.echo(f"kaleido-fast: warning: {warning.message}", err=True)
    with output_lock(out):
        remove_parts(out)
        save_checkpoint(out, result.model, result.card)
    written = [out]
    if can_plot() if curve is None else curve:
        written.append(out.with_suffix(".png"))
        loss_curve(result.history, written[-1])
    state.unlink(missing_ok=True)
    _report(result, written, as_json=as_json, quiet=quiet)


def _load_data(
    preset: str | None, source: str | None, limit: int | None, bound: str | None, reading: dict[str, Any]
) -> Dataset:
    from kaleido_fast.datasets import built_in, load_dataset

    found = None if preset is None else find_preset(preset)
    if source is None and found is not None:
        source, limit = built_in(found.dataset), limit or found.limit
    elif limit is None and found is not None:
        limit = found.limit
    return load_dataset(str(source), bound=bound or (found.network.bound if found else "tanh"), limit=limit, **reading)


def _change_spec(data: Dataset, preset: str | None, shape: dict[str, Any]) -> ModelSpec | None:
    """The preset's network, or the default one for the data, with the changes asked for; None if there are none."""
    from kaleido_fast.model import ModelSpec
    from kaleido_fast.training import default_spec

    if not any(shape.values()):
        return None
    base = default_spec(data)
    hidden, layers, bound = base.widths[1], base.n_layers, shape["bound"] or base.bound
    if preset is not None:
        network = find_preset(preset).network
        hidden, layers, bound = network.hidden, network.layers, shape["bound"] or network.bound
    hidden, layers = shape["hidden"] or hidden, shape["layers"] or layers
    widths = (data.dim, *[hidden] * (layers - 1), data.dim)
    return ModelSpec(widths, shape["activation"] or "relu", bound, sample_shape=data.sample_shape)


def _change_recipe(
    data: Dataset, preset: str | None, name: str | None, changes: dict[str, Any]
) -> TrainingRecipe | str | None:
    from kaleido_fast.training import default_recipe, find_recipe

    asked = {field: value for field, value in changes.items() if value is not None}
    if not asked:
        return name
    if name is not None:
        base = find_recipe(name)
    else:
        base = find_preset(preset).recipe if preset is not None else default_recipe(data)
    return replace(base, **asked)


def _training_bar(*, show: bool) -> Any:
    import contextlib

    from kaleido_fast.progress import training_bar

    return training_bar() if show else contextlib.nullcontext()


def _report(result: TrainResult, written: list[Path], *, as_json: bool, quiet: bool) -> None:
    card = result.card
    facts = {
        "network": "-".join(map(str, result.model.spec.widths)),
        "data": card.dataset,
        "recipe": card.recipe,
        "final_loss": card.final_loss,
        "diagnostics": card.diagnostics,
        "sampling": card.sampling,
        "files": [str(path) for path in written],
    }
    if as_json:
        click.echo(json.dumps(facts, sort_keys=True))
    elif not quiet:
        for name, value in facts.items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            click.echo(f"{name:12} {text if not isinstance(text, list) else ', '.join(text)}")
