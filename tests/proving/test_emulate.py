"""The command that emulates kernels: what it refuses; slowly, every kernel under each release of Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--arch", "sm_80"], "the emulator knows sm_90 only"),
        (["--net", "digits"], "TRITON_INTERPRET is set"),
        (["--chains", "none"], "no whole number from 1"),
        (["--net", "digitz"], "invalid choice"),
    ],
)
def test_a_command_that_cannot_run_says_why_in_one_line(arguments, message):
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root / "kernels")}
    command = [sys.executable, "-m", "kaleido_kernels.emulate", *arguments]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert message in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("version", ["installed", "3.6.0", "3.8.0"])
def test_all_compiled_kernels_are_right_under_each_release_of_triton(version, tmp_path):
    """The kernels' own tests and those of the six networks, every one of them, in the emulator; 20 minutes or more."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    if version != "installed":
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "triton")]
        subprocess.run([*install, f"triton=={version}"], check=True)
        env["PYTHONPATH"] = str(tmp_path / "triton")
    tests = [
        *sorted(str(path) for path in (Path(__file__).parents[1] / "kernels").glob("test_*.py")),
        "tests/proving/test_emulated.py",
    ]
    options = ["--emulate", "-q", "-n", "auto", "--maxprocesses", "8", "-p", "no:cacheprovider", "-rP"]
    command = [sys.executable, "-m", "pytest", *options, "-m", "slow or not slow", *tests]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
