"""Samples as pictures, each above the training example that is nearest to it."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from kaleido_fast.checkpoint import Scaling
from kaleido_fast.errors import InputError
from kaleido_fast.evaluating.quality import nearest_examples
from kaleido_fast.model import ModelSpec
from kaleido_fast.showing.pictures import image_grid, is_image_shape

SHEET_COLUMNS, SHEET_ROWS = 20, 6


def check_sheet(spec: ModelSpec) -> None:
    """Refuse a sheet of samples that are not pictures: `InputError`."""
    if not is_image_shape(spec.sample_shape):
        raise InputError(
            f"samples of shape {spec.sample_shape} are not pictures, so there is no sheet of them: leave it out; "
            "kaleido-fast show plots samples of 1 or 2 values"
        )


def look_sheet(samples: Tensor, train: Tensor | None, spec: ModelSpec, scaling: Scaling) -> Image.Image:
    """Samples (n, D), and below each row of them the nearest training examples (m, D); without those, samples alone.

    Raises:
        InputError: a model whose samples are not pictures.
    """
    check_sheet(spec)
    columns = min(SHEET_COLUMNS, len(samples))
    rows = min(SHEET_ROWS, len(samples) // columns)
    shown = samples[: rows * columns]
    if train is not None:
        beside = train[nearest_examples(shown, train)[0]]
        pairs = (shown.unflatten(0, (rows, columns)), beside.unflatten(0, (rows, columns)))
        shown = torch.stack(pairs, dim=1).flatten(0, 2)
    return image_grid(shown, spec, scaling, columns=columns)
