"""The same noise under networks of each training: where x <- f(x) and x <- x + h (f(x) - x) take it.

    kaleido-fast train --preset mnist --recipe published --out published.safetensors
    kaleido-fast train --preset mnist --recipe attractors --out attractors.safetensors
    kaleido-fast train --preset mnist --out flow.safetensors
    python examples/same_start.py --published published.safetensors --attractors attractors.safetensors \\
        --flow flow.safetensors --out same-start.png

Each group of rows has one start: the normal noise that the flow begins with. The two kaleidoscopes get it clamped to
the range of the data, as they do with all their inputs, and take as many steps as the flow, without jitter. The last
row is what the flow's network makes of the state above it: where the state is on its way to. Starts are not chosen:
they are the first chains of the seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kaleido_fast import Checkpoint, InputError, Trace, fast_sample, load_checkpoint
from kaleido_fast.showing.pictures import check_pictures, image_grid, save_picture

SHOWN = (0, 0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 0.8, 0.9, 0.95, 1)  # parts of a run
TRAININGS = {"published": "plain loss", "attractors": "one noise level", "flow": "all levels, by parts"}
LABELS = (*TRAININGS.values(), "f(x) of that")
HEADER, MARGIN, GAP, CELL = 18, 124, 10, 56  # pixels


def follow(models: dict[str, Checkpoint], n_starts: int, steps: int, seed: int) -> tuple[tuple[int, ...], Tensor]:
    """States of each model on the way from the same starts.

    Args:
        models: by the names of `TRAININGS`, all of one size and range.
        n_starts: how many.
        steps: of a draw of the flow, and of the others.
        seed: of the starts.

    Returns:
        The steps that are shown, k of them; and (n_starts, 4, k, D): a row for each of `LABELS`.
    """
    shown = tuple(sorted({round(part * steps) for part in SHOWN}))
    trace = Trace(tuple(range(n_starts)), shown)
    options: dict[str, Any] = {"n_chains": n_starts, "seed": seed, "trace": trace}
    network = models["flow"].model
    flow = _states(models["flow"], sampler="flow", steps=steps, **options)
    start = flow[:, 0].clamp(network.spec.low, network.spec.high)
    options |= {"sampler": "kaleidoscope", "burn_in": steps - 1, "thin": 1, "jitter": 0.0, "tol": None, "z0": start}
    others = [_states(models[name], **options) for name in ("published", "attractors")]
    with torch.no_grad():
        answers = network(flow.flatten(0, 1)).unflatten(0, flow.shape[:2])
    return shown, torch.stack([*others, flow, answers], dim=1)


def _states(checkpoint: Checkpoint, **options: Any) -> Tensor:
    found = fast_sample(checkpoint, **options).trace
    assert found is not None
    return found.cpu().float()


def picture(checkpoint: Checkpoint, shown: tuple[int, ...], states: Tensor) -> Image.Image:
    """A group of rows for each start, a column for each step; ``states`` as `follow` gives them."""
    spec, scaling = checkpoint.model.spec, checkpoint.card.scaling
    rows = [image_grid(row, spec, scaling, columns=len(shown), pixels=CELL) for row in states.flatten(0, 1)]
    high, wide = rows[0].height + 1, rows[0].width
    page = Image.new("RGB", (MARGIN + wide, HEADER + len(rows) * high + (len(states) - 1) * GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for column, step in enumerate(shown):
        pen.text((MARGIN + (column + 0.5) * wide / len(shown), 3), str(step), fill="black", font=font, anchor="ma")
    for i, row in enumerate(rows):
        group, place = divmod(i, len(LABELS))
        top = HEADER + i * high + group * GAP
        page.paste(row.convert("RGB"), (MARGIN, top))
        pen.text((MARGIN - 6, top + high / 2), LABELS[place], fill="black", font=font, anchor="rm")
    return page


def load(paths: dict[str, str]) -> dict[str, Checkpoint]:
    """The models, which must be of one kind of picture."""
    models = {name: load_checkpoint(path) for name, path in paths.items()}
    kinds = {(m.model.spec.sample_shape, m.model.spec.low, m.model.spec.high) for m in models.values()}
    check_pictures(models["flow"].model.spec)
    if len(kinds) > 1:
        raise InputError(f"the models have different shapes or ranges: {kinds}; train all of them on the same data")
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, text in TRAININGS.items():
        parser.add_argument(f"--{name}", required=True, help=f"bundled model or checkpoint: {text}")
    parser.add_argument("--starts", type=int, default=3, help="groups of rows")
    parser.add_argument("--steps", type=int, default=20, help="evaluations of each network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="PNG")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} is there already: give another --out")
    try:
        models = load({name: getattr(options, name) for name in TRAININGS})
        shown, states = follow(models, options.starts, options.steps, options.seed)
        save_picture(picture(models["flow"], shown, states), options.out)
    except InputError as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    main()
