"""Nothing is overwritten unasked: every command, every file that it writes, links, long names and odd file systems."""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaleido_fast import InputError, ModelCard, sample_to, save_checkpoint
from kaleido_fast.benchmarking.tuning import is_table
from kaleido_fast.cli import main
from kaleido_fast.errors import StreamInterruptedError
from kaleido_fast.reproducing.folder import check_report_folder
from kaleido_fast.reproducing.report import Report
from kaleido_fast.storing.npy_output import partial_folder
from kaleido_fast.system.files import atomic_path, check_writable, hidden, remove_parts
from kaleido_fast.system.outputs import check_outputs, claimed, is_same

from conftest import random_mlp  # isort: skip

SAMPLE = ("sample", "--model", "m.safetensors", "--chains", "9", "--burn-in", "2", "--engine", "reference", "--out")
TRAIN = ("train", "--data", "data.npy", "--steps", "3", "--hidden", "5", "--layers", "2", "--seed", "4", "--out")
EVALUATE = ("evaluate", "m.safetensors", "--data", "data.npy", "--chains", "12", "--k", "2", "--no-classes")
ATTRACTORS = ("attractors", "--model", "m.safetensors", "--chains", "9", "--burn-in", "20", "--out")
ANIMATE = ("animate", "--model", "m.safetensors", "--chains", "3", "--steps", "2", "--out")
_SHORT = (
    "bench",
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


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with a model, its data and a file of draws."""
    model = random_mlp(6, 9, 6, sample_shape=(2, 3))
    save_checkpoint(tmp_path / "m.safetensors", model, ModelCard("m"))
    np.save(tmp_path / "data.npy", np.linspace(-1, 1, 240, dtype=np.float32).reshape(40, 2, 3))
    record = {"request": {}, "model": json.loads(model.spec.to_json())}
    np.savez(tmp_path / "draws.npz", draws=np.zeros((4, 1, 6), np.float32), record=np.array(json.dumps(record)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    """Run the program in this process: exit status, output, errors."""
    monkeypatch.setattr(sys, "argv", ["kaleido-fast", *map(str, args)])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of all files, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


def make_folder(name: str) -> Path:
    Path(name).mkdir()
    return Path(name)


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


def test_an_interrupted_file_goes_on_behind_a_link(folder):
    far = make_folder("far")
    Path("x.npy").symlink_to(far / "target")
    sample_to("plain.npy", **RUN)
    begin()
    assert (far / "target.partial").is_dir(), "where a new name makes it the target"
    assert sample_to("x.npy", **RUN).stats.new_chains < N
    assert Path("x.npy").is_symlink() and (far / "target").read_bytes() == Path("plain.npy").read_bytes()
    assert [path.name for path in far.iterdir()] == ["target"]


def stop_after(chains: int):
    def callback(state):
        if state.chains_done >= chains:
            raise KeyboardInterrupt

    return callback


def begin(overwrite: bool = False, **more) -> None:
    """Interrupt a run of x.npy."""
    with pytest.raises(StreamInterruptedError, match="goes on from there"):
        sample_to("x.npy", **RUN, overwrite=overwrite, callback=stop_after(4096), **more)


N = 9000
RUN: dict[str, Any] = {
    "model": random_mlp(6, 9, 6),
    "n_chains": N,
    "chunk_chains": 4096,
    "burn_in": 2,
    "engine": "reference",
}


@pytest.mark.parametrize("name", ["x.npy", "x.json"])
def test_what_appears_while_a_run_is_unfinished_stays(folder, name):
    begin()
    kept = contents(partial_folder(Path("x.npy")))
    Path(name).write_text("mine")
    with pytest.raises(InputError, match=f"{name} is there already.*move it away to go on"):
        sample_to("x.npy", **RUN)
    assert Path(name).read_text() == "mine" and contents(partial_folder(Path("x.npy"))) == kept
    Path(name).rename("elsewhere")
    assert sample_to("x.npy", **RUN).stats.new_chains < N


def test_a_run_that_may_overwrite_goes_on_as_one_that_may(folder):
    for name in ("x.npy", "x.json", "x.png"):
        Path(name).write_text("old")
    begin(overwrite=True, picture="x.png")
    assert Path("x.npy").read_text() == Path("x.json").read_text() == "old"
    assert not Path("x.png").exists(), "the picture of what is replaced goes when that begins"
    assert sample_to("x.npy", **RUN, picture="x.png").stats.new_chains < N
    assert np.load("x.npy").shape == (N, 1, 6)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_folder_for_blocks_that_no_run_has_left_stays(folder, kind):
    place = Path("x.npy.partial")
    mine = place if kind == "file" else make_folder(str(place)) / "mine"
    mine.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"x\.npy\.partial is there and no run has left it"):
            sample_to("x.npy", **RUN, overwrite=overwrite)
    assert mine.read_text() == "mine" and not Path("x.npy").exists()


def test_a_record_of_the_same_run_is_no_hindrance(folder):
    sample_to("x.npy", **RUN)
    before = Path("x.npy").read_bytes()
    Path("x.npy").unlink()
    with pytest.raises(InputError, match=r"x\.json is there already"):
        sample_to("x.npy", **{**RUN, "seed": 1})
    sample_to("x.npy", **RUN)
    assert Path("x.npy").read_bytes() == before


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
def test_a_finished_file_is_told_from_another_runs(folder, monkeypatch, capsys, name):
    assert call(monkeypatch, capsys, *SAMPLE, name, "--quiet")[0] == 0
    before = contents(folder)
    status, out, _ = call(monkeypatch, capsys, *SAMPLE, name)
    assert status == 0 and f"{name} is finished: all 9 chains are there" in out
    status, out, _ = call(monkeypatch, capsys, *SAMPLE, name, "--json")
    assert status == 0 and json.loads(out)["finished"] is True
    status, _, errors = call(monkeypatch, capsys, *SAMPLE, name, "--seed", "7")
    assert status == 2 and "request.seed was 0, is now 7" in errors and "--overwrite" in errors
    assert contents(folder) == before


def test_a_finished_training_is_told_from_another(folder, monkeypatch, capsys):
    command = (*TRAIN, "x.safetensors", "--no-curve")
    assert call(monkeypatch, capsys, *command, "--quiet")[0] == 0
    before = contents(folder)
    status, out, _ = call(monkeypatch, capsys, *command)
    assert status == 0 and "x.safetensors is finished: it is of this very run" in out
    assert json.loads(call(monkeypatch, capsys, *command, "--json")[1])["finished"] is True
    for change, text in ((("--seed", "5"), "seed was 4, is now 5"), (("--hidden", "6"), "network was")):
        status, _, errors = call(monkeypatch, capsys, *command, *change)
        assert status == 2 and text in errors and "--overwrite" in errors
    assert contents(folder) == before
    assert call(monkeypatch, capsys, *command, "--seed", "5", "--overwrite", "--quiet")[0] == 0
    assert contents(folder)["x.safetensors"] != before["x.safetensors"]


def test_to_overwrite_keeps_an_unfinished_training_of_the_same_request(folder, monkeypatch, capsys):
    import kaleido_fast.training.trainer as training

    def stop(*_):
        raise KeyboardInterrupt

    command = (*TRAIN, "x.safetensors", "--no-curve", "--quiet")
    assert call(monkeypatch, capsys, *command, "--overwrite")[0] == 0
    whole = Path("x.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(training.Loop, "_notify", stop)
        assert call(patched, capsys, *command, "--overwrite")[0] == 130
    begun = Path("x.training").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(training.Loop, "_save", lambda self: None)
        patched.setattr(training.TrainingRun, "restore", stop)
        assert call(patched, capsys, *command, "--overwrite")[0] == 130, "it goes on from the state"
    assert Path("x.training").read_bytes() == begun
    assert call(monkeypatch, capsys, *command, "--overwrite", "--seed", "8")[0] == 0, "another run's state is replaced"
    assert call(monkeypatch, capsys, *command, "--overwrite")[0] == 0
    assert Path("x.safetensors").read_bytes() == whole and not Path("x.training").exists()


def test_the_longest_names_are_written_and_longer_ones_refused_before_any_work(folder, monkeypatch, capsys):
    limit = os.pathconf(".", "PC_NAME_MAX")
    fits = "a" * (limit - 4) + ".npz"
    assert call(monkeypatch, capsys, *SAMPLE, fits, "--quiet")[0] == 0
    assert sorted(path.name[-4:] for path in folder.iterdir() if path.name.startswith("aa")) == [".npz", ".png"]
    for_npy = "b" * (limit - 5) + ".npy"
    assert call(monkeypatch, capsys, *SAMPLE, for_npy, "--quiet")[0] == 0
    before = contents(folder)
    monkeypatch.setattr("kaleido_fast.running.execution.run_blocks", None)  # any work would fail
    monkeypatch.setattr("kaleido_fast.training.trainer.Loop.finish", None)
    deep = "/".join(["d" * 200] * 30)
    long = ["c" * (limit - 3) + ".npz", "c" * (limit - 4) + ".npy", "c" * 5000 + ".npz", f"{deep}/x.npz"]
    for command in [*((*SAMPLE, name) for name in long), (*TRAIN, "c" * (limit - 4) + ".pt", "--no-curve")]:
        status, _, errors = call(monkeypatch, capsys, *command, "--quiet")
        assert (status, errors.count("\n")) == (2, 1), errors[-300:]
        assert ("bytes" in errors and "give a shorter one" in errors) or "nearer to the root" in errors
    assert contents(folder) == before


def test_temporaries_of_long_names_are_found_again(folder):
    path = Path("e" * 250 + ".json")
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        kept = temporary.with_name(temporary.name)
        raise KeyError
    kept.write_text("left by a killed writer")
    remove_parts(path)
    assert not kept.exists()
    assert len(os.fsencode(hidden(path, "." * 47).name)) <= os.pathconf(".", "PC_NAME_MAX")


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.zarr", "x.safetensors"])
def test_file_systems_that_neither_flush_nor_change_modes(folder, monkeypatch, capsys, name):
    """Old network mounts answer EINVAL to fsync of a folder, buckets EPERM to chmod."""
    if name == "x.zarr":
        pytest.importorskip("zarr")

    def refuse(problem: int):
        def refused(*_, **__):
            raise OSError(problem, os.strerror(problem))

        return refused

    command = SAMPLE if name != "x.safetensors" else (*TRAIN[:-1], "--no-curve", "--out")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse(errno.EINVAL))
        for module in ("chmod", "fchmod"):
            patched.setattr(os, module, refuse(errno.EPERM))
        status, _, errors = call(patched, capsys, *command, name, "--quiet")
    assert status == 0, errors
    if name.startswith("x.n"):
        assert "does not flush" in errors
    assert call(monkeypatch, capsys, *command, f"plain-{name}", "--quiet")[0] == 0
    if Path(name).is_file():
        assert Path(name).read_bytes() == Path(f"plain-{name}").read_bytes()
        umask = os.umask(0)
        os.umask(umask)
        assert Path(f"plain-{name}").stat().st_mode & 0o777 == 0o666 & ~umask
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse(errno.EIO))
        status, _, errors = call(patched, capsys, *command, f"sick-{name}", "--quiet")
    assert (status, errors.count("\n")) == (2, 1) and "cannot write" in errors, "a sick disk is no odd file system"


def test_only_files_are_replaced(folder):
    os.mkfifo("pipe")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        check_writable(Path("pipe"))
    for name in (".", "..", "a\0b", "loop"):
        if name == "loop":
            Path(name).symlink_to("loop")
        with pytest.raises(InputError, match=r"folder|zero byte|leads to itself"):
            check_writable(Path(name))
    with pytest.raises(InputError, match="does not exist"):
        Path("far").symlink_to("nowhere/x.json")
        check_writable(Path("far"))


def test_two_runs_do_not_write_one_file(folder):
    path = Path("x.json")
    second = claimed({"report": path})
    with claimed({"report": path}), pytest.raises(InputError, match="is being written by process"), second:
        pass
    with claimed({"report": path}):
        path.write_text("whole")
    with pytest.raises(InputError, match=r"x\.json is there already"), claimed({"report": path}):
        pass


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


def test_a_table_of_tiles_is_added_to_only_where_it_is_of_this_gpu(folder):
    path = Path("table.json")
    assert not is_table(path, "My GPU", "3.7.1")
    path.write_text(json.dumps({"device": "My GPU", "triton": "3.7.0", "tiles": {}}))
    assert is_table(path, "My GPU", "3.7.1")
    for change in ({"device": "Other"}, {"triton": "3.6.0"}, {"tiles": 3}):
        path.write_text(json.dumps({"device": "My GPU", "triton": "3.7.0", "tiles": {}, **change}))
        assert not is_table(path, "My GPU", "3.7.1")
    path.write_bytes(b"\xff\xfe")
    assert not is_table(path, "My GPU", "3.7.1")


def test_a_store_that_goes_on_leaves_a_picture_alone(folder, monkeypatch, capsys):
    pytest.importorskip("zarr")
    assert call(monkeypatch, capsys, *SAMPLE, "x.zarr", "--quiet")[0] == 0
    Path("x.png").write_text("mine")
    next(Path("x.zarr/blocks").glob("c.0*")).unlink()
    status, _, errors = call(monkeypatch, capsys, *SAMPLE, "x.zarr")
    assert status == 0 and "x.png was there before and is left as it is" in errors
    assert Path("x.png").read_text() == "mine"
