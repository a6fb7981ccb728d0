"""What is printed: names whole and as they are, JSON that every reader takes, a proper end where nobody takes it."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from kaleido_fast import ModelCard, save_checkpoint
from kaleido_fast.cli import output, streams
from kaleido_fast.system.valid_json import json_text

from conftest import call, random_mlp  # isort: skip

LONG = "x" * 130
NAMES = ["a[v1].npz", "[bold].npz", "[red]x.npz", "two  spaces :smile:.npz", f"{LONG}.npz", "\u00e9\u65e5\u672c.npz"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "m.safetensors", random_mlp(6, 9, 6, sample_shape=(2, 3)), ModelCard("m"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    return tmp_path


SAMPLE = ("sample", "--model", "m.safetensors", "--chains", "12", "--burn-in", "2", "--device", "cpu", "--no-picture")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_whole_into_a_pipe(folder, monkeypatch, capsys, name):
    status, out, errors = call(monkeypatch, capsys, *SAMPLE, "--out", name)
    assert (status, errors) == (0, "")
    assert out.splitlines()[-1] == f"files     {name}"
    assert not any(line != line.rstrip() for line in out.splitlines())
    _, _, errors = call(monkeypatch, capsys, "info", f"gone {name}")
    assert f"gone {name}" in errors and errors.count("\n") == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@given(name=st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S")), min_size=1, max_size=200))
def test_a_terminal_shows_every_character_of_a_name(name):
    """In as many lines as it takes; square brackets are no styles and colons no pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", terminal := Terminal())
        patch.setenv("COLUMNS", "40")
        patch.setenv("TERM", "dumb")
        output.say_facts([("files", name)])
    assert "".join(terminal.getvalue().split()).removeprefix("files") == name


def test_cells_of_a_table_are_not_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    table = Table("name", "[title]", box=None)
    table.add_row(LONG, "[red]x[/red]")
    output.say_table(table)
    head, row = capsys.readouterr().out.splitlines()
    assert row.split() == [LONG, "[red]x[/red]"] and head.split() == ["name", "[title]"]


@pytest.mark.parametrize(
    ("encoding", "name", "wanted"),
    [
        ("utf-8", "b\udcff.npy", b"b\xff.npy"),
        ("ascii", "\u00e9[v1]\udcff", b"\xc3\xa9[v1]\xff"),
        ("latin-1", "\u00e9\u65e5", b"\xe9\\u65e5"),
        ("latin-1", "\U0001f600", rb"\U0001f600"),
        ("utf-8", "\ud800", rb"\ud800"),
    ],
)
def test_names_that_an_encoding_lacks_are_printed_as_they_are_or_escaped(monkeypatch, tmp_path, encoding, name, wanted):
    with (tmp_path / "out").open("w", encoding=encoding) as file:
        monkeypatch.setattr(sys, "stdout", file)
        streams.prepare_streams()
        output.say_facts([("f", name)])
    assert (tmp_path / "out").read_bytes() == b"f  " + wanted + b"\n"


ODD = st.floats() | st.just(np.float32("nan")) | st.just(np.int64(3)) | st.just(Path("a")) | st.integers() | st.text()


def refuse(name):
    raise AssertionError(f"{name} in JSON")


@given(value=st.recursive(ODD, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20))
def test_json_holds_no_constant_that_only_python_knows(value):
    read = json.loads(json_text({"value": value}), parse_constant=refuse)["value"]
    if isinstance(value, float):
        assert read == (float(value) if math.isfinite(value) else None)


def test_numbers_that_are_not_finite_become_null_in_every_command(folder, monkeypatch, capsys):
    model = random_mlp(6, 9, 9, 6)
    with torch.no_grad():
        for layer in model.linears:
            layer.weight.mul_(1e38)  # infinite sums, whose differences are no numbers
    save_checkpoint("nan.safetensors", model, ModelCard("nan", final_loss=float("inf")))
    run = (*SAMPLE[:2], "nan.safetensors", *SAMPLE[3:], "--tol", "none", "--json", "--out", "s.npy")
    for arguments in (run, run, ("info", "nan.safetensors", "--json"), ("info", "s.npy", "--json")):
        status, out, errors = call(monkeypatch, capsys, *arguments)
        assert status == 0, errors
        assert out.count("\n") == 1
        assert json.loads(out, parse_constant=refuse)
    assert json.loads(call(monkeypatch, capsys, *run, "--overwrite")[1])["residual_quantiles"]["50%"] is None
    status, out, errors = call(monkeypatch, capsys, *run[:-1], "nowhere/s.npy")
    assert (status, out, errors.count("\n")) == (2, "", 1), "an error is told on standard error alone"


def test_a_file_that_is_cut_off_is_no_interruption(folder, monkeypatch, capsys):
    """click takes any end of file for Ctrl-D."""
    for name in ("empty.npy", "empty.npz", "empty.safetensors"):
        Path(name).write_bytes(b"")
        status, out, errors = call(monkeypatch, capsys, "info", name)
        assert (status, out, errors.count("\n")) == (2, "", 1)
        assert "interrupted" not in errors


def test_a_full_disk_below_the_output_ends_with_a_line_and_keeps_the_files(folder, monkeypatch, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    full = Path("/dev/full").open("w")  # noqa: SIM115 - closed by hand, for closing it fails
    monkeypatch.setattr(sys, "stdout", full)
    status, _, errors = call(monkeypatch, capsys, *SAMPLE, "--out", "s.npz")
    assert (status, errors) == (1, "kaleido-fast: standard output cannot be written: No space left on device\n")
    assert Path("s.npz").exists()
    full.close()


ENDS = """
python -m kaleido_fast --help >/dev/full; echo "full $?"
python -m kaleido_fast --version >&-; echo "closed $?"
python -m kaleido_fast bogus >&-; echo "refused $?"
python -m kaleido_fast bogus 2>/dev/full; echo "untold $?"
{ python -m kaleido_fast --help; echo "unread $?" >&2; } | true
python -m kaleido_fast --version >&- 2>&-; echo "alone $?"
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_does_not_arrive_ends_without_a_traceback(tmp_path, unbuffered):
    """Exit status 1 where something was to be printed, 2 where the input was refused, whether or not that was told."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": unbuffered}
    script = ENDS.replace("python", f'"{sys.executable}"')
    result = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["full 1", "closed 1", "refused 2", "untold 2", "alone 1"], result.stderr
    told = result.stderr.splitlines()
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr, result.stderr
    assert [line for line in told if "cannot be written" in line] == [
        "kaleido-fast: standard output cannot be written: No space left on device",
        "kaleido-fast: standard output cannot be written: Bad file descriptor",
    ]
    assert [line for line in told if line.startswith("unread")] in (["unread 1"], ["unread 0"])  # 0: it was faster


def test_no_file_takes_the_place_of_a_closed_standard_stream(tmp_path):
    """What is printed by a library would go into it."""
    code = (
        "from kaleido_fast.cli.streams import prepare_streams; prepare_streams(); "
        "file = open('data', 'wb'); assert file.fileno() > 2, file.fileno(); file.write(b'data'); file.close()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -c "{code}" <&- >&- 2>&-'], cwd=tmp_path, env=environment, check=True
    )
    assert (tmp_path / "data").read_bytes() == b"data"


def test_every_command_reads_and_writes_names_that_are_not_utf8(folder, monkeypatch, capsys):
    """safetensors writes such files and does not open them; a page has no character for such bytes."""
    odd = "b\udcff[v1]"
    try:
        Path("m.safetensors").rename(f"{odd}.safetensors")
    except OSError:
        pytest.skip("this file system takes no such names")
    for arguments in (
        ("sample", "--model", f"{odd}.safetensors", *SAMPLE[3:], "--draws", "2", "--out", f"d{odd}.safetensors"),
        ("info", f"d{odd}.safetensors"),
        ("show", f"d{odd}.safetensors", "--out", f"p{odd}.html"),
        ("animate", f"d{odd}.safetensors", "--out", f"p{odd}.gif"),
        ("train", "--preset", "points1d", "--steps", "2", "--no-curve", "--out", f"t{odd}.safetensors"),
        ("info", f"t{odd}.safetensors"),
    ):
        status, out, errors = call(monkeypatch, capsys, *arguments)
        assert status == 0 and out, f"{arguments}: {errors!a}"
    text = Path(f"p{odd}.html").read_text(encoding="utf-8")
    assert "db?[v1].safetensors" in text
