"""Makes one kaleidoscope: its module is found by its name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from kaleido_fast.reproducing.folder import check_report_folder, make_folder
from kaleido_fast.reproducing.settings import Settings, chosen
from kaleido_fast.system.locks import output_lock

if TYPE_CHECKING:
    from kaleido_fast.reproducing.report import Report


def reproduce(name: str, folder: Path, settings: Settings, *, overwrite: bool = False) -> Report:
    """Make one kaleidoscope: train or reuse its model, sample, write pictures, ``report.json`` and ``report.md``.

    Args:
        name: one of `KALEIDOSCOPES`.
        folder: where to write; made if its parent exists.
        settings: seed, device and sizes.
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
        importlib.import_module(f"kaleido_fast.reproducing.{entry.name}").run(settings, report)
        report.write()
    return report
