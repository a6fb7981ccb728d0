"""The command bench."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import call
from PIL import Image
from small_bench import SMALL

from kaleido_fast import ModelCard, save_checkpoint
from kaleido_fast.benchmarking import report, runner
from kaleido_fast.benchmarking.peers import PEERS
from kaleido_fast.presets import NETWORKS

from conftest import random_mlp  # isort: skip


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--net", "digts"), "did you mean 'digits'"),
        (("--peers", "onnxruntme"), "did you mean 'onnxruntime'"),
        (("--peers", "eager-fp16"), "cuda only"),
        (("--engine", "refrence"), "did you mean 'reference'"),
        (("--engine", "cpu", "--precision", "fp64"), "cannot run here"),
        (("--chains", "0"), "n_chains is 0"),
        (("--steps", "-1"), "n_steps is -1"),
        (("--json", "nowhere/a.json"), "does not exist"),
        (("--json", "."), "is a folder"),
        (("--readme", "empty.md"), "no place for the table"),
        (("--readme", "gone.md"), "is not a file"),
        (("--picture", "a.gif"), "unknown ending"),
        (("--model", "gone.safetensors"), "does not exist"),
    ],
)
def test_bad_input_is_found_before_anything_is_timed(tmp_path, monkeypatch, capsys, args, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.md").write_text("")
    monkeypatch.setattr(runner, "time_alternating", lambda *args, **options: pytest.fail("timing has started"))
    status, output, errors = call(monkeypatch, capsys, "bench", "--net", "points1d", *args)
    assert (status, output) == (2, "")
    assert errors.count("\n") == 1 and text in errors, errors
    assert [path.name for path in tmp_path.iterdir()] == ["empty.md"]


def test_command_writes_what_it_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "mine.safetensors", random_mlp(6, 9, 6), ModelCard("mine"))
    Path("README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    files = ("--json", "bench.json", "--readme", "README.md", "--picture", "bars.png")
    nets = ("--net", "points1d", "--model", "mine.safetensors", "--peers", "eager,published")
    status, output, errors = call(monkeypatch, capsys, "bench", *SMALL, *nets, *files)
    assert (status, errors) == (0, "")
    assert "mine" in output and "published" in output
    record = json.loads(Path("bench.json").read_text())
    assert [entry["network"] for entry in record["results"]] == ["points1d", "mine"]
    assert "| `mine` |" in Path("README.md").read_text()
    assert Image.open("bars.png").width > 400


def test_json_to_the_terminal_is_one_object(monkeypatch, capsys):
    status, output, _ = call(
        monkeypatch, capsys, "bench", *SMALL, "--net", "points1d", "--peers", "none", "--json", "-"
    )
    assert status == 0
    assert json.loads(output)["results"][0]["contestants"].keys() == {"reference"}


def test_help_does_not_load_torch():
    code = (
        "import sys; from kaleido_fast.cli import cli\n"
        "try: cli.main(['bench', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, "help imports torch"
    assert "--readme" in result.stdout
    text = re.sub(r"(?<=\w-)\n\s+", "", result.stdout)  # click breaks lines after hyphens too
    for name in (*PEERS, *NETWORKS):
        assert re.search(rf"\s{name}[\s,;\].]", text), f"a newcomer cannot know of {name}"
