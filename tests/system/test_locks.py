"""One process writes an output."""

from __future__ import annotations

import os
import subprocess
import sys

from kaleido_fast.system.locks import output_lock, read_token


def test_the_second_writer_is_refused_by_name_of_the_first(tmp_path):
    path = tmp_path / "a.zarr"
    with output_lock(path) as token:
        assert read_token(path) == token
        code = (
            "import sys; from pathlib import Path; from kaleido_fast.system.locks import output_lock\n"
            "from kaleido_fast import InputError\n"
            f"try:\n    with output_lock(Path({str(path)!r})): pass\nexcept InputError as problem: print(problem)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"is being written by process {os.getpid()} on " in result.stdout
    assert read_token(path) is None
    with output_lock(path):
        pass
    assert not list(tmp_path.iterdir())
