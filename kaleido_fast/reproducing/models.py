"""Models that reproductions train once and keep."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kaleido_fast.checkpoint import Checkpoint, ModelCard, load_checkpoint, save_checkpoint
from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.diagnostics import diagnose
from kaleido_fast.model import ModelSpec
from kaleido_fast.presets import NetworkShape, TrainingRecipe
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.reproducing.settings import Settings
from kaleido_fast.system.bars import training_bar
from kaleido_fast.system.devices import resolve_device
from kaleido_fast.system.files import atomic_path, write_error
from kaleido_fast.system.folders import user_cache
from kaleido_fast.system.versions import library_versions
from kaleido_fast.training.trainer import PaleSamplesWarning, SlowMixingWarning, UnstableModelWarning, train

SECONDS = "training_seconds"
TELL_EVERY = 30.0  # seconds between lines on how far it is
FIRST_STEPS, TIMED_STEPS = 10, 70  # of a run that tells how long steps take; with evaluations


@dataclass(frozen=True)
class Trained:
    """A trained model and what its training took.

    Args:
        checkpoint: the model, its card and the file that keeps it.
        seconds: time of the training, when it was done, by `training_clock`.
        clock: what that counts, in words.
        reused: whether the cache had it.
    """

    checkpoint: Checkpoint
    seconds: float
    clock: str
    reused: bool

    @property
    def steps(self) -> int:
        """Training steps that were made."""
        recipe = self.checkpoint.card.recipe
        return int(recipe.get("steps_made", recipe["steps"]))


def training_clock(device: str) -> tuple[Callable[[], float], str]:
    """What compares training times, and its name: CPU time, which others on the machine do not stretch; on a GPU the
    time that passes."""
    if resolve_device(device).type == "cpu":
        return time.process_time, "CPU time, all threads together"
    return time.perf_counter, "time on the GPU"


def cache_folder() -> Path:
    """The user's cache folder for this program, by the platform's custom; it is not made.

    Raises:
        InputError: a user without a home folder.
    """
    cache = user_cache()
    if cache is None:
        raise InputError("there is no home folder to keep trained models in: pass --cache, a folder of yours")
    return cache / "models"


def network_spec(shape: NetworkShape) -> ModelSpec:
    """The specification of a reference network."""
    return ModelSpec(shape.widths, shape.activation, shape.bound, sample_shape=shape.sample_shape)


def trained(
    settings: Settings,
    name: str,
    dataset: Dataset,
    spec: ModelSpec,
    recipe: TrainingRecipe,
    *,
    sampling: dict[str, Any] | None = None,
    seed: int | None = None,
) -> Trained:
    """Train a model, or take it from the cache where the same one has been trained before.

    Ctrl-C keeps the unfinished run there; the same call goes on from it.

    Args:
        settings: gives seed, device, cache and, where set, the number of steps.
        name: first part of the file's name.
        dataset, spec, recipe: what is trained.
        sampling: recommended settings, written into the card.
        seed: another seed than the settings'.

    Raises:
        InputError: a recipe or data that cannot be used, or a cache that cannot be written.
    """
    seed = settings.seed if seed is None else seed
    if settings.steps is not None:
        recipe = replace(recipe, steps=settings.steps, seconds=0.0)
    path = cached_path(settings, name, [dataset.sha256, spec.to_json(), asdict(recipe), seed])
    if path.is_file():
        return _from_cache(settings, path)
    return _train(settings, path, name, dataset, spec, recipe, sampling, seed)


def trained_within(
    settings: Settings,
    name: str,
    dataset: Dataset,
    spec: ModelSpec,
    recipe: TrainingRecipe,
    *,
    seconds: float,
    sampling: dict[str, Any] | None = None,
) -> Trained:
    """Train with as many steps as take ``seconds`` of `training_clock`, or take the model from the cache.

    Steps are timed first, so that the schedule of the learning rate knows its end. As `trained` it goes on after
    Ctrl-C, with the number of steps that it was begun with.

    Args:
        settings, name, dataset, spec, recipe, sampling: as for `trained`; settings with steps are followed instead.
        seconds: training time.

    Raises:
        InputError: as `trained`.
    """
    if settings.steps is not None:
        return trained(settings, name, dataset, spec, recipe, sampling=sampling)
    recipe = replace(recipe, seconds=0.0)  # which are of wall time, and training times are compared by another clock
    key = [dataset.sha256, spec.to_json(), asdict(recipe), settings.seed, round(seconds, 1)]
    path = cached_path(settings, name, key)
    if path.is_file():
        return _from_cache(settings, path)
    noted = path.with_suffix(".steps")
    if not noted.is_file():
        settings.tell(f"timing steps of {name}")
        with atomic_path(noted) as temporary:
            temporary.write_text(str(_steps_within(settings, dataset, spec, recipe, seconds)))
    recipe = replace(recipe, steps=int(noted.read_text()))
    return _train(settings, path, name, dataset, spec, recipe, sampling, settings.seed)


def _steps_within(settings: Settings, dataset: Dataset, spec: ModelSpec, recipe: TrainingRecipe, seconds: float) -> int:
    """How many steps take ``seconds``, by some steps of a run that is thrown away."""
    from kaleido_fast.training.run import TrainingRun

    run = TrainingRun(dataset, spec, recipe, settings.seed, resolve_device(settings.device))
    clock, _ = training_clock(settings.device)
    while run.step < FIRST_STEPS:  # slower: they make what is made once
        run.advance()
    began = clock()
    while run.step < FIRST_STEPS + TIMED_STEPS:
        run.advance()
    return max(1, round(seconds * TIMED_STEPS / max(clock() - began, 1e-9)))


def _from_cache(settings: Settings, path: Path) -> Trained:
    checkpoint = load_checkpoint(path)
    return Trained(checkpoint, float(checkpoint.card.diagnostics[SECONDS]), training_clock(settings.device)[1], True)


def _train(
    settings: Settings,
    path: Path,
    name: str,
    dataset: Dataset,
    spec: ModelSpec,
    recipe: TrainingRecipe,
    sampling: dict[str, Any] | None,
    seed: int,
) -> Trained:
    settings.tell(f"training {name}: {recipe.steps:,} steps")
    clock, clock_name = training_clock(settings.device)
    began = clock()
    with warnings.catch_warnings(), training_bar() if settings.progress else nullcontext() as callback:
        for kind in (
            UnstableModelWarning,
            PaleSamplesWarning,
            SlowMixingWarning,
        ):  # reports state themselves what these say
            warnings.simplefilter("ignore", kind)
        result = train(
            dataset,
            spec=spec,
            recipe=recipe,
            sampling=sampling,
            seed=seed,
            device=settings.device,
            state=path.with_suffix(".training"),
            callback=callback,
        )
    seconds = clock() - began
    card = replace(
        result.card,
        name=name,
        diagnostics={**result.card.diagnostics, SECONDS: seconds},
    )
    return Trained(keep(path, result.model, card), seconds, clock_name, reused=False)


def trained_for(
    settings: Settings, name: str, dataset: Dataset, spec: ModelSpec, recipe: TrainingRecipe, *, seconds: float
) -> Trained:
    """Train until ``seconds`` of `training_clock` are over, or the recipe's steps are made; or take it from the cache.

    Args:
        settings, name, dataset, spec, recipe: as for `trained`; the recipe's learning rate should be constant.
        seconds: training time.

    Raises:
        InputError: as `trained`.
    """
    from kaleido_fast.training.run import TrainingRun

    if settings.steps is not None:
        recipe = replace(recipe, steps=settings.steps)
    path = cached_path(
        settings, name, [dataset.sha256, spec.to_json(), asdict(recipe), settings.seed, round(seconds, 1)]
    )
    clock, clock_name = training_clock(settings.device)
    if path.is_file():
        return _from_cache(settings, path)
    settings.tell(f"training {name} for {seconds:.0f} s of {clock_name}")
    run = TrainingRun(dataset, spec, recipe, settings.seed, resolve_device(settings.device))
    began, notify = clock(), time.monotonic()
    while run.step < recipe.steps and (run.step == 0 or clock() - began < seconds):
        run.advance()
        if settings.progress and time.monotonic() - notify > TELL_EVERY:
            notify = time.monotonic()
            settings.tell(f"{name}: step {run.step:,}, {clock() - began:.0f} of {seconds:.0f} s")
    took = clock() - began
    if run.history[-1:] == [] or run.history[-1].step < run.step:
        run.evaluate(recipe.learning_rate)
    run.model.load_state_dict(run.best)
    model = run.model.cpu().eval()
    card = ModelCard(
        name=name,
        recipe={**asdict(recipe), "seed": settings.seed, "steps": run.step, "best_step": run.best_step},
        dataset={"name": dataset.name, "sha256": dataset.sha256, "n_examples": len(dataset)},
        scaling=dataset.scaling,
        final_loss=run.best_loss,
        diagnostics={**diagnose(model, dataset.data).to_dict(), SECONDS: took},
        created_with=library_versions(),
    )
    return Trained(keep(path, model, card), took, clock_name, reused=False)


def keep(path: Path, model: object, card: ModelCard) -> Checkpoint:
    """Write a model into the cache and read it back; the unfinished run is removed."""
    from kaleido_fast.model import KaleidoMLP

    assert isinstance(model, KaleidoMLP)
    save_checkpoint(path, model, card)
    for suffix in (".training", ".steps"):
        path.with_suffix(suffix).unlink(missing_ok=True)
    return load_checkpoint(path)


def cached_path(settings: Settings, name: str, key: list[object]) -> Path:
    folder = cache_folder() if settings.cache is None else settings.cache
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise write_error(folder, problem) from problem
    if not os.access(folder, os.W_OK):
        raise InputError(f"cache {folder} cannot be written: pass --cache with a folder that you can write to")
    text = json.dumps([key, resolve_device(settings.device).type], sort_keys=True)
    return folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
