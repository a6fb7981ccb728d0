"""An .npy written block by block."""

from __future__ import annotations

import json

import numpy as np
from stored_blocks import LAYOUT, block_arrays, make_record

from kaleido_fast.storing.npy_output import Begun, NpyOutput, read_partial


def test_npy_blocks_become_a_plain_file(tmp_path):
    output = NpyOutput.create(tmp_path / "a.npy", LAYOUT, make_record())
    assert read_partial(tmp_path / "a.npy") == Begun(7, make_record(), overwrite=False, ends=False)
    for block in range(LAYOUT.n_blocks):
        output.write(block, block_arrays(LAYOUT, block))
    assert not (tmp_path / "a.npy").exists()
    files = output.finish()
    want = np.concatenate([block_arrays(LAYOUT, block)["draws"] for block in range(LAYOUT.n_blocks)])
    assert np.array_equal(np.load(tmp_path / "a.npy"), want)
    assert json.loads((tmp_path / "a.json").read_text()) == make_record()
    assert sorted(str(path) for path in tmp_path.iterdir()) == sorted(files)
    assert read_partial(tmp_path / "a.npy") is None
