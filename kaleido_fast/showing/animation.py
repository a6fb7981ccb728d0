"""Moving pictures of chains: frames from traced states, written as GIF and MP4."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kaleido_fast.errors import InputError
from kaleido_fast.showing.pictures import image_grid
from kaleido_fast.showing.states import Shown
from kaleido_fast.system.files import atomic_path

SQUARE = 360  # pixels of a frame
WIDE = 880  # pixels of a strip
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22")
_MARGIN = 8
_LABEL = 18
_BAR = 4


def check_can_show(shown: Shown) -> None:
    """Refuse samples that are neither pictures nor points: `InputError`."""
    if not shown.are_pictures and shown.spec.dim > 2:
        raise InputError(
            f"samples of shape {shown.spec.sample_shape} are neither pictures nor points of one or two values: "
            f"pass --shape HEIGHT,WIDTH, with a product of {shown.spec.dim}"
        )


def make_frames(shown: Shown) -> list[Image.Image]:
    """One frame for each step: a sheet of all chains, or their positions for samples of one or two values.

    The step's number, or its caption, stands above, and a bar below shows how far the run is.

    Raises:
        InputError: samples that are neither pictures nor points.
    """
    check_can_show(shown)
    if shown.are_pictures:
        columns = range(len(shown.steps))
        bodies = [enlarged(image_grid(shown.states[:, i], shown.spec, shown.scaling), SQUARE) for i in columns]
    else:
        bodies = _points(shown)
    last = max(shown.steps[-1], 1)
    parts = zip(bodies, shown.titles, shown.steps, strict=True)
    return [_framed(body, title, step / last) for body, title, step in parts]


def there_and_back(frames: list[Image.Image]) -> list[Image.Image]:
    """Frames that lead to the last one and back again, so that a repetition does not jump."""
    return [*frames, *frames[-2:0:-1]]


def enlarged(sheet: Image.Image, width: int) -> Image.Image:
    """The sheet in colour, enlarged by a whole factor up to ``width`` pixels."""
    factor = max(1, width // sheet.width)
    return sheet.convert("RGB").resize((sheet.width * factor, sheet.height * factor), Image.Resampling.NEAREST)


def _framed(body: Image.Image, title: str, share: float) -> Image.Image:
    page = Image.new("RGB", (max(body.width, 90), body.height + _LABEL + _BAR), "white")
    page.paste(body, (0, _LABEL))
    pen = ImageDraw.Draw(page)
    pen.text((4, 2), title, fill="black", font=ImageFont.load_default(12))
    if share > 0:
        pen.rectangle((0, page.height - _BAR, round(share * (page.width - 1)), page.height), fill=COLOURS[0])
    return page


def end_colours(shown: Shown) -> list[str]:
    """A colour for each chain by where it is at the last step, for samples of one or two values."""
    last = _share(shown.states[:, -1], shown)
    cells = (last * 8).floor().clamp_max(7).to(torch.int64)
    _, numbers = cells.unique(dim=0, return_inverse=True)
    return [COLOURS[number % len(COLOURS)] for number in numbers.tolist()]


def places(shown: Shown) -> Tensor:
    """Where chains are in a square, (chains, steps, 2) from 0 to 1; of one value y is the chain's number."""
    across = _share(shown.states, shown)
    if across.shape[2] == 1:
        chains = len(across)
        up = (torch.arange(chains) + 0.5) / chains
        across = torch.cat([across, up[:, None, None].expand(chains, across.shape[1], 1)], dim=2)
    return across


def _share(values: Tensor, shown: Shown) -> Tensor:
    low, high = shown.spec.low, shown.spec.high
    return ((values - low) / (high - low)).clamp(0, 1)


def _points(shown: Shown) -> list[Image.Image]:
    """Chains as dots, coloured by where they end."""
    room = SQUARE - 2 * _MARGIN
    where, colours = places(shown) * room + _MARGIN, end_colours(shown)
    frames = []
    for i in range(len(shown.steps)):
        frame = Image.new("RGB", (SQUARE, SQUARE), "#f4f4f4")
        pen = ImageDraw.Draw(frame)
        for (x, y), colour in zip(where[:, i].tolist(), colours, strict=True):
            pen.ellipse((x - 2, SQUARE - y - 2, x + 2, SQUARE - y + 2), fill=colour)
        frames.append(frame)
    return frames


def strip(shown: Shown) -> Image.Image:
    """Rows of chains over steps as one picture, the step or its caption above each column.

    Raises:
        InputError: samples that are not pictures.
    """
    sheet = image_grid(shown.states.flatten(0, 1), shown.spec, shown.scaling, columns=len(shown.steps))
    sheet = enlarged(sheet, WIDE)
    page = Image.new("RGB", (sheet.width, sheet.height + _LABEL), "white")
    page.paste(sheet, (0, _LABEL))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for i, text in enumerate(shown.captions or map(str, shown.steps)):
        middle = (i + 0.5) * sheet.width / len(shown.steps)
        pen.text((middle, 3), text, fill="black", font=font, anchor="ma")
    return page


def write_gif(
    frames: Sequence[Image.Image],
    path: Path,
    *,
    frames_per_second: float = 8.0,
    hold: float = 2.0,
    colours: int = 64,
) -> None:
    """Write frames as a GIF that loops, with ``colours`` (2 to 256) of its own each; the last frame stays for ``hold``
    seconds, but no shorter than the others. It appears when whole."""
    each = round(1000 / frames_per_second)
    times = [each] * (len(frames) - 1) + [max(each, round(1000 * hold))]
    reduced = [frame.quantize(colours, dither=Image.Dither.NONE) for frame in frames]
    with atomic_path(path) as temporary:
        reduced[0].save(
            temporary, format="GIF", save_all=True, append_images=reduced[1:], duration=times, loop=0, optimize=True
        )


NO_FFMPEG = "MP4 needs the program ffmpeg, which is not on the path: install it from your system's packages"


def can_write_mp4() -> bool:
    """Whether ffmpeg is there."""
    return shutil.which("ffmpeg") is not None


def write_mp4(frames: Iterable[Image.Image], path: Path, *, frames_per_second: float = 8.0) -> None:
    """Write frames of one size as MP4 (H.264) through ffmpeg; it appears when whole.

    Raises:
        InputError: no ffmpeg, or ffmpeg failed.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        raise InputError(NO_FFMPEG)
    pages = [frame.convert("RGB") for frame in frames]
    width, height = pages[0].size
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{frames_per_second:g}"]
    even = "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white"  # H.264 wants even sizes
    with atomic_path(path) as temporary:
        target = ["-vf", even, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(temporary)]
        ended = subprocess.run(
            [program, "-y", "-loglevel", "error", *source, "-i", "-", *target],
            input=b"".join(page.tobytes() for page in pages),
            capture_output=True,
            check=False,
        )
        if ended.returncode:
            text = " ".join(ended.stderr.decode(errors="replace").split())[:200]
            raise InputError(f"cannot write {path}: ffmpeg failed: {text}; write a GIF instead")
