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
from kaleido_fast.benchmarking import busy, readme, runner
from kaleido_fast.benchmarking.peers import PEERS
from kaleido_fast.cli import bench
from kaleido_fast.engines import available
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
        (("--precision", "fp32,bf61"), "did you mean 'bf16'"),
        (("--peers", "eager-bf16", "--precision", "fp32"), "give --precision bf16"),
        (("--readme", "strange.md"), "would be lost"),
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
    (tmp_path / "strange.md").write_text(f"{readme.BEGIN}\nby hand\n{readme.END}")
    monkeypatch.setattr(runner, "Crew", lambda *args, **options: pytest.fail("a process has started"))
    status, output, errors = call(monkeypatch, capsys, "bench", "--net", "points1d", *args)
    assert (status, output) == (2, "")
    assert errors.count("\n") == 1 and text in errors, errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.md", "strange.md"]


def test_command_writes_what_it_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "mine.safetensors", random_mlp(6, 9, 6), ModelCard("mine"))
    Path("README.md").write_text(f"{readme.BEGIN}\n{readme.END}\n")
    files = ("--json", "bench.json", "--readme", "README.md", "--picture", "bars.png")
    nets = ("--net", "points1d", "--model", "mine.safetensors", "--peers", "eager,published")
    status, output, errors = call(monkeypatch, capsys, "bench", *SMALL, *nets, *files)
    assert (status, errors) == (0, "")
    assert "mine" in output and "published" in output
    record = json.loads(Path("bench.json").read_text())
    assert [entry["network"] for entry in record["results"]] == ["points1d", "mine"]
    assert record["machine"]["instruction_set"] in Path("README.md").read_text()
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


def test_a_busy_machine_is_refused_before_anything_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(busy, "share_now", lambda: 0.63)
    monkeypatch.setattr(runner, "Crew", lambda *args, **options: pytest.fail("a process has started"))
    args = [arg for arg in SMALL if arg != "--busy"]
    status, output, errors = call(monkeypatch, capsys, "bench", "--net", "points1d", *args)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert "other processes use 63% of the" in errors and "--busy" in errors


@pytest.mark.parametrize("allowed", [False, True])
def test_a_machine_that_became_busy_is_told_and_its_table_kept_from_the_readme(tmp_path, monkeypatch, capsys, allowed):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner.BenchRequest, "in_processes", False)
    monkeypatch.setattr(busy, "share_now", lambda: 0.05)
    monkeypatch.setattr(busy, "others_share", lambda before, after, cores: 0.35)
    Path("README.md").write_text(f"{readme.BEGIN}\n{readme.END}")
    args = [arg for arg in SMALL if arg != "--busy" or allowed]
    status, output, errors = call(
        monkeypatch, capsys, "bench", "--net", "points1d", "--peers", "eager", "--readme", "README.md", *args
    )
    told = "other processes used 35% of the cores' time during points1d in fp32"
    assert told in output and "do not quote" in output
    assert status == (0 if allowed else 2)
    assert (told in Path("README.md").read_text()) == allowed
    assert allowed or (told in errors and "README.md left as it is" in errors and "--busy" in errors)


@pytest.mark.parametrize(("native", "expected"), [(True, ["fp32", "bf16"]), (False, ["fp32"])])
def test_bf16_is_measured_too_where_the_processor_has_it(monkeypatch, native, expected):
    monkeypatch.setattr(available, "has_fast_bf16", lambda: native)
    options = {"networks": ("points1d",), "model": None, "device": "cpu", "n_chains": None, "n_steps": None}
    options |= {"engine": "auto", "quick": True}
    request = bench.make_request(peers=(), precisions=(), **options)
    assert request.precisions == expected
    assert ("eager-bf16" in [peer.name for peer in request.peers]) == native
    assert bench.make_request(peers=(), precisions=("bf16,fp32", "bf16"), **options).precisions == ["bf16", "fp32"]
