"""A page that shows chains over the steps in any browser: one HTML file, which loads nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from kaleido_fast.errors import InputError
from kaleido_fast.showing.animation import check_can_show, end_colours, places
from kaleido_fast.showing.pictures import to_bytes
from kaleido_fast.showing.states import Shown
from kaleido_fast.system.files import atomic_path

MOST_PIXELS = 40_000_000  # of all states together; browsers refuse images much above
MOST_SIDE = 16_000  # pixels; the same


def page_html(shown: Shown, title: str) -> str:
    """The page: a slider over the steps, play and pause, and a click on a chain to follow it.

    Args:
        shown: states; all of them are stored in the page.
        title: heading.

    Raises:
        InputError: samples that are neither pictures nor points, or more pixels than browsers take.
    """
    check_can_show(shown)
    facts: dict[str, Any] = {
        "steps": list(shown.steps),
        "titles": list(shown.titles),
        "first": shown.first_chain,
        "chains": len(shown.states),
        "range": [shown.spec.low, shown.spec.high],
    }
    facts |= _pictures(shown) if shown.are_pictures else _points(shown)
    template = resources.files("kaleido_fast").joinpath("data", "page.html").read_text(encoding="utf-8")
    data = json.dumps(facts, separators=(",", ":")).replace("</", "<\\/")
    return template.replace("{{facts}}", data).replace("{{title}}", html.escape(title))


def write_page(shown: Shown, path: Path, title: str) -> None:
    """Write `page_html`; the file appears when whole."""
    text = page_html(shown, title)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")  # bytes of a name that are no characters


def _pictures(shown: Shown) -> dict[str, Any]:
    """All states as one picture: a row a chain, a column a step."""
    height, width = shown.spec.sample_shape[:2]
    rows, columns = shown.states.shape[:2]
    if rows * columns * height * width > MOST_PIXELS or max(rows * height, columns * width) > MOST_SIDE:
        fits = min(MOST_PIXELS // (columns * height * width), MOST_SIDE // height)
        raise InputError(
            f"{rows:,} chains over {columns} steps are more pixels than a browser shows at once: "
            f"ask for at most {max(1, fits)} chains, or for fewer frames"
        )
    pixels = to_bytes(shown.states.flatten(0, 1), shown.spec, shown.scaling).unflatten(0, (rows, columns))
    sheet = pixels.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (rows * height, columns * width[, 3])
    stream = io.BytesIO()
    Image.fromarray(sheet.contiguous().numpy()).save(stream, format="PNG", optimize=True)
    return {
        "kind": "pictures",
        "height": height,
        "width": width,
        "sheet": "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode(),
    }


def _points(shown: Shown) -> dict[str, Any]:
    where = (places(shown) * 10_000).round().int()
    return {"kind": "points", "dim": shown.spec.dim, "places": where.tolist(), "colours": end_colours(shown)}
