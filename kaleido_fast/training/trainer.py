"""The trainer: an autoencoder that also maps what lies near an example back to it.

By default inputs are corrupted by noise and the loss asks for the clean example (a denoising autoencoder, Vincent et
al. 2008): it makes the network contract around its examples, which a plain autoencoder does not, so that examples
attract chains. The published recipe (Shrivastava, arXiv 2402.11793) is ``recipe="published"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from kaleido_fast.checkpoint import Checkpoint, ModelCard
from kaleido_fast.errors import InputError, warn_caller
from kaleido_fast.evaluating.diagnostics import Diagnostics
from kaleido_fast.evaluating.thinning import thin_problem, with_thin
from kaleido_fast.model import KaleidoMLP, ModelSpec
from kaleido_fast.planning.recommendation import check_sampling
from kaleido_fast.presets import PRESETS, Preset, TrainingRecipe, find_preset, recipe_facts
from kaleido_fast.progress import HistoryEntry, TrainingProgress
from kaleido_fast.reading.datasets import Dataset, built_in, load_dataset
from kaleido_fast.scalars import plain_number, real_number
from kaleido_fast.system.devices import resolve_device
from kaleido_fast.system.files import check_room
from kaleido_fast.system.neutral import neutral
from kaleido_fast.system.outputs import check_outputs
from kaleido_fast.system.threads import threads
from kaleido_fast.system.versions import library_versions
from kaleido_fast.system.workers import local_device
from kaleido_fast.training.calibration import calibration_problem
from kaleido_fast.training.loop import Loop, train_flow, train_until_accepted
from kaleido_fast.training.memory import ITEM, check_training_memory, stored_copies
from kaleido_fast.training.parallel import find_training_workers
from kaleido_fast.training.recipe import check_recipe, default_spec, recipe_kind, recommended_sampling, resolve_recipe
from kaleido_fast.training.run import MAX_SEED, TrainingRun, make_request
from kaleido_kernels.exact import exact_products


@dataclass(frozen=True)
class TrainResult:
    """A trained model in eval mode on the CPU, its card, the loss history and the warnings that were given."""

    model: KaleidoMLP
    card: ModelCard
    history: tuple[HistoryEntry, ...]
    warnings: tuple[str, ...] = ()


class UnstableModelWarning(UserWarning):
    """The trained network does not attract chains to its training examples."""


class PaleSamplesWarning(UserWarning):
    """Samples of the trained network vary less than the recipe asks for."""


class SlowMixingWarning(UserWarning):
    """Draws of one chain of the trained network depend on each other at every distance that was tried."""


@neutral()
@exact_products(torch.device("cpu"))
def train(
    dataset: Any = None,
    *,
    preset: str | None = None,
    spec: ModelSpec | None = None,
    recipe: TrainingRecipe | str | None = None,
    sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    state: str | Path | None = None,
    save_every: float = 60.0,
    alone: bool = False,
    callback: Callable[[TrainingProgress], None] | None = None,
) -> TrainResult:
    """Train a network to be sampled: attractors, or a flow.

    The weights kept are those with the least error on fixed corrupted examples: held-out ones where the recipe holds
    some out, else training examples. The result depends on the arguments, the kind of device, the versions of the
    libraries and, on a CPU, torch's number of threads alone; global random states are neither read nor changed. Started
    by ``torchrun``, workers share every batch: the same batches and noise as of one process, gradients averaged by
    torch's DistributedDataParallel. The weights then agree with those of one process to rounding, and to the bit for
    one number of workers.

    Args:
        dataset: a `Dataset`, or what `load_dataset` takes (an array, a path, a name); by default the preset's.
        preset: name of a reference network; gives data set, network, recipe and recommended sampling settings, each
            of which an argument overrides.
        spec: the network; without it and without a preset, that of `kaleido_fast.training.recipe.default_spec`.
        recipe: a `TrainingRecipe`, "flow" (new samples), "attractors" (examples that attract chains), "published" (the
            paper's plain autoencoder) or the name of a preset; by default the preset's, else flow for pictures and
            attractors for other data. A preset has another network for attractors.
        sampling: settings for the card to recommend; None takes the preset's, or what goes with the recipe. With
            jitter, ``thin`` is measured on the trained network (`kaleido_fast.evaluating.thinning`).
        seed: 0 to 2^64 - 1.
        device: "auto" (a CUDA device where there is one), or torch's name of a device.
        state: a path for the state of the unfinished run. Where it exists the run goes on from there, with the same
            bits as one that was never interrupted: on a CPU with the number of threads that it was begun with. On
            storage that all workers share; the first one writes it.
        save_every: seconds between writes of the state; it is also written on Ctrl-C, on SIGTERM and at the end.
        alone: train in this process alone, although ``torchrun`` started others beside it.
        callback: called after every step, of the first worker; if it raises `KeyboardInterrupt`, that counts as Ctrl-C.

    Raises:
        InputError: an argument or data that cannot be used, a state of another run or one that another process writes,
            a loss that is not finite, or another worker that has ended.
        TrainingInterruptedError: Ctrl-C or SIGTERM, with the state written.
    """
    found = None if preset is None else find_preset(preset, recipe_kind(recipe))
    state_path = None if state is None else Path(state)
    seed = plain_number(seed)
    if sampling is not None:
        check_sampling(sampling)
    with find_training_workers(alone=alone) as workers:
        data, spec, recipe = _resolve(dataset, found, spec, recipe)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise InputError(f"seed {seed!r}: give a whole number from 0 to {MAX_SEED}")
        seconds = real_number(save_every)
        if seconds is None or not seconds >= 0:
            raise InputError(f"save_every = {save_every!r}: give seconds, 0 or more")
        if state_path is not None:
            read = dataset if isinstance(dataset, (str, Path)) else None  # others are in memory
            check_outputs(
                {"state": state_path}, {"data": read}, overwrite=True, remedy="give another path for the state"
            )
        if recipe.seconds > 0 and workers.size > 1:
            raise InputError(
                f"recipe: seconds = {recipe.seconds:g} with {workers.size} workers: how many steps fit into it is "
                "measured by one process alone; give steps"
            )
        target = resolve_device(local_device(device) if isinstance(device, str) else device)
        check_training_memory(data, spec, recipe, target, saves=state_path is not None and workers.is_first)
        if state_path is not None:  # at the end also the checkpoint, which holds the weights once more
            check_room(state_path, (stored_copies(recipe) + 1) * ITEM * spec.n_parameters)
        run = TrainingRun(data, spec, recipe, seed, target, workers)
        with workers.together(state_path, run.request, recipe.batch_size, target) as begun:
            if begun:
                run.restore(cast("Path", state_path))
            loop = Loop(run, state_path, seconds, callback if workers.is_first else None)
            run.threads = workers.broadcast("threads", lambda: run.threads)
            with threads(run.threads):
                if sampling is None and found is not None and found.recipe.kind == recipe.kind:
                    sampling = found.sampling
                facts, attractors, sampling = _finish(run, loop, sampling)
            thinning = loop.measure_thin(sampling)
            novelty = loop.measure_novelty(sampling) if recipe.kind == "flow" else {}
    name = preset or data.name
    problems = _describe_problems(name, recipe, attractors, facts.get("calibration"), sampling, thinning)
    card = _card(name, run, data, recipe, seed, {**facts, **novelty}, sampling)
    run.optimizer.zero_grad(set_to_none=True)
    return TrainResult(run.model.cpu().eval(), with_thin(card, thinning), tuple(run.history), problems)


def _finish(
    run: TrainingRun, loop: Loop, sampling: Mapping[str, Any] | None
) -> tuple[dict[str, Any], Diagnostics | None, Mapping[str, Any]]:
    """Train to the end: what the card says of it, how stable attractors are, and the settings to recommend.

    A flow's settings are known before it is trained, those of attractors hang on how stable they became.
    """
    if run.recipe.kind == "flow":
        sampling = recommended_sampling(run.recipe, None) if sampling is None else sampling
        return train_flow(run, loop, sampling), None, sampling
    attractors = train_until_accepted(run, loop)
    sampling = recommended_sampling(run.recipe, attractors) if sampling is None else sampling
    return attractors.to_dict(), attractors, sampling


def _describe_problems(
    name: str,
    recipe: TrainingRecipe,
    diagnostics: Diagnostics | None,
    calibration: Mapping[str, Any] | None,
    sampling: Mapping[str, Any],
    thinning: Mapping[str, Any] | None,
) -> tuple[str, ...]:
    """Warn of what will make samples poor; returns the same texts. A flow is not judged by stable examples: None."""
    unstable = None if diagnostics is None else diagnostics.problem(sampling.get("jitter", 0.0))
    share = recipe.sample_variance
    pale = calibration_problem(calibration, share) if share > 0 else None
    problems = (
        (unstable, UnstableModelWarning),
        (pale, PaleSamplesWarning),
        (thin_problem(thinning), SlowMixingWarning),
    )
    for text, kind in problems:
        if text is not None:
            warn_caller(f"model {name}: {text}", kind)
    return tuple(text for text, _ in problems if text is not None)


def _card(
    name: str,
    run: TrainingRun,
    data: Dataset,
    recipe: TrainingRecipe,
    seed: int,
    diagnostics: dict[str, Any],
    sampling: Mapping[str, Any],
) -> ModelCard:
    return ModelCard(
        name=name,
        recipe={**asdict(recipe), **_how_it_went(run), "seed": seed},
        dataset={"name": data.name, "sha256": data.sha256, "n_examples": len(data)},
        scaling=data.scaling,
        final_loss=run.best_loss,
        diagnostics=diagnostics,
        sampling=dict(sampling),
        created_with=library_versions(),
    )


def _how_it_went(run: TrainingRun) -> dict[str, Any]:
    """What a card says beside the recipe, also what the recipe left to the machine."""
    computed_in = {"computed_in": run.precision} if run.recipe.precision == "auto" else {}
    steps = {"steps_made": run.recipe.steps} if run.recipe.seconds > 0 else {}
    return {"attempt": run.attempt, "best_step": run.best_step, **computed_in, **steps}


def training_request(
    dataset: Dataset | str | Path | None = None,
    *,
    preset: str | None = None,
    spec: ModelSpec | None = None,
    recipe: TrainingRecipe | str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What decides the result of `train` with these arguments: "network", "recipe", "seed" and "data", plain values."""
    found = None if preset is None else find_preset(preset, recipe_kind(recipe))
    return make_request(*_resolve(dataset, found, spec, recipe), seed)


def request_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The request whose training ended in a checkpoint, as `training_request` returns it."""
    card = checkpoint.card
    return {
        "network": checkpoint.model.spec.to_json(),
        "recipe": recipe_facts(card.recipe),
        "seed": card.recipe.get("seed"),
        "data": card.dataset.get("sha256"),
    }


def _resolve(
    dataset: Any,
    preset: Preset | None,
    spec: ModelSpec | None,
    recipe: TrainingRecipe | str | None,
) -> tuple[Dataset, ModelSpec, TrainingRecipe]:
    if dataset is None and preset is None:
        raise InputError(f"nothing to train on: give a data set, or a preset ({', '.join(PRESETS)})")
    if spec is None and preset is not None:
        shape = preset.network
        spec = ModelSpec(shape.widths, shape.activation, shape.bound, sample_shape=shape.sample_shape)
    if not isinstance(dataset, Dataset):
        limit = preset.limit if preset is not None else None
        source = dataset if dataset is not None else built_in(cast("Preset", preset).dataset)
        dataset = load_dataset(source, bound=spec.bound if spec else "tanh", limit=limit)
    recipe = resolve_recipe(recipe, dataset, preset)
    spec = spec or default_spec(dataset, recipe.kind)
    if spec.dim != dataset.dim:
        raise InputError(
            f"data set {dataset.name} has {dataset.dim} values an example, the network takes {spec.dim}: "
            "give a spec or preset of the same size"
        )
    low, high = float(dataset.data.min()), float(dataset.data.max())
    if low < spec.low or high > spec.high:
        raise InputError(
            f"data set {dataset.name} has values from {low:g} to {high:g}, the network's range is "
            f"[{spec.low:g}, {spec.high:g}]: load it with bound={spec.bound!r}"
        )
    if low == high:
        raise InputError(
            f"data set {dataset.name} holds one value only ({low:g}), {len(dataset) * dataset.dim:,} times: there is "
            "nothing to learn; give examples that differ"
        )
    check_recipe(recipe, spec.sample_shape)
    return dataset, spec, recipe
