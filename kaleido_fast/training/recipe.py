"""The recipe of a training and the network it trains: defaults, checks and what to recommend afterwards."""

from __future__ import annotations

from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.evaluating.diagnostics import Diagnostics
from kaleido_fast.model import ModelSpec
from kaleido_fast.presets import PRESETS, PUBLISHED_RECIPE, TrainingRecipe
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.scalars import real_number

WEIGHT_INITS = ("kaiming", "default")
SCHEDULES = ("cosine", "constant")


def find_recipe(name: str) -> TrainingRecipe:
    """The recipe of a preset, or "published"; an unknown name raises `InputError`."""
    if name == "published":
        return PUBLISHED_RECIPE
    if name not in PRESETS:
        raise unknown_name("recipe", name, ("published", *PRESETS))
    return PRESETS[name].recipe


def default_spec(dataset: Dataset) -> ModelSpec:
    """6 layers, past which denoised networks gain nothing but speed of convergence; 256 wide, 512 above D = 256.

    Data without negative values gets a sigmoid bound, other data a tanh.
    """
    width = 256 if dataset.dim <= 256 else 512
    bound = "tanh" if float(dataset.data.min()) < 0 else "sigmoid"
    return ModelSpec((dataset.dim, *[width] * 5, dataset.dim), bound=bound, sample_shape=dataset.sample_shape)


def default_recipe(dataset: Dataset) -> TrainingRecipe:
    """Noise 0.4; above D = 256 noise and pair-mix, because noise of independent values leaves the subspace of large
    images alone and only mixing contracts along it."""
    return TrainingRecipe() if dataset.dim <= 256 else TrainingRecipe(noise=0.5, pair_mix=0.4)


def check_recipe(recipe: TrainingRecipe) -> None:
    """Refuse a recipe that cannot be followed, naming the field."""
    for name, least in (("steps", 1), ("batch_size", 1), ("warmup", 0), ("held_out", 0), ("attempts", 1)):
        value = getattr(recipe, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"recipe: {name} = {value!r}: give a whole number, at least {least}")
    for name, low, high in (("learning_rate", 0.0, 1.0), ("noise", 0.0, 10.0), ("pair_mix", 0.0, 1.0)):
        value = getattr(recipe, name)
        number = real_number(value)
        if number is None or not low <= number <= high:
            raise InputError(f"recipe: {name} = {value!r}: give a number from {low:g} to {high:g}")
    if recipe.learning_rate == 0:
        raise InputError("recipe: learning_rate = 0: give a number above 0, such as 0.001")
    for kind, name, known in (("init", recipe.init, WEIGHT_INITS), ("schedule", recipe.schedule, SCHEDULES)):
        if name not in known:
            raise unknown_name(kind, name, known)


def recommended_sampling(recipe: TrainingRecipe, diagnostics: Diagnostics) -> dict[str, float]:
    """Sampling settings for a network without a preset.

    Where most examples are stable, chains run to their fixed point. Where they are not, 20 steps with jitter a little
    above the training noise and two clean steps gave the best coverage and class balance on 8 x 8 digits.
    """
    if recipe.noise == 0:
        return {}
    if diagnostics.problem() is None:
        return {"burn_in": 99, "thin": 1, "jitter": 0.0, "tol": 1e-4}
    return {"burn_in": 19, "jitter": round(1.25 * recipe.noise, 3), "settle": 2}
