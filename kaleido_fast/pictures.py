"""Pictures of samples."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from kaleido_fast.checkpoint import Scaling
from kaleido_fast.errors import InputError
from kaleido_fast.files import atomic_path
from kaleido_fast.model import ModelSpec

_GAP = 1
_CELL_PIXELS = 24
_GAP_GREY = 96


def is_image_shape(shape: tuple[int, ...]) -> bool:
    """Whether one sample is a picture: (height, width) grey or (height, width, 3) colour, 2 pixels or more."""
    return (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)) and min(shape[:2]) >= 2


def to_bytes(samples: Tensor, spec: ModelSpec, scaling: Scaling) -> Tensor:
    """Samples (n, D) in model values -> (n, *sample_shape) uint8: scaling undone, raw black and white to 0 and 255.

    Raises:
        InputError: samples that are NaN, or of another size than the model's.
    """
    if samples.shape[-1] != spec.dim:
        raise InputError(f"samples have {samples.shape[-1]} values, the model {spec.dim}: they do not belong together")
    if bool(torch.isnan(samples).any()):
        raise InputError("the samples hold NaN: there is nothing to draw; look at their outcome")
    black, white = (scaling.undo(torch.tensor(value)) for value in (spec.low, spec.high))
    share = (scaling.undo(samples) - black) / (white - black)
    return (share.clamp(0, 1) * 255).round().to(torch.uint8).reshape(-1, *spec.sample_shape)


def image_grid(samples: Tensor, spec: ModelSpec, scaling: Scaling, *, columns: int | None = None) -> Image.Image:
    """A sheet of samples (n, D), row by row; cells are enlarged by a whole factor to about 24 pixels.

    Raises:
        InputError: no samples, or a model whose samples are not pictures.
    """
    if not is_image_shape(spec.sample_shape):
        raise InputError(
            f"samples of shape {spec.sample_shape} are not pictures: only (H, W) and (H, W, 3) can be drawn"
        )
    if not len(samples):
        raise InputError("no samples to draw: ask for at least one")
    pixels = to_bytes(samples, spec, scaling)
    columns = columns or max(1, round(math.sqrt(1.6 * len(pixels))))
    rows = -(-len(pixels) // columns)
    height, width = spec.sample_shape[:2]
    colour = spec.sample_shape[2:]
    sheet = torch.full((rows * columns, height + _GAP, width + _GAP, *colour), _GAP_GREY, dtype=torch.uint8)
    sheet[: len(pixels), :height, :width] = pixels
    sheet = sheet.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    image = Image.fromarray(sheet[:-_GAP, :-_GAP].contiguous().numpy())
    factor = max(1, _CELL_PIXELS // max(height, width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a picture as PNG; it appears when whole."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
