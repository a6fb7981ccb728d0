"""Files appear under their final name only when whole."""

from __future__ import annotations

import pytest

from kaleido_fast.system.files import atomic_path


def test_an_exception_inside_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
