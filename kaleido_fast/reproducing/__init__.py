"""The paper's kaleidoscopes, each from one command: pictures, an animation and measured figures.

One module a kaleidoscope, with ``run(job, report)``; `KALEIDOSCOPES` lists them without loading any.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.scalars import plain_fields
from kaleido_fast.system.files import check_writable
from kaleido_fast.system.locks import output_lock

if TYPE_CHECKING:
    from kaleido_fast.reproducing.report import Report

ALL = "all"
UNFINISHED = ".unfinished"
"""In a report's folder until it is whole: the names of its files."""


@dataclass(frozen=True)
class Kaleidoscope:
    """One entry of the list.

    Args:
        name: its name on the command line, and of its module here.
        title: heading of its report.
        minutes: expected time on 2 CPU cores, with nothing in the cache.
    """

    name: str
    title: str
    minutes: float

    @property
    def expected(self) -> str:
        """The expected time in words."""
        return f"about {self.minutes:g} minutes" if self.minutes >= 2 else f"about {self.minutes * 60:.0f} seconds"


KALEIDOSCOPES: dict[str, Kaleidoscope] = {
    entry.name: entry
    for entry in (
        Kaleidoscope("points1d", "Four points on a line", 2),
        Kaleidoscope("points2d", "Four points in the plane", 2),
        Kaleidoscope("digits", "8 x 8 digits", 0.5),
        Kaleidoscope("mnist", "MNIST digits", 12),
        Kaleidoscope("depth", "Does depth help?", 6),
    )
}


@dataclass(frozen=True)
class Job:
    """What every reproduction is told.

    Args:
        seed: of training and of sampling.
        device: "auto" (a GPU where there is one), "cpu", "cuda", ...
        data: path of the MNIST images where they are not to be fetched by name; ``mnist`` alone reads it.
        steps: training steps for a quick look; None for the recipe's own.
        n_chains: chains that figures are measured on; None for the kaleidoscope's own number.
        cache: folder that keeps trained models; None for `models.cache_folder`.
        progress: show progress bars.
        tell: called with one line on what happens now.
    """

    seed: int = 0
    device: str = "auto"
    data: Path | None = None
    steps: int | None = None
    n_chains: int | None = None
    cache: Path | None = None
    progress: bool = False
    tell: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        plain_fields(self)


def chosen(name: str) -> list[Kaleidoscope]:
    """The entries that a name stands for; an unknown one raises `InputError` with the nearest."""
    if name == ALL:
        return list(KALEIDOSCOPES.values())
    if name not in KALEIDOSCOPES:
        raise unknown_name("kaleidoscope", name, (*KALEIDOSCOPES, ALL))
    return [KALEIDOSCOPES[name]]


def reproduce(name: str, folder: Path, job: Job, *, overwrite: bool = False) -> Report:
    """Make one kaleidoscope: train or reuse its model, sample, write pictures, ``report.json`` and ``report.md``.

    Args:
        name: one of `KALEIDOSCOPES`.
        folder: where to write; made if its parent exists.
        job: settings.
        overwrite: replace the files of an earlier report.

    Raises:
        InputError: unknown name, a folder that cannot be written or holds something, matplotlib missing, data that
            cannot be used.
    """
    from kaleido_fast.reproducing.report import Report
    from kaleido_fast.showing.plots import check_can_plot

    (entry,) = chosen(name)
    check_can_plot("the reports of reproduce")
    make_folder(folder)
    with output_lock(folder / "report.md"):
        check_report_folder(folder, overwrite=overwrite)
        report = Report(entry.name, entry.title, folder)
        importlib.import_module(f"kaleido_fast.reproducing.{entry.name}").run(job, report)
        report.write()
    return report


def make_folder(folder: Path) -> None:
    """Make a folder if need be, and refuse one that cannot be written, before any work is done."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {folder} is a file: give a folder")
    if not folder.exists():
        check_writable(folder)
        folder.mkdir()
    check_writable(folder / "report.md")


def check_report_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, but for files of a report that was stopped, unless to ``overwrite``."""
    if overwrite:
        return
    try:
        ours = (folder / UNFINISHED).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        ours = []
    found = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and path.name not in ours)
    if found:
        raise InputError(
            f"{folder} holds {found[0]} already, and files of a report could overwrite others: give another --out, or "
            "--overwrite replaces those of the same names"
        )


@contextlib.contextmanager
def made_folders(folders: Sequence[Path]) -> Iterator[None]:
    """Make folders, parents first, before any work is done; at the end those go that are still empty."""
    made = [folder for folder in folders if not folder.exists()]
    try:
        for folder in folders:
            make_folder(folder)
        yield
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()
