"""Pictures, read by Pillow as people see them: turned upright, without transparency, with their palette applied."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageOps

from kaleido_fast.errors import InputError
from kaleido_fast.model import MAX_WIDTH
from kaleido_fast.names import IMAGE_SUFFIXES
from kaleido_fast.reading.raw_data import MAX_BYTES, RawData, reading

# Not all that Pillow knows: it runs another program on EPS.
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "TGA", "AVIF")
_ALWAYS_COLOUR = ("GIF", "WEBP")  # formats that hold grey pictures in colours
_ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Picture:
    """One picture: values (height, width) or (height, width, 3) of bytes, or of the wider type it was stored in.

    Args:
        name: where it comes from, for messages.
        values: bytes, or the wider type.
        value_range: raw values of black and white; None where the format does not define them.
        from_palette: a grey picture out of a format that knows colours only: it may join coloured ones.
        transparent: whether it was laid over the background.
        shortened: whether Pillow gave 8 of the 16 bits of each colour.
        n_frames: frames or pages of the file, of which this is one.
        complaint: what Pillow found wrong with a file that it could read.
    """

    name: str
    values: np.ndarray
    value_range: tuple[float, float] | None
    from_palette: bool = False
    transparent: bool = False
    shortened: bool = False
    n_frames: int = 1
    complaint: str = ""

    @property
    def size_text(self) -> str:
        """Its size in words."""
        kind = "grey" if self.values.ndim == 2 else "colour"
        bits = "" if self.values.dtype == np.uint8 else f", {self.values.dtype}"
        return f"{self.values.shape[1]} x {self.values.shape[0]} {kind}{bits}"


def check_background(background: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour by its name or as #rrggbb; an unknown one raises `InputError`."""
    try:
        return ImageColor.getrgb(background)[:3]
    except (ValueError, AttributeError, TypeError) as problem:
        raise InputError(
            f"background {background!r} is no colour: give a name such as white or black, or #rrggbb"
        ) from problem


def read_picture_file(path: Path, background: str) -> RawData:
    """The picture in a file, or all its frames or pages: each is an example."""
    with _opened(path) as (image, complaints):
        n_frames = _count_frames(image)
        frames: list[Picture] = []
        for i in range(n_frames):
            image.seek(i)
            picture = as_picture(image, str(path) if n_frames == 1 else f"{path} (frame {i + 1})", background)
            frames.append(replace(picture, n_frames=1, complaint=_first(complaints)))  # no frame is left out
            _check_total(frames[0], n_frames)
    raw = gather(path.name, frames, background)
    said = () if n_frames == 1 else (f"its {n_frames:,} frames or pages are the examples",)
    return RawData(raw.name, raw.values, None, raw.value_range, (*said, *raw.notes))


def read_picture_files(name: str, paths: Sequence[Path], background: str) -> RawData:
    """One example a file; of files with several frames or pages the first."""
    pictures = []
    for path in paths:
        with _opened(path) as (image, complaints):
            picture = as_picture(image, str(path), background)
            pictures.append(replace(picture, complaint=_first(complaints)))
        _check_total(pictures[0], len(paths))
    return gather(name, pictures, background)


def as_picture(image: Image.Image, name: str, background: str) -> Picture:
    """The current frame of an image.

    Raises:
        InputError: larger than a network can be, or transparent with more than 8 bits.
    """
    colour = check_background(background)
    wide = image.mode.startswith(("I", "F"))
    _check_area(name, image.width, image.height, 1 if wide or image.mode in ("1", "L", "LA") else 3)
    facts: dict[str, Any] = {"n_frames": _count_frames(image), "shortened": _is_shortened(image)}
    colours_only = image.format in _ALWAYS_COLOUR or image.mode in ("P", "PA")
    clear = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    if wide and clear:
        raise InputError(
            f"{name} is transparent with more than 8 bits (mode {image.mode}): save it without transparency"
        )
    of_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    image = _upright(image)
    if wide:  # some versions of Pillow give 16 bits as 32
        values = np.asarray(image).astype(np.uint16 if of_16_bits else np.int32 if image.mode[0] == "I" else np.float32)
        return Picture(name, values, (0.0, 65_535.0) if of_16_bits else None, **facts)
    grey = image.mode in ("1", "L", "LA", "La")
    if clear:
        image = image.convert("RGBA")
        facts["transparent"] = bool((np.asarray(image.getchannel("A")) < 255).any())
        if facts["transparent"]:
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*colour, 255)), image)
            grey = grey and len(set(colour)) == 1
    values = np.asarray(image.convert("L" if grey else "RGB"))
    if not grey and colours_only and (values == values[..., :1]).all():
        values, facts["from_palette"] = values[..., 0], True
    return Picture(name, values, (0.0, 255.0), **facts)


def gather(name: str, pictures: Sequence[Picture], background: str) -> RawData:
    """Pictures of one size as (n, height, width) or (n, height, width, 3), with notes on them.

    Raises:
        InputError: they are not alike.
    """
    if any(picture.values.ndim == 3 for picture in pictures):
        pictures = [_coloured(picture) if picture.from_palette else picture for picture in pictures]
    first = pictures[0]
    for other in pictures:
        if (other.values.shape, other.values.dtype) != (first.values.shape, first.values.dtype):
            raise InputError(
                f"{first.name} is {first.size_text} and {other.name} is {other.size_text}: all images must be alike"
            )
    values = np.stack([picture.values for picture in pictures])
    return RawData(name, values, None, first.value_range, tuple(_remarks(pictures, background)))


def _remarks(pictures: Sequence[Picture], background: str) -> Iterator[str]:
    clear = sum(picture.transparent for picture in pictures)
    if clear:
        yield (
            f"{clear:,} of {len(pictures):,} pictures are transparent: laid over {background}; "
            "background= (--background) takes another colour"
        )
    shortened = sum(picture.shortened for picture in pictures)
    if shortened:
        yield f"{shortened:,} of {len(pictures):,} pictures have 16 bits a colour, of which the upper 8 are read"
    doubtful = [picture for picture in pictures if picture.complaint]
    if doubtful:
        worst = doubtful[0]
        yield f"{len(doubtful):,} of {len(pictures):,} pictures may be damaged: {worst.name}: {worst.complaint}"
    several = [picture for picture in pictures if picture.n_frames > 1]
    if several:
        yield (
            f"{len(several):,} of {len(pictures):,} files hold several frames or pages ({several[0].name}: "
            f"{several[0].n_frames:,}): the first of each is read; give one file by itself to have all of its frames"
        )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Image.Image, list[warnings.WarningMessage]]]:
    """An image, and a list to which Pillow adds what it finds wrong with it."""
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    with reading(path, "an image"), warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=known) as image:
            yield image, complaints


def _first(complaints: list[warnings.WarningMessage]) -> str:
    return " ".join(str(complaints[0].message).split()) if complaints else ""


def _count_frames(image: Image.Image) -> int:
    """Frames or pages; a phone's MPO file holds one picture, beside what the camera needs."""
    return 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))


def _is_shortened(image: Image.Image) -> bool:
    """Whether a picture with 16 bits a colour is decoded to 8: only what Pillow hands to its decoders says so."""
    if image.mode.startswith(("I", "F")):
        return False
    handed = [entry for tile in getattr(image, "tile", None) or () for entry in tile[3:]]
    flat = [part for entry in handed for part in (entry if isinstance(entry, tuple) else (entry,))]
    if image.format == "PPM":
        return any(isinstance(part, int) and part > 255 for part in flat)
    return any(isinstance(part, str) and ";16" in part for part in flat)


def _upright(image: Image.Image) -> Image.Image:
    """The frame as its camera was held."""
    if image.getexif().get(_ORIENTATION, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _coloured(picture: Picture) -> Picture:
    values = picture.values if picture.values.ndim == 3 else np.repeat(picture.values[..., None], 3, axis=2)
    return replace(picture, values=values)


def _check_area(name: str, width: int, height: int, channels: int) -> None:
    if width * height * channels > MAX_WIDTH:
        raise InputError(f"{name} is {width} x {height}: at most {MAX_WIDTH:,} values are read; shrink it")


def _check_total(first: Picture, n: int) -> None:
    if first.values.nbytes * n > MAX_BYTES:
        raise InputError(f"{n:,} images like {first.name} fill {first.values.nbytes * n:,} bytes: too many")


# --- folders


def image_paths(folder: Path) -> list[Path]:
    """The pictures in a folder, by name; hidden files are passed over."""
    return [path for path in visible(folder) if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES]


def visible(folder: Path) -> list[Path]:
    """What a folder holds, by name, without hidden files and those that systems leave there."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith((".", "__")) and p.name not in _JUNK)


_JUNK = ("Thumbs.db", "desktop.ini")


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """Pictures in the folders of a folder, which are their classes."""
    found = {entry.name: image_paths(entry) for entry in visible(folder) if entry.is_dir()}
    return {name: paths for name, paths in found.items() if paths}


def read_class_folders(folder: Path, classes: dict[str, list[Path]], background: str) -> RawData:
    """One example a picture, its label from its folder: the number that is its name, or its place among the names."""
    names = sorted(classes)
    numbered = all(name.isascii() and name.isdigit() and len(name) < 10 for name in names)
    numbers = [int(name) if numbered else i for i, name in enumerate(names)]
    if len(set(numbers)) < len(numbers):  # such as 1 and 01
        numbered, numbers = False, list(range(len(names)))
    labels = np.repeat(np.array(numbers), [len(classes[name]) for name in names])
    raw = read_picture_files(folder.name, [path for name in names for path in classes[name]], background)
    said = "" if numbered else _shortened_list([f"{i} {name}" for i, name in enumerate(names)])
    notes = raw.notes if numbered else (*raw.notes, f"labels from the folders' names: {said}")
    return RawData(raw.name, raw.values, labels, raw.value_range, notes)


def left_out(folder: Path, taken: Sequence[Path]) -> tuple[str, ...]:
    """What to say of files and folders of pictures that are not read."""
    rest = [path for path in visible(folder) if path not in set(taken)]
    files = Counter(path.suffix.lower() or path.name for path in rest if path.is_file())
    parts = [f"{n:,} {ending}" for ending, n in files.most_common()]
    parts += [f"the folder {path.name}" for path in rest if path.is_dir() and image_paths(path)]
    return (f"left out, as no pictures of this folder: {_shortened_list(parts)}",) if parts else ()


def _shortened_list(parts: Sequence[str], most: int = 8) -> str:
    more = f" and {len(parts) - most:,} more" if len(parts) > most else ""
    return ", ".join(parts[:most]) + more
