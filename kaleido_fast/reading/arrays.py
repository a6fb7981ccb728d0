"""Arrays of examples and classes as callers have them: in memory, of any library, with colours on any axis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.names import CHANNELS
from kaleido_fast.reading.image_files import as_picture, gather
from kaleido_fast.reading.raw_data import RawData, natural_range

COLOURS = (1, 3)
LEAST_PICTURE = 8  # pixels: smaller arrays are seldom photographs
ACCEPTED = "an array or a tensor (n, ...), pictures of Pillow, a path, or the name of a data set"


def read_memory(source: Any, background: str) -> RawData:
    """Examples that are in memory: an array, a tensor, a picture of Pillow, or a list of them.

    Raises:
        InputError: something else, with what to do.
    """
    if isinstance(source, Image.Image):
        return gather("picture", [as_picture(source, "the picture", background)], background)
    if isinstance(source, (list, tuple)) and source and all(isinstance(one, Image.Image) for one in source):
        pictures = [as_picture(one, f"picture {i}", background) for i, one in enumerate(source)]
        return gather("pictures", pictures, background)
    values = to_array(source, "data")
    return RawData("array", values, None, natural_range(values.dtype))


def to_array(source: Any, what: str) -> np.ndarray:
    """Numbers as a numpy array: of tensors of any device, lists, and whatever numpy understands.

    Raises:
        InputError: masked, sparse, ragged, or no numbers.
    """
    if isinstance(source, Tensor):
        return _tensor_array(source, what)
    if isinstance(source, np.ma.MaskedArray) and np.ma.is_masked(source):
        raise InputError(f"{what}: {np.ma.count_masked(source):,} values are masked: fill or drop them first")
    if isinstance(source, (list, tuple)) and source and all(isinstance(one, Tensor) for one in source):
        source = [_tensor_array(one, what) for one in source]
    if not isinstance(source, (np.ndarray, list, tuple, range)) and not hasattr(source, "__array__"):
        raise _not_data(source, what)
    try:
        values = np.asarray(source)
    except Exception as problem:  # what other libraries raise here is theirs to choose
        raise _not_data(source, what) from problem
    if values.dtype.kind not in "buif" or values.dtype.itemsize > 8:
        raise InputError(
            f"{what} of type {type(source).__name__} hold values of type {values.dtype}: give real numbers"
        )
    return values


def _tensor_array(tensor: Tensor, what: str) -> np.ndarray:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
        kind = f"{tensor.layout}, {tensor.dtype}, {tensor.device}"
        raise InputError(f"{what}: a tensor of {kind}: give a dense tensor of real numbers, such as by .to_dense()")
    tensor = tensor.detach().cpu().resolve_neg()
    if tensor.is_floating_point() and tensor.dtype not in (torch.float64, torch.float32, torch.float16):
        tensor = tensor.float()  # numpy has no bfloat16 nor 8 bits; every value of theirs is one of float32
    return tensor.numpy()


def _not_data(source: Any, what: str) -> InputError:
    if isinstance(source, (torch.utils.data.Dataset, torch.utils.data.DataLoader)):
        return InputError(
            f"{what}: a {type(source).__name__} of torch: stack its examples, such as "
            "torch.stack([x for x, _ in data]), and pass those"
        )
    if hasattr(source, "toarray"):
        return InputError(f"{what}: a sparse {type(source).__name__}: pass its toarray()")
    if isinstance(source, (list, tuple)):
        return InputError(
            f"{what}: a {type(source).__name__} of {len(source)} entries that are not numbers of one shape: stack the "
            "examples in one array, and give classes as labels="
        )
    return InputError(f"{what}: a {type(source).__name__} is no data: give {ACCEPTED}")


def place_channels(raw: RawData, channels: str | None) -> RawData:
    """Arrays of pictures with their colours last, and without an axis of one colour.

    Args:
        raw: values (n, ...), or one picture where ``channels`` says so.
        channels: "first", "last" or "none" (no axis of colours); None finds out.

    Raises:
        InputError: the shape does not show it.
    """
    values = raw.values
    if channels is not None and channels not in CHANNELS:
        raise unknown_name("channels", channels, CHANNELS)
    if channels == "none" or values.ndim not in (3, 4):
        return raw
    if values.ndim == 3:
        if channels is None:
            _refuse_one_picture(raw)
            return raw
        values = values[None]
    first, last = values.shape[1] in COLOURS, values.shape[3] in COLOURS
    if channels is None and first and last and max(values.shape[1:]) > 1:
        raise InputError(
            f"data {raw.name}: examples of shape {values.shape[1:]} may have their colours first or last: "
            "pass channels='first', 'last' or 'none' (--channels)"
        )
    if channels == "first" or (channels is None and first and not last):
        values = values.transpose(0, 2, 3, 1)
        note = f"colours come first in {raw.values.shape[-3:]}: examples are taken as {_size(values)}"
        raw = replace(raw, notes=(*raw.notes, note) if channels is None else raw.notes)
    elif channels is None and not last:
        return _with_note_on_four(raw)
    if values.shape[3] == 1:
        values = values[..., 0]
    return replace(raw, values=values)


def _size(values: np.ndarray) -> str:
    height, width, colours = values.shape[1:]
    return f"{width} x {height} {'grey' if colours == 1 else 'colour'} pictures"


def _refuse_one_picture(raw: RawData) -> None:
    a, b, c = raw.values.shape
    one_last = raw.values.dtype == np.uint8 and c in (3, 4) and min(a, b) >= LEAST_PICTURE
    if one_last or (a == 3 and min(b, c) >= LEAST_PICTURE):
        raise InputError(
            f"data {raw.name} of shape {raw.values.shape} may be one colour picture or {a:,} examples of shape "
            f"{(b, c)}: pass channels={'last' if one_last else 'first'!r} for one picture, channels='none' for examples"
        )


def _with_note_on_four(raw: RawData) -> RawData:
    shape = raw.values.shape[1:]
    if raw.values.dtype != np.uint8 or 4 not in (shape[0], shape[2]):
        return raw
    note = f"examples of shape {shape} have four values a pixel: all are learned, and cannot be shown as pictures"
    return replace(raw, notes=(*raw.notes, f"{note}; drop the fourth where it is transparency"))


def as_classes(labels: np.ndarray, n: int, name: str) -> np.ndarray:
    """Classes int64 (n,) of labels that may be (n, 1), truth values, or whole numbers written as floats.

    Raises:
        InputError: they are something else.
    """
    flat = labels.reshape(-1) if labels.shape in ((n, 1), (1, n)) else labels
    if flat.shape != (n,) or flat.dtype.kind not in "buif" or not _are_whole(flat):
        hint = "; of rows with a 1 in the place of the class, take labels.argmax(axis=1)"
        raise InputError(
            f"data {name}: labels of shape {labels.shape} and type {labels.dtype} for {n} examples: "
            f"give one whole number per example{hint if labels.ndim == 2 and labels.shape[0] == n else ''}"
        )
    return flat.astype(np.int64)


def _are_whole(values: np.ndarray) -> bool:
    if values.dtype.kind == "f":
        return bool(np.isfinite(values).all() and (values == np.rint(values)).all() and (np.abs(values) < 2**53).all())
    return values.dtype != np.uint64 or bool((values < 2**63).all())


def as_points(data: Any, dim: int) -> Tensor:
    """Examples in model values as float32 (m, dim): of a tensor or an array (m, ...).

    Raises:
        InputError: they are of another size.
    """
    points = data if isinstance(data, Tensor) else torch.from_numpy(to_array(data, "data").copy())
    if points.ndim < 2 or points[:1].numel() != dim or points.is_complex():
        raise InputError(f"data of shape {tuple(points.shape)}: give (m, {dim}), as the model")
    return points.detach().reshape(len(points), dim).to("cpu", torch.float32)
