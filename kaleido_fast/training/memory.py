"""What a training will need, found before anything is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.diagnostics import CHECKED_EXAMPLES, POWER_STARTS, RADIUS_EXAMPLES
from kaleido_fast.model import ModelSpec
from kaleido_fast.presets import TrainingRecipe
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.showing.pictures import is_image_shape
from kaleido_fast.system.devices import device_facts
from kaleido_fast.system.memory import available_memory

EVALUATION_ROWS = 2048
EVALUATION_VALUES = 2**27  # of the fixed examples: 512 MiB; fewer rows where examples have more than 65,536 values
ITEM = 4  # bytes of fp32
KEPT_COPIES = 5  # weights, gradients, two moments of Adam, the best weights
STORED_COPIES = 4  # in the file of an unfinished run: weights, best weights, two moments
SAVED_COPIES = 7  # weights, best weights and moments in main memory, and most of them again as bytes of the file
AVERAGED = 1  # of each of these more, where weights are averaged; of those saved 2
BATCH_COPIES = 5  # examples, noise, inputs, error and its gradient


def evaluation_rows(dim: int) -> int:
    """Fixed examples that the measure by which weights are kept looks at."""
    return max(1, min(EVALUATION_ROWS, EVALUATION_VALUES // dim))


def kept_copies(recipe: TrainingRecipe) -> int:
    """Copies of weights that a training holds."""
    return KEPT_COPIES + AVERAGED * (recipe.average > 0)


def stored_copies(recipe: TrainingRecipe) -> int:
    """Copies of weights in the file of an unfinished run."""
    return STORED_COPIES + AVERAGED * (recipe.average > 0)


def saved_copies(recipe: TrainingRecipe) -> int:
    """Copies of weights in main memory while that file is written."""
    return SAVED_COPIES + 2 * AVERAGED * (recipe.average > 0)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a training needs, estimated.

    On a CPU within 14 % of what was measured from 0.2 to 2.2 GiB; below that up to a third too low.

    Args:
        weights: copies of weights on the device, all the time.
        examples: copies of the data besides those that are there, and the fixed examples, all the time.
        at_work: a batch, a measurement or the diagnosis, whichever needs most.
        saved: copies of weights in main memory while the unfinished run is written; nothing else is at work then.
    """

    weights: int
    examples: int
    at_work: int
    saved: int

    @classmethod
    def of(
        cls, spec: ModelSpec, recipe: TrainingRecipe, n_examples: int, device: torch.device, *, saves: bool
    ) -> TrainingMemory:
        """The estimate for a network, a recipe and a number of examples."""
        dim, n_weights, inner = spec.dim, spec.n_parameters, sum(spec.widths[1:])
        fixed = evaluation_rows(dim)
        copies = (recipe.held_out > 0) + (device.type != "cpu")
        at_work = [
            n_weights,  # newer best weights, before those before go
            recipe.batch_size * (BATCH_COPIES * dim + 2 * inner),
            fixed * (2 * dim + 2 * max(spec.widths[1:-1], default=0)),
            min(n_examples, CHECKED_EXAMPLES) * 3 * dim,
            POWER_STARTS * min(n_examples, RADIUS_EXAMPLES) * (3 * dim + 2 * inner),
        ]
        return cls(
            weights=kept_copies(recipe) * ITEM * n_weights,
            examples=ITEM * dim * (copies * n_examples + 2 * fixed),
            at_work=ITEM * max(at_work),
            saved=saved_copies(recipe) * ITEM * n_weights if saves else 0,
        )

    def on_device(self, device: torch.device) -> int:
        """The most that lies on the device at once; a CPU's memory is also where the run is saved from."""
        return self.weights + self.examples + max(self.at_work, self.saved if device.type == "cpu" else 0)


def check_training_memory(
    dataset: Dataset, spec: ModelSpec, recipe: TrainingRecipe, device: torch.device, *, saves: bool
) -> None:
    """Refuse a training that does not fit the memory.

    Args:
        dataset, spec, recipe: what is trained.
        device: where.
        saves: whether the unfinished run is written to a file.

    Raises:
        InputError: with the arithmetic and what to do.
    """
    need = TrainingMemory.of(spec, recipe, len(dataset), device, saves=saves)
    total, free = need.on_device(device), device_facts(device).memory
    if total > free:
        saved = device.type == "cpu" and need.saved > need.at_work
        copies = kept_copies(recipe) + (saved_copies(recipe) if saved else 0)
        largest = max(zip(spec.widths, spec.widths[1:], strict=False), key=math.prod)
        rest = need.examples + (0 if saved else need.at_work)
        more = (", the average" if recipe.average > 0 else "") + (", copies to save" if saved else "")
        raise InputError(
            f"training needs about {_gib(total)}, {_gib(free)} are free ({device}): {spec.n_parameters:,} weights (the "
            f"largest layer has {largest[0]:,} x {largest[1]:,}) x {ITEM} bytes x {copies} (gradients, Adam's moments, "
            f"the best so far{more}) = {_gib(copies * ITEM * spec.n_parameters)}, and {_gib(rest)} for batches of "
            f"{recipe.batch_size:,} and examples of {spec.dim:,} values; "
            f"{_remedy(dataset, spec, recipe, device, free, saves)}"
        )
    if device.type != "cpu" and need.saved > available_memory():
        raise InputError(
            f"writing the unfinished run takes {_gib(need.saved)} of main memory, {_gib(available_memory())} are free: "
            "use narrower layers (--hidden)"
        )


def _remedy(
    dataset: Dataset, spec: ModelSpec, recipe: TrainingRecipe, device: torch.device, free: int, saves: bool
) -> str:
    """Smaller pictures that would fit, or else narrower layers."""
    if is_image_shape(spec.sample_shape):
        height, width, *colours = spec.sample_shape
        for factor in range(2, min(height, width) + 1):
            shape = (height // factor, width // factor, *colours)
            dim = math.prod(shape)
            smaller = ModelSpec((dim, *spec.widths[1:-1], dim))
            need = TrainingMemory.of(smaller, recipe, len(dataset), device, saves=saves)
            if need.on_device(device) <= free:
                return (
                    f"resize the pictures, to {shape[1]} x {shape[0]} or less, or use narrower layers (--hidden) or a "
                    "smaller batch (--batch-size)"
                )
    return "use narrower layers (--hidden), a smaller batch (--batch-size) or examples of fewer values"


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB"
