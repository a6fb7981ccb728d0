"""A report: text, tables and pictures in reading order, written as report.md and report.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from kaleido_fast.reproducing.folder import UNFINISHED
from kaleido_fast.system.devices import cpu_name
from kaleido_fast.system.files import atomic_path, write_error
from kaleido_fast.system.valid_json import json_text
from kaleido_fast.system.versions import library_versions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure


class Report:
    """Collects what a reproduction shows.

    Pictures are written at once, under the folder; text and figures by `write`.

    Args:
        name: of the kaleidoscope.
        title: heading.
        folder: an existing folder.
    """

    def __init__(self, name: str, title: str, folder: Path) -> None:
        self.name, self.title, self.folder = name, title, folder
        self.figures: dict[str, Any] = {}
        self.written: list[Path] = []
        self._parts: list[str] = []

    def text(self, text: str) -> None:
        """A paragraph of Markdown."""
        self._parts.append(text)

    def heading(self, text: str) -> None:
        """A heading below the title."""
        self._parts.append(f"## {text}")

    def record(self, **figures: Any) -> None:
        """Figures for report.json, as plain values."""
        self.figures |= figures

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table; numbers are to be formatted by the caller."""
        lines = [columns, ["---"] * len(columns), *rows]
        self._parts.append("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))

    def picture(self, name: str, picture: Image.Image | Figure, caption: str) -> None:
        """Write ``name``.png and show it with its caption."""
        from kaleido_fast.showing.pictures import save_picture

        path = self._begin(f"{name}.png")
        if isinstance(picture, Image.Image):
            save_picture(picture, path)
        else:
            from kaleido_fast.showing.plots import save_figure

            save_figure(picture, path)
        self.written.append(path)
        self._show(f"{name}.png", caption)

    @contextmanager
    def file(self, name: str, caption: str, *, show: bool = True) -> Iterator[Path]:
        """Give the path for a file that the caller writes; then show it, or (``show`` off) link to it."""
        path = self._begin(name)
        yield path
        self.written.append(path)
        if show:
            self._show(name, caption)
        else:
            self._parts.append(f"[{caption}]({name})")

    def _begin(self, name: str) -> Path:
        """The path of a file that is about to be written; until the report is whole its name is kept beside it."""
        try:
            with (self.folder / UNFINISHED).open("a", encoding="utf-8") as names:
                names.write(f"{name}\n")
        except OSError as problem:
            raise write_error(self.folder / name, problem) from problem
        return self.folder / name

    def _show(self, name: str, caption: str) -> None:
        self._parts.append(f"![{caption}]({name})\n\n*{caption}*")

    def write(self) -> None:
        """Write report.md and report.json."""
        facts = {"kaleidoscope": self.name, "processor": cpu_name(), "versions": library_versions(), **self.figures}
        made = f"Made by `kaleido-fast reproduce {self.name}`; processor: {cpu_name()}."
        text = "\n\n".join([f"# {self.title}", made, *self._parts]) + "\n"
        for name, content in (("report.json", json_text(facts, indent=1) + "\n"), ("report.md", text)):
            path = self._begin(name)
            with atomic_path(path) as temporary:
                temporary.write_text(content, encoding="utf-8")
            self.written.append(path)
        (self.folder / UNFINISHED).unlink()
