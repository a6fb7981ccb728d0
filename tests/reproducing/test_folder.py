"""The folder of a report."""

from __future__ import annotations

import pytest
from folders import make_folder

from kaleido_fast import InputError
from kaleido_fast.reproducing.folder import check_report_folder
from kaleido_fast.reproducing.report import Report


def test_a_folder_of_reports_goes_on_only_where_it_is_ours(folder):
    from PIL import Image

    place = make_folder("report")
    report = Report("points1d", "Points", place)
    report.picture("a", Image.new("L", (2, 2)), "a")
    check_report_folder(place, overwrite=False)
    (place / "b.png").write_text("mine")
    with pytest.raises(InputError, match=r"report holds b\.png already.*--overwrite"):
        check_report_folder(place, overwrite=False)
    (place / "b.png").unlink()
    report.write()
    assert sorted(path.name for path in place.iterdir()) == ["a.png", "report.json", "report.md"]
    with pytest.raises(InputError, match=r"report holds a\.png already"):
        check_report_folder(place, overwrite=False)
    check_report_folder(place, overwrite=True)
