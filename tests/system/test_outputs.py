"""Nothing is overwritten unasked: every command, every file that it writes, and links."""

from __future__ import annotations

import os
import sys
from itertools import combinations
from pathlib import Path

import pytest
from commands import SAMPLE, TRAIN
from conftest import call
from folders import contents, make_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaleido_fast import InputError
from kaleido_fast.system.outputs import check_outputs, claimed, is_same

EVALUATE = ("evaluate", "m.safetensors", "--data", "data.npy", "--chains", "12", "--k", "2", "--no-classes")
ATTRACTORS = ("attractors", "--model", "m.safetensors", "--chains", "9", "--burn-in", "20", "--out")
ANIMATE = ("animate", "--model", "m.safetensors", "--chains", "3", "--steps", "2", "--out")
_SHORT = (
    "bench",
    "--busy",  # others may run beside the tests
    "--model",
    "m.safetensors",
    "--chains",
    "8",
    "--steps",
    "1",
    "--engine",
    "reference",
    "--rounds",
    "1",
)
BENCH = (*_SHORT, "--peers", "none", "--no-first-calls", "--quick")
# A command, and the files that it writes.
COMMANDS = [
    ((*SAMPLE, "x.npy"), ("x.npy", "x.json", "x.png")),
    ((*SAMPLE, "x.npz"), ("x.npz", "x.png")),
    ((*SAMPLE, "x.safetensors"), ("x.safetensors", "x.png")),
    pytest.param((*SAMPLE, "x.zarr"), ("x.png",), marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="zarr")),
    ((*TRAIN, "x.safetensors", "--curve"), ("x.safetensors", "x-loss.png")),
    ((*EVALUATE, "--out", "x.json"), ("x.json", "x.png")),
    ((*ATTRACTORS, "x.json"), ("x.json", "x.png")),
    (("show", "draws.npz", "--out", "x.html"), ("x.html",)),
    (("show", "draws.npz"), ("draws-shown.png",)),
    ((*ANIMATE, "x.gif", "--out", "x.html", "--out", "x.png"), ("x.gif", "x.html", "x.png")),
    ((*BENCH, "--json", "x.json"), ("x.json",)),
]


@pytest.mark.parametrize(("command", "files"), COMMANDS)
def test_whatever_is_there_stays_unless_it_is_to_be_overwritten(folder, monkeypatch, capsys, command, files):
    if "--curve" in command:
        pytest.importorskip("matplotlib")
    for name in files:
        Path(name).write_text("mine")
        before = contents(folder)
        status, out, errors = call(monkeypatch, capsys, *command, "--quiet")
        assert (status, out, errors.count("\n")) == (2, "", 1), errors
        assert name in errors and "--overwrite" in errors, errors
        assert contents(folder) == before, "it is refused before any work"
        Path(name).unlink()
    for name in files:
        Path(name).write_text("mine")
    status, _, errors = call(monkeypatch, capsys, *command, "--quiet", "--overwrite")
    assert status == 0, errors
    assert all(Path(name).read_bytes()[:4] != b"mine" for name in files)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")], "no lock and no temporary stays"


@pytest.mark.parametrize(
    ("command", "link", "source"),
    [
        ((*SAMPLE, "m.safetensors"), None, "m.safetensors"),
        ((*SAMPLE, "m.npy"), "m.json", "m.safetensors"),
        ((*SAMPLE, "m.npz"), "m.png", "m.safetensors"),
        ((*TRAIN, "data.npy", "--no-curve"), None, "data.npy"),
        ((*TRAIN, "a.safetensors", "--no-curve"), "a.training", "data.npy"),
        ((*EVALUATE, "--out", "data.npy"), None, "data.npy"),
        ((*EVALUATE, "--out", "a.json", "--sheet", "a.png"), "a.png", "m.safetensors"),
        ((*EVALUATE, "--draws", "draws.npz", "--out", "draws.npz"), None, "draws.npz"),
        ((*ATTRACTORS, "m.safetensors"), None, "m.safetensors"),
        (("show", "draws.npz", "--out", "a.png"), "a.png", "draws.npz"),
        ((*ANIMATE, "a.gif"), "a.gif", "m.safetensors"),
        ((*BENCH, "--json", "m.safetensors"), None, "m.safetensors"),
    ],
)
def test_what_is_read_is_never_overwritten(folder, monkeypatch, capsys, command, link, source):
    if link:
        Path(link).symlink_to(source)
    before = contents(folder)
    status, _, errors = call(monkeypatch, capsys, *command, "--quiet", "--overwrite")
    assert (status, errors.count("\n")) == (2, 1), errors
    assert f"{link or source} is read by this run" in errors
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ((*TRAIN, "x.training"), "x.training"),
        ((*EVALUATE, "--out", "x.png"), "x.png"),
        ((*EVALUATE, "--out", "x.json", "--sheet", "./x.json"), "x.json"),
        ((*ATTRACTORS, "x.png"), "x.png"),
        ((*ANIMATE, "x.gif", "--out", "./x.gif"), "x.gif"),
    ],
)
def test_outputs_of_one_run_are_files_of_their_own(folder, monkeypatch, capsys, command, name):
    before = contents(folder)
    status, _, errors = call(monkeypatch, capsys, *command, "--quiet", "--overwrite")
    assert (status, errors.count("\n")) == (2, 1), errors
    assert f"{name} would be both the " in errors
    assert contents(folder) == before


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_rule_for_any_outputs_and_inputs(tmp_path_factory, data):
    """With leave to overwrite, exactly those are refused whose files, links followed, are not all apart."""
    folder = tmp_path_factory.mktemp("rule")
    for name in "ab":
        (folder / name).write_text(name)
        (folder / f"link-{name}").symlink_to(name)
    (folder / "link-new").symlink_to("new")
    names = st.sampled_from(["a", "b", "link-a", "link-b", "new", "link-new", "./a"])
    outputs = data.draw(st.lists(names, min_size=1, max_size=3))
    inputs = data.draw(st.lists(names, max_size=2))
    written, read = ([os.path.realpath(folder / name) for name in chosen] for chosen in (outputs, inputs))
    bad = len(set(written)) < len(written) or bool(set(written) & set(read))
    there = any(Path(path).exists() for path in written)
    asked = {f"output {i}": folder / name for i, name in enumerate(outputs)}
    sources = {f"input {i}": folder / name for i, name in enumerate(inputs)}
    for overwrite in (True, False):
        if bad or (there and not overwrite):
            with pytest.raises(InputError):
                check_outputs(asked, sources, overwrite=overwrite)
        else:
            check_outputs(asked, sources, overwrite=overwrite)
    assert all(
        is_same(folder / one, folder / two) == (a == b)
        for (one, a), (two, b) in combinations(zip(outputs, written, strict=True), 2)
    )


def test_pictures_are_not_written_among_the_pictures_that_are_read(folder, monkeypatch, capsys):
    from PIL import Image

    Path("pictures").mkdir()
    for i in range(3):
        Image.new("L", (3, 2), i * 90).save(f"pictures/{i}.png")
    train = ("train", "--data", "pictures", "--steps", "2", "--hidden", "5", "--layers", "2", "--quiet")
    if "matplotlib" in sys.modules or pytest.importorskip("matplotlib"):
        status, _, errors = call(monkeypatch, capsys, *train, "--out", "pictures/x.safetensors", "--curve")
        assert status == 2 and "x-loss.png lies in pictures, which this run reads (data)" in errors
    assert call(monkeypatch, capsys, *train, "--out", "pictures/x.safetensors", "--no-curve")[0] == 0
    with pytest.raises(InputError, match="lies in"):
        check_outputs({"page": Path("s.zarr/x.html")}, {"draws": make_folder("s.zarr")})


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.zarr"])
def test_a_link_stays_and_its_target_is_written(folder, monkeypatch, capsys, name):
    if name == "x.zarr":
        pytest.importorskip("zarr")
    far = make_folder("far")
    Path(name).symlink_to(far / "target")
    assert call(monkeypatch, capsys, *SAMPLE, name, "--quiet")[0] == 0
    assert call(monkeypatch, capsys, *SAMPLE, f"plain-{name}", "--quiet")[0] == 0
    plain = Path(f"plain-{name}")
    for attempt in ((), ("--overwrite",)):
        status, out, errors = call(monkeypatch, capsys, *SAMPLE, name, *attempt)
        assert status == 0 and ("is finished" in out) == (not attempt), errors
        assert Path(name).is_symlink() and [path.name for path in far.iterdir()] == ["target"]
        if plain.is_dir():
            assert contents(far / "target") == contents(plain)
        else:
            assert (far / "target").read_bytes() == plain.read_bytes()


def test_two_runs_do_not_write_one_file(folder):
    path = Path("x.json")
    second = claimed({"report": path})
    with claimed({"report": path}), pytest.raises(InputError, match="is being written by process"), second:
        pass
    with claimed({"report": path}):
        path.write_text("whole")
    with pytest.raises(InputError, match=r"x\.json is there already"), claimed({"report": path}):
        pass


def test_a_store_that_goes_on_leaves_a_picture_alone(folder, monkeypatch, capsys):
    pytest.importorskip("zarr")
    assert call(monkeypatch, capsys, *SAMPLE, "x.zarr", "--quiet")[0] == 0
    Path("x.png").write_text("mine")
    next(Path("x.zarr/blocks").glob("c.0*")).unlink()
    status, _, errors = call(monkeypatch, capsys, *SAMPLE, "x.zarr")
    assert status == 0 and "x.png was there before and is left as it is" in errors
    assert Path("x.png").read_text() == "mine"
