"""Pictures of samples."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kaleido_fast.checkpoint import Scaling
from kaleido_fast.errors import InputError
from kaleido_fast.model import ModelSpec
from kaleido_fast.system.files import atomic_path

_GAP = 1
_CELL_PIXELS = 24
_GAP_GREY = 96
_CAPTION_POINTS = 11
_CAPTION_GREY = 224


def is_image_shape(shape: tuple[int, ...]) -> bool:
    """Whether one sample is a picture: (height, width) grey or (height, width, 3) colour, 2 pixels or more."""
    return (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)) and min(shape[:2]) >= 2


def check_pictures(spec: ModelSpec) -> None:
    """Refuse samples that are not pictures: `InputError`."""
    if not is_image_shape(spec.sample_shape):
        raise InputError(
            f"samples of shape {spec.sample_shape} are not pictures: only (H, W) and (H, W, 3) can be drawn; "
            "kaleido-fast show plots draws of 1 or 2 values"
        )


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


def image_grid(
    samples: Tensor, spec: ModelSpec, scaling: Scaling, *, columns: int | None = None, pixels: int = _CELL_PIXELS
) -> Image.Image:
    """A sheet of samples (n, D), row by row; cells are enlarged by a whole factor to about ``pixels``.

    Raises:
        InputError: no samples, or a model whose samples are not pictures.
    """
    check_pictures(spec)
    if not len(samples):
        raise InputError("no samples to draw: ask for at least one")
    values = to_bytes(samples, spec, scaling)
    columns = min(columns or max(1, round(math.sqrt(1.6 * len(values)))), len(values))
    rows = -(-len(values) // columns)
    height, width = spec.sample_shape[:2]
    colour = spec.sample_shape[2:]
    sheet = torch.full((rows * columns, height + _GAP, width + _GAP, *colour), _GAP_GREY, dtype=torch.uint8)
    sheet[: len(values), :height, :width] = values
    sheet = sheet.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    image = Image.fromarray(sheet[:-_GAP, :-_GAP].contiguous().numpy())
    factor = max(1, pixels // max(height, width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def sample_images(samples: Tensor, spec: ModelSpec, scaling: Scaling, *, pixels: int) -> list[Image.Image]:
    """Samples (n, D) as one picture each, enlarged by a whole factor to about ``pixels``.

    Raises:
        InputError: no samples, or a model whose samples are not pictures.
    """
    return [image_grid(sample[None], spec, scaling, columns=1, pixels=pixels) for sample in samples]


def captioned_grid(pictures: list[Image.Image], captions: list[str]) -> Image.Image:
    """Pictures of one size with a caption under each, row by row, on grey."""
    font = ImageFont.load_default(_CAPTION_POINTS)
    width = max(pictures[0].width, *(math.ceil(font.getlength(text)) for text in captions)) + 4
    height = pictures[0].height + _CAPTION_POINTS + 6
    columns = max(1, round(math.sqrt(1.6 * len(pictures) * height / width)))
    rows = -(-len(pictures) // columns)
    grey = (_GAP_GREY // 2,) * 3
    sheet = Image.new("RGB", (columns * width, rows * height), grey)
    draw = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(i, columns)
        left, top = column * width + (width - picture.width) // 2, row * height + 2
        sheet.paste(picture, (left, top))
        middle = (column * width + width / 2, top + picture.height + 1)
        draw.text(middle, text, fill=(_CAPTION_GREY,) * 3, font=font, anchor="ma")
    return sheet


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a picture as PNG; it appears when whole."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
