"""Moving pictures of chains: frames from traced states, written as GIF and MP4."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kaleido_fast.checkpoint import Scaling
from kaleido_fast.errors import InputError
from kaleido_fast.files import atomic_path
from kaleido_fast.model import ModelSpec
from kaleido_fast.pictures import image_grid, is_image_shape

MOST_FRAMES = 80
SQUARE = 360  # pixels of a frame of points
_MARGIN = 8
_LABEL = 18
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22")


def frame_steps(n_steps: int, most: int = MOST_FRAMES) -> tuple[int, ...]:
    """Steps to show of a run: 0, then every one while there is room, then ever wider apart up to ``n_steps``."""
    if n_steps < most:
        return tuple(range(n_steps + 1))
    head = most // 2
    ratio = (n_steps / head) ** (1 / (most - head))
    steps = {*range(head + 1), *(round(head * ratio**i) for i in range(most - head)), n_steps}
    return tuple(sorted(steps))


def can_animate(spec: ModelSpec) -> bool:
    """Whether samples can be shown moving: pictures, or one or two values."""
    return is_image_shape(spec.sample_shape) or spec.dim <= 2


def make_frames(states: Tensor, steps: Sequence[int], spec: ModelSpec, scaling: Scaling) -> list[Image.Image]:
    """One frame for each step: a sheet of all chains, or their positions for samples of one or two values.

    Args:
        states: (chains, steps, D) in model values.
        steps: step numbers, written on the frames.

    Raises:
        InputError: no states, states that are NaN, or a model that cannot be shown.
    """
    if not states.numel():
        raise InputError("no states to show: ask for at least one chain and one step")
    if bool(torch.isnan(states).any()):
        raise InputError("the states hold NaN: there is nothing to draw; look at the run's outcome")
    if is_image_shape(spec.sample_shape):
        bodies = [image_grid(states[:, i], spec, scaling).convert("RGB") for i in range(len(steps))]
    elif spec.dim <= 2:
        bodies = _points(states, spec)
    else:
        raise InputError(
            f"samples of shape {spec.sample_shape} are neither pictures nor points: pass --shape HEIGHT,WIDTH"
        )
    return [with_label(body, step_name(step)) for body, step in zip(bodies, steps, strict=True)]


def step_name(step: int) -> str:
    """What is written on a frame."""
    return "start noise" if step == 0 else f"step {step}"


def with_label(body: Image.Image, text: str) -> Image.Image:
    """A picture with a line of text above."""
    page = Image.new("RGB", (max(body.width, 90), body.height + _LABEL), "white")
    page.paste(body, (0, _LABEL))
    ImageDraw.Draw(page).text((4, 2), text, fill="black", font=ImageFont.load_default(12))
    return page


def _points(states: Tensor, spec: ModelSpec) -> list[Image.Image]:
    """Chains as dots, coloured by where they end; one value goes along x, with the chain's number along y."""
    chains, n_steps, dim = states.shape
    share = ((states.float() - spec.low) / (spec.high - spec.low)).clamp(0, 1)
    across = share[..., 0]
    up = share[..., 1] if dim == 2 else (torch.arange(chains) / max(1, chains - 1))[:, None].expand(chains, n_steps)
    last = share[:, -1]
    cells = (last * 8).floor().clamp_max(7).to(torch.int64)
    colour = (cells[:, 0] * 3 + (cells[:, 1] * 5 if dim == 2 else 0)).tolist()
    room = SQUARE - 2 * _MARGIN
    frames = []
    for i in range(n_steps):
        frame = Image.new("RGB", (SQUARE, SQUARE), "#f4f4f4")
        pen = ImageDraw.Draw(frame)
        xs, ys = _MARGIN + across[:, i] * room, SQUARE - _MARGIN - up[:, i] * room
        for x, y, number in zip(xs.tolist(), ys.tolist(), colour, strict=True):
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=_COLOURS[number % len(_COLOURS)])
        frames.append(frame)
    return frames


def strip(states: Tensor, steps: Sequence[int], spec: ModelSpec, scaling: Scaling) -> Image.Image:
    """Rows of chains over steps: (chains, steps, D) as one picture, the step above each column."""
    sheet = image_grid(states.flatten(0, 1), spec, scaling, columns=len(steps)).convert("RGB")
    page = Image.new("RGB", (sheet.width, sheet.height + _LABEL), "white")
    page.paste(sheet, (0, _LABEL))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for i, step in enumerate(steps):
        middle = (i + 0.5) * sheet.width / len(steps)
        pen.text((middle, 3), str(step), fill="black", font=font, anchor="ma")
    return page


def write_gif(frames: Sequence[Image.Image], path: Path, *, frames_per_second: float = 8.0, hold: float = 2.0) -> None:
    """Write frames as a GIF that loops; the last frame stays for ``hold`` seconds. It appears when whole."""
    each = round(1000 / frames_per_second)
    times = [each] * (len(frames) - 1) + [round(1000 * hold)]
    reduced = [frame.quantize(64, dither=Image.Dither.NONE) for frame in frames]
    with atomic_path(path) as temporary:
        reduced[0].save(
            temporary, format="GIF", save_all=True, append_images=reduced[1:], duration=times, loop=0, optimize=True
        )


NO_FFMPEG = "MP4 needs the program ffmpeg, which is not on the path: install it from your system's packages"


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
