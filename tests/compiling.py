"""Python in processes of their own, where kernels are compiled: this one may have the interpreter switched on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_python(*arguments: str, interpret: str | None = None) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, where kernels are compiled unless they are to be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # What stood there before may be another Triton.
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    if interpret:
        environment["TRITON_INTERPRET"] = interpret
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def run_script(script: str, *arguments: str) -> str:
    """Runs Python text where kernels are compiled; returns what it printed."""
    result = run_python("-c", script, *arguments)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout
