"""The command gpu-report, and the script that is as good: what is refused, and what a README gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton")

from kaleido_fast import InputError
from kaleido_fast.cli import gpu_report as command

ROOT = Path(__file__).parents[2]


def invoke(*options: str):
    return CliRunner().invoke(command.command, list(options))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--only", "mnisst"], "did you mean 'mnist'"),
        (["--only", " , "], "names nothing"),
        (["--quick", "--minutes", "nan"], "no number of minutes"),
        (["--device", "cuda:99"], "this machine has"),
        (["--quick", "--out", "a file/folder"], "cannot be made: Not a directory"),
        (["--quick", "--only", "mnisst", "--out", "new"], "did you mean 'mnist'"),
        (["--from", "no.json"], None),
        (["--readme", "no.md"], "is not a file"),
    ],
)
def test_bad_input_is_refused_in_one_line(options, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a file").write_text("")
    if text is None:
        Path("README.md").write_text(f"{command.BEGIN}\n{command.END}")
        options, text = [*options, "--readme", "README.md"], "cannot be read"
    elif "--out" not in options:
        options = [*options, "--out", "new"]
    result = invoke(*options)
    assert isinstance(result.exception, InputError) and text in str(result.exception)
    assert "\n" not in str(result.exception) and not Path("new").exists()


def test_the_folder_of_the_report_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "_measure", lambda request: request.out / "GPU.json")
    assert invoke("--quick", "--device", "cpu", "--out", str(tmp_path / "some" / "folder")).exception is None
    assert (tmp_path / "some" / "folder").is_dir() and not list((tmp_path / "some" / "folder").iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_the_path_can_be_tried_and_no_readme_is_written(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{command.BEGIN}\nnot yet\n{command.END}")
    for options, text in (
        (["--minutes", "1"], "--quick tries"),
        (["--quick", "--readme", str(readme)], "hold no speed"),
    ):
        result = invoke(*options, "--out", str(tmp_path))
        assert isinstance(result.exception, InputError) and text in str(result.exception)
    assert "not yet" in readme.read_text()


def test_a_readme_is_made_from_a_report_that_was_kept(gpu_report, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text(f"before\n{command.BEGIN}\nold\n{command.END}\nafter\n")
    Path("tried.json").write_text(gpu_report.path.read_text())
    result = invoke("--from", "tried.json", "--readme", "README.md")
    assert isinstance(result.exception, InputError) and "holds no timings of a GPU" in str(result.exception)
    Path("GPU.json").write_text(json.dumps({**gpu_report.record, "interpreter": False}))
    assert invoke("--from", "GPU.json", "--readme", "README.md").exception is None
    text = Path("README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "[GPU.md](GPU.md)" in text and "`points2d`" in text
    Path("broken.json").write_text("{")
    result = invoke("--from", "broken.json", "--readme", "README.md")
    assert isinstance(result.exception, InputError) and "is not a GPU's report" in str(result.exception)


def test_the_readme_has_a_place_for_it():
    text = (ROOT / "README.md").read_text()
    assert text.count(command.BEGIN) == text.count(command.END) == 1


def run_script(*options: str, timeout: int, **more) -> subprocess.CompletedProcess:
    """The script as from a plain checkout: isolated from what is installed of the package."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command_line = [sys.executable, str(ROOT / "benchmarks" / "gpu_report.py"), *options]
    return subprocess.run(command_line, env=env, capture_output=True, text=True, timeout=timeout, **more)


def test_the_script_ends_bad_input_with_one_line_and_status_2(tmp_path):
    result = run_script("--only", "mnisst", "--quick", "--out", str(tmp_path), timeout=60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "did you mean 'mnist'" in result.stderr


@pytest.mark.slow
@pytest.mark.interpreter
def test_the_script_runs_to_its_end_in_the_interpreter_from_any_folder(tmp_path):
    result = run_script("--quick", "--out", str(tmp_path), timeout=900, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    record = json.loads((tmp_path / "interpreter.json").read_text())
    assert record["status"] == "done" and len(record["networks"]) == 6 and not record["failed"]
    assert not [entry for entry in record["checks"] if entry["problem"]]
    assert all("triton-fp16" in found["contestants"] for found in record["networks"].values())


@pytest.mark.gpu
def test_a_quick_report_of_this_gpu(tmp_path):
    result = run_script("--quick", "--only", "points2d", "--minutes", "3", "--out", str(tmp_path), timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    (path,) = [path for path in tmp_path.glob("*.json") if ".tuned." not in path.name]
    record = json.loads(path.read_text())
    assert not record["interpreter"] and record["networks"]["points2d"]["contestants"]["triton-fp16"]["error"] < 1e-2
