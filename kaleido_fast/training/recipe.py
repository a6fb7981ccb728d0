"""The recipe of a training and the network it trains: defaults, checks and what to recommend afterwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.evaluating.diagnostics import Diagnostics
from kaleido_fast.model import ModelSpec
from kaleido_fast.presets import (
    CHOICES,
    FLOW_PICTURES,
    FLOW_RECIPE,
    FLOW_SAMPLING,
    PRESETS,
    PUBLISHED_RECIPE,
    Preset,
    TrainingRecipe,
)
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.scalars import real_number
from kaleido_fast.showing.pictures import is_image_shape

NAMED_RECIPES = ("flow", "attractors", "published")
_ATTRACTORS_ALONE = {"noise": 0, "pair_mix": 0, "attempts": 1}  # and what says that a flow has none
_HELD_OUT_PART = 16  # of few examples at most this part is held out;
_HELD_OUT_OF_SMALL = 3  # by presets of small pictures this one: to judge samples takes 256
_LEAST_MOVED = 16  # values across a picture that is still the same after one up or down


def find_recipe(name: str, dataset: Dataset | None = None) -> TrainingRecipe:
    """A recipe by name.

    Args:
        name: "flow", "attractors", "published", or a preset's.
        dataset: what is trained on; the first two fit themselves to it.

    Raises:
        InputError: an unknown name.
    """
    if name == "flow":
        return FLOW_RECIPE if dataset is None else flow_recipe(dataset)
    if name == "attractors":
        return TrainingRecipe() if dataset is None else attractor_recipe(dataset)
    if name == "published":
        return PUBLISHED_RECIPE
    if name not in PRESETS:
        raise unknown_name("recipe", name, (*NAMED_RECIPES, *PRESETS))
    return PRESETS[name].recipe


def resolve_recipe(recipe: TrainingRecipe | str | None, dataset: Dataset, preset: Preset | None) -> TrainingRecipe:
    """The recipe that is meant: the preset's own where it has one of that name, else as `find_recipe` and the data say.

    Args:
        recipe: one, its name, or None for the usual one.
        dataset: what is trained on.
        preset: as it is for the recipe's kind, see `kaleido_fast.presets.find_preset`.
    """
    if isinstance(recipe, TrainingRecipe):
        return recipe
    if preset is not None and recipe in (None, preset.recipe.kind):
        part = _HELD_OUT_PART if preset.recipe.shift > 0 else _HELD_OUT_OF_SMALL
        return _with_few_held_out(preset.recipe, dataset, part)
    found = default_recipe(dataset) if recipe is None else find_recipe(recipe, dataset)
    return found if is_image_shape(dataset.sample_shape) else replace(found, shift=0.0)


def recipe_kind(recipe: TrainingRecipe | str | None) -> str | None:
    """The kind of a recipe or of the one with a name; None for none, whose data decide. Unknown names raise."""
    if recipe is None:
        return None
    return (find_recipe(recipe) if isinstance(recipe, str) else recipe).kind


def default_spec(dataset: Dataset, kind: str = "attractors") -> ModelSpec:
    """A network for data without a preset.

    For attractors 6 layers, past which denoised networks gain nothing but speed of convergence; 256 wide, 512 above
    D = 256. For a flow 7 layers of 512 with SiLU: deeper was better than wider, and smooth than ReLU. Data without
    negative values get a sigmoid bound, other data a tanh.
    """
    bound = "tanh" if float(dataset.data.min()) < 0 else "sigmoid"
    if kind == "flow":
        hidden, activation = [512] * 6, "silu"
    else:
        hidden, activation = [256 if dataset.dim <= 256 else 512] * 5, "relu"
    return ModelSpec((dataset.dim, *hidden, dataset.dim), activation, bound, sample_shape=dataset.sample_shape)


def default_recipe(dataset: Dataset) -> TrainingRecipe:
    """New samples where examples are pictures, attractors where they are points or rows of a table."""
    return flow_recipe(dataset) if is_image_shape(dataset.sample_shape) else attractor_recipe(dataset)


def attractor_recipe(dataset: Dataset) -> TrainingRecipe:
    """Noise 0.4; above D = 256 noise and pair-mix, because noise of independent values leaves the subspace of large
    images alone and only mixing contracts along it."""
    return TrainingRecipe() if dataset.dim <= 256 else TrainingRecipe(noise=0.5, pair_mix=0.4)


def flow_recipe(dataset: Dataset) -> TrainingRecipe:
    """`FLOW_PICTURES` for pictures of 16 x 16 and more, else `FLOW_RECIPE`; of few examples a sixteenth is held out."""
    shape = dataset.sample_shape
    recipe = FLOW_PICTURES if is_image_shape(shape) and min(shape[:2]) >= _LEAST_MOVED else FLOW_RECIPE
    return _with_few_held_out(recipe, dataset)


def _with_few_held_out(recipe: TrainingRecipe, dataset: Dataset, part: int = _HELD_OUT_PART) -> TrainingRecipe:
    """Of few examples most are trained on: of 7,500 of 8,000 digits .47 of samples were authentic, of 7,000, in a
    tenth more steps, .44."""
    return replace(recipe, held_out=min(recipe.held_out, len(dataset) // part))


def check_recipe(recipe: TrainingRecipe, sample_shape: tuple[int, ...] = ()) -> None:
    """Refuse a recipe that cannot be followed for examples of a shape, naming the field."""
    for name, least in (("steps", 1), ("batch_size", 1), ("warmup", 0), ("held_out", 0), ("attempts", 1)):
        value = getattr(recipe, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"recipe: {name} = {value!r}: give a whole number, at least {least}")
    for name, high in (("learning_rate", 1), ("noise", 10), ("pair_mix", 1), ("average", 1), ("shift", 1)):
        _check_real(recipe, name, high)
    _check_real(recipe, "weight_decay", 10)
    _check_real(recipe, "sample_variance", 1)
    _check_real(recipe, "seconds", 1e7)
    if recipe.learning_rate == 0:
        raise InputError("recipe: learning_rate = 0: give a number above 0, such as 0.001")
    if recipe.average == 1:
        raise InputError("recipe: average = 1: give a decay below 1, such as 0.999; 0 is off")
    for name, known in CHOICES.items():
        if getattr(recipe, name) not in known:
            raise unknown_name(name, getattr(recipe, name), known)
    if recipe.shift > 0 and not is_image_shape(sample_shape):
        raise InputError(
            f"recipe: shift = {recipe.shift:g} with examples of shape {sample_shape}: only pictures, (H, W) or "
            "(H, W, 3), can be moved; leave shift out"
        )
    if recipe.sample_variance > 0 and recipe.kind != "flow":
        raise InputError(
            f"recipe: sample_variance = {recipe.sample_variance:g} with kind {recipe.kind!r}: it belongs to a flow; "
            "leave it out, or take the recipe 'flow'"
        )
    if recipe.kind == "flow":
        for name, off in _ATTRACTORS_ALONE.items():
            if getattr(recipe, name) != off:
                raise InputError(
                    f"recipe: {name} = {getattr(recipe, name):g} with kind 'flow', which has noise of all strengths "
                    f"and one attempt: {name} belongs to the recipe 'attractors'; leave it out, or take that recipe"
                )


def _check_real(recipe: TrainingRecipe, name: str, high: float) -> None:
    value = getattr(recipe, name)
    number = real_number(value)
    if number is None or not 0 <= number <= high:
        raise InputError(f"recipe: {name} = {value!r}: give a number from 0 to {high:g}")


def recommended_sampling(recipe: TrainingRecipe, diagnostics: Diagnostics | None) -> dict[str, Any]:
    """Sampling settings for a network without a preset.

    Of attractors, where most examples are stable, chains run to their fixed point. Where they are not, 20 steps with
    jitter a little above the training noise and two clean steps gave the best coverage and class balance on 8 x 8
    digits.

    Args:
        recipe: what the network was trained by.
        diagnostics: of attractors; a flow has none.
    """
    if diagnostics is None:
        return dict(FLOW_SAMPLING)
    if recipe.noise == 0:
        return {}
    if diagnostics.problem() is None:
        return {"burn_in": 99, "thin": 1, "jitter": 0.0, "tol": 1e-4}
    return {"burn_in": 19, "jitter": round(1.25 * recipe.noise, 3), "settle": 2}
