"""``kaleido-fast train``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kaleido_fast import names
from kaleido_fast.cli.output import say_json, tell
from kaleido_fast.cli.parameters import BACKGROUND, CHANNELS, Name, Output, overwrite_option
from kaleido_fast.errors import InputError
from kaleido_fast.presets import CHOICES, FLOW_PICTURES, FLOW_RECIPE, PRESETS, Preset, TrainingRecipe, find_preset


def _own(name: str) -> str:
    """What a field of the recipe is where no option says it."""
    values = [getattr(recipe, name) for recipe in (FLOW_RECIPE, FLOW_PICTURES, TrainingRecipe())]
    flow, pictures, attractors = (value if isinstance(value, str) else f"{value:g}" for value in values)
    flow += "" if flow == pictures else f", {pictures} of pictures from 16 x 16"
    return f"[default: the preset's, else {flow}{'' if flow == attractors else f'; of attractors {attractors}'}]"


HELD_OUT = (
    "[default: the preset's, fewer where examples are few; else a sixteenth of the data, at most "
    f"{FLOW_RECIPE.held_out}; of attractors 0]"
)

if TYPE_CHECKING:
    from kaleido_fast.checkpoint import Checkpoint, ModelCard
    from kaleido_fast.model import ModelSpec
    from kaleido_fast.reading.datasets import Dataset


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
    "--value-range",
    type=float,
    nargs=2,
    metavar="LOW HIGH",
    help="Raw values that become the ends of the data range, such as 0 16 [default: known for bytes, pictures and "
    "named data; others are taken as they are].",
)
@BACKGROUND
@CHANNELS
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Use at most this many examples, evenly spaced [default: the preset's, else all].",
)
@click.option("--out", type=Output(), help="Checkpoint to write [default: NAME.safetensors].")
@click.option(
    "--recipe",
    help="flow (new samples), attractors (examples that attract chains), published (the paper's plain autoencoder), or "
    "a preset's name [default: the preset's, else flow for pictures and attractors for other data].",
)
@click.option("--steps", type=int, help=f"Optimiser steps {_own('steps')}.")
@click.option(
    "--seconds",
    type=float,
    help=f"Wall time for all steps in place of --steps: how many fit is measured first; 0 is off {_own('seconds')}.",
)
@click.option("--batch-size", type=int, help=f"Examples per step {_own('batch_size')}.")
@click.option("--learning-rate", type=float, help=f"Peak learning rate of Adam {_own('learning_rate')}.")
@click.option("--warmup", type=int, help=f"Steps until the learning rate is at its peak {_own('warmup')}.")
@click.option(
    "--noise",
    type=float,
    help="Of attractors: training noise in units of half the data range; 0 trains a plain autoencoder [default: the "
    "recipe's, else 0.4, and 0.5 above 256 values].",
)
@click.option(
    "--pair-mix",
    type=float,
    help="Of attractors: move inputs up to this share of the way to another example; 0 is off [default: the recipe's, "
    "else 0, and 0.4 above 256 values].",
)
@click.option(
    "--loss",
    type=Name("loss", CHOICES["loss"]),
    help=f"squared error, or bce: binary cross-entropy of values as shares of the bound's range {_own('loss')}.",
)
@click.option(
    "--average",
    type=float,
    help=f"Decay of a moving average of the weights, which is what is kept; 0 is off {_own('average')}.",
)
@click.option("--weight-decay", type=float, help=f"Decoupled weight decay of AdamW; 0 is off {_own('weight_decay')}.")
@click.option(
    "--shift",
    type=float,
    help="Share of the pictures that are moved by one value, in one of eight directions, each time that they are seen; "
    f"0 is off {_own('shift')}.",
)
@click.option(
    "--sample-variance",
    type=float,
    help="Of a flow: share of the data's variance that samples are given after training, by one factor at the last "
    f"layer; 0 is off {_own('sample_variance')}.",
)
@click.option(
    "--held-out",
    type=int,
    help=f"Examples kept back for choosing the best weights {HELD_OUT}.",
)
@click.option(
    "--precision",
    type=Name("precision", CHOICES["precision"]),
    help="Of the products of training; auto: bf16 where this processor is faster with it, which is measured first "
    f"{_own('precision')}.",
)
@click.option(
    "--weights",
    type=Name("weights", CHOICES["weights"]),
    help="What the weights are rounded to at the end, measured as and stored as; fp16 halves the file "
    f"{_own('weights')}.",
)
@click.option(
    "--hidden",
    type=click.IntRange(min=1),
    help="Width of the hidden layers [default: the preset's, else 512; of attractors up to 256 values 256].",
)
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    help="Number of linear layers [default: the preset's, else 7; of attractors 6].",
)
@click.option(
    "--activation",
    type=Name("activation", names.ACTIVATIONS),
    help="Hidden activation [default: the preset's, else silu; of attractors relu].",
)
@click.option(
    "--bound",
    type=Name("bound", names.BOUNDS),
    help="Output bound [default: the preset's, else tanh; sigmoid for data that are nowhere below 0].",
)
@click.option("--seed", type=int, default=0, show_default=True, help="0 to 2^64-1.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ...")
@click.option(
    "--save-every",
    type=click.FloatRange(min=0),
    default=60,
    show_default=True,
    help="Seconds between writes of the unfinished run.",
)
@click.option(
    "--alone",
    is_flag=True,
    help="Under torchrun: train in this process alone; give each process its own --out.",
)
@click.option(
    "--curve/--no-curve",
    default=None,
    help="Write the loss curve as NAME-loss.png [default: if matplotlib is there].",
)
@overwrite_option
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
    alone: bool,
    curve: bool | None,
    overwrite: bool,
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
    from kaleido_fast.showing.plots import can_plot, check_can_plot, loss_curve
    from kaleido_fast.system.files import remove_parts
    from kaleido_fast.system.locks import output_lock
    from kaleido_fast.system.workers import is_first_worker
    from kaleido_fast.training.recipe import recipe_kind
    from kaleido_fast.training.trainer import (
        PaleSamplesWarning,
        SlowMixingWarning,
        UnstableModelWarning,
        train,
        training_request,
    )

    found = None if preset is None else find_preset(preset, recipe_kind(recipe))
    shape = {name: options.pop(name) for name in ("hidden", "layers", "activation", "bound")}
    reading = {"labels": labels, "value_range": value_range, "background": background, "channels": channels}
    data = _load_data(found, source, limit, shape["bound"], reading)
    out = out or Path(f"{preset or data.name}.safetensors")
    state = out.with_suffix(".training")
    if curve:
        check_can_plot("--curve")
    curve_path = out.with_name(f"{out.stem}-loss.png") if curve or (curve is None and can_plot()) else None
    changed = _change_recipe(data, found, recipe, options)
    asked: dict[str, Any] = {"preset": preset, "recipe": changed, "seed": seed}
    asked["spec"] = _change_spec(data, found, changed, shape)
    files = {"checkpoint": out, "unfinished state": state, "loss curve": curve_path}
    finished = _check_files(
        files, {"data": source, "labels": labels}, preset or data.name, training_request(data, **asked), overwrite
    )
    if finished is not None:
        if is_first_worker(alone=alone):
            _report(finished.model.spec, finished.card, [out], finished=True, as_json=as_json, quiet=quiet)
        return
    shown = not (quiet or as_json) and is_first_worker(alone=alone)
    with warnings.catch_warnings(record=True) as caught, _training_bar(show=shown) as callback:
        for kind in (UnstableModelWarning, PaleSamplesWarning, SlowMixingWarning):
            warnings.simplefilter("always", kind)
        result = train(
            data,
            **asked,
            device=device,
            state=state,
            save_every=save_every,
            alone=alone,
            callback=callback,
        )
    if not is_first_worker(alone=alone):
        return
    for warning in caught:
        tell(f"kaleido-fast: warning: {warning.message}")
    with output_lock(out):
        remove_parts(out)
        save_checkpoint(out, result.model, result.card)
    written = [out]
    if curve_path is not None:
        written.append(curve_path)
        loss_curve(result.history, curve_path)
    state.unlink(missing_ok=True)
    _report(result.model.spec, result.card, written, finished=False, as_json=as_json, quiet=quiet)


def _check_files(
    files: dict[str, Path | None], inputs: dict[str, str | None], name: str, request: dict[str, Any], overwrite: bool
) -> Checkpoint | None:
    """Refuse files that are in the way; returns the checkpoint if this same run was finished before.

    The unfinished state is compared when it is read. To overwrite removes it only if it is another run's.
    """
    from kaleido_fast.system.files import follow
    from kaleido_fast.system.locks import output_lock
    from kaleido_fast.system.outputs import check_outputs
    from kaleido_fast.system.workers import is_first_worker
    from kaleido_fast.training.state import read_request

    out, state = files["checkpoint"], files["unfinished state"]
    assert out is not None and state is not None
    check_outputs(files, inputs, overwrite=True)
    if overwrite:
        if state.exists() and read_request(state) != request and is_first_worker():
            with output_lock(state):
                follow(state).unlink(missing_ok=True)
        return None
    if not out.exists():
        check_outputs(files, ours=[state], remedy="give another --out or move it away")
        return None
    found = _own_checkpoint(out, name, request)
    return None if state.exists() else found


def _own_checkpoint(out: Path, name: str, request: dict[str, Any]) -> Checkpoint:
    """The checkpoint at ``out`` if it is of this same run; another one is refused with the difference."""
    from kaleido_fast.checkpoint import load_checkpoint
    from kaleido_fast.training.trainer import request_of

    try:
        found = load_checkpoint(out)
    except InputError:
        difference = "it is no checkpoint of this release"
    else:
        stored, asked = {"name": found.card.name, **request_of(found)}, {"name": name, **request}
        keys = [key for key in asked if stored[key] != asked[key]]
        if not keys:
            return found
        difference = f"{keys[0]} was {stored[keys[0]]}, is now {asked[keys[0]]}"
    raise InputError(
        f"{out} is there and not of this run: {difference}; give another --out, or --overwrite replaces it"
    )


def _load_data(
    preset: Preset | None, source: str | None, limit: int | None, bound: str | None, reading: dict[str, Any]
) -> Dataset:
    from kaleido_fast.reading.datasets import built_in, load_dataset

    if preset is not None:
        source, limit = source or built_in(preset.dataset), limit or preset.limit
    return load_dataset(
        str(source), bound=bound or (preset.network.bound if preset else "tanh"), limit=limit, **reading
    )


def _change_spec(
    data: Dataset, preset: Preset | None, recipe: TrainingRecipe | str | None, shape: dict[str, Any]
) -> ModelSpec | None:
    """The preset's network, or the default one for the data, with the changes asked for; None if there are none."""
    from kaleido_fast.model import ModelSpec
    from kaleido_fast.training.recipe import default_spec, resolve_recipe

    if not any(shape.values()):
        return None
    base = preset.network if preset is not None else default_spec(data, resolve_recipe(recipe, data, preset).kind)
    hidden, layers = shape["hidden"] or base.hidden, shape["layers"] or base.n_layers
    widths = (data.dim, *[hidden] * (layers - 1), data.dim)
    activation, bound = shape["activation"] or base.activation, shape["bound"] or base.bound
    return ModelSpec(widths, activation, bound, sample_shape=data.sample_shape)


def _change_recipe(
    data: Dataset, preset: Preset | None, name: str | None, changes: dict[str, Any]
) -> TrainingRecipe | str | None:
    from kaleido_fast.training.recipe import resolve_recipe

    asked = {field: value for field, value in changes.items() if value is not None}
    return replace(resolve_recipe(name, data, preset), **asked) if asked else name


def _training_bar(*, show: bool) -> Any:
    import contextlib

    from kaleido_fast.system.bars import training_bar

    return training_bar() if show else contextlib.nullcontext()


def _report(
    spec: ModelSpec, card: ModelCard, written: list[Path], *, finished: bool, as_json: bool, quiet: bool
) -> None:
    facts = {
        "network": "-".join(map(str, spec.widths)),
        "data": card.dataset,
        "recipe": card.recipe,
        "final_loss": card.final_loss,
        "diagnostics": card.diagnostics,
        "sampling": card.sampling,
        "files": [str(path) for path in written],
    }
    if as_json:
        say_json({**facts, **({"finished": True} if finished else {})})
    elif finished and not quiet:
        click.echo(f"{written[0]} is finished: it is of this same run, nothing was trained")
    elif not quiet:
        _print_facts(facts)


def _print_facts(facts: dict[str, Any]) -> None:
    """One line a fact; how draws mix, and what a flow tells from noise, in words."""
    from kaleido_fast.evaluating.novelty import novelty_line
    from kaleido_fast.evaluating.thinning import thin_line
    from kaleido_fast.training.calibration import calibration_line
    from kaleido_fast.training.objective import errors_line

    diagnostics, words = dict(facts["diagnostics"]), {}
    for name, say in (
        ("mixing", thin_line),
        ("denoising_error", errors_line),
        ("calibration", calibration_line),
        ("novelty", novelty_line),
    ):
        if name in diagnostics:
            words[name.replace("_", " ")] = say(diagnostics.pop(name))
    lines = {**facts, "diagnostics": diagnostics or None, **words}
    for name, value in lines.items():
        if value is None:
            continue
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        click.echo(f"{name:12} {text if not isinstance(text, list) else ', '.join(text)}")
