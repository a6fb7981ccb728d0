"""Files of draws, and pictures."""

from __future__ import annotations

import os
import resource

import numpy as np
import pytest
from conftest import random_mlp

from kaleido_fast import InputError, Scaling, fast_sample
from kaleido_fast.storing.draws import read_draws
from kaleido_fast.storing.record import make_record
from kaleido_fast.storing.writers import check_output, write_draws

MODEL = random_mlp(6, 9, 6, sample_shape=(2, 3))


@pytest.fixture
def result():
    return fast_sample(MODEL, n_chains=11, burn_in=2, n_draws=3, seed=5)


@pytest.mark.parametrize("ending", [".npy", ".npz", ".safetensors"])
def test_round_trip_and_record(result, tmp_path, ending):
    path = tmp_path / f"draws{ending}"
    written = write_draws(path, result, make_record(result, MODEL.spec, Scaling(0.5, -1.0)))
    assert all(file.is_file() for file in written)
    assert sorted(tmp_path.iterdir()) == sorted(written), "no temporary file is left"
    back = read_draws(path)
    assert np.array_equal(back.draws, result.draws.numpy())
    assert back.record["request"]["seed"] == 5
    assert back.record["model_hash"] == result.model_hash
    assert back.record["scaling"] == {"scale": 0.5, "offset": -1.0}
    assert "torch" in back.record["versions"]


@pytest.mark.parametrize("ending", [".npy", ".npz", ".safetensors"])
def test_the_same_run_writes_the_same_bytes(tmp_path, ending):
    contents = []
    for name in ("one", "two"):
        result = fast_sample(MODEL, n_chains=7, burn_in=1)
        files = write_draws(tmp_path / f"{name}{ending}", result, make_record(result, MODEL.spec, Scaling()))
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("ending", [".npy", ".npz", ".safetensors"])
def test_damaged_files_are_refused_in_one_line(result, tmp_path, ending):
    path = tmp_path / f"draws{ending}"
    write_draws(path, result, make_record(result, MODEL.spec, Scaling()))
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"junk" * 9):
        path.write_bytes(damaged)
        with pytest.raises(InputError) as caught:
            read_draws(path)
        assert "\n" not in str(caught.value) and "pickle" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [("", "unknown format|is a folder"), ("a.csv", "unknown format '.csv'"), ("no/a.npy", "does not exist")],
)
def test_outputs_that_cannot_be_written_are_found_beforehand(name, text, tmp_path):
    with pytest.raises(InputError, match=text):
        check_output(tmp_path / name, 10)


def test_a_folder_a_read_only_folder_and_a_small_disk_are_named(tmp_path):
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_output(tmp_path / "folder.npy", 10)
    with pytest.raises(InputError, match="are free there"):
        check_output(tmp_path / "a.npy", 2**62)
    if os.geteuid() != 0:  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(InputError, match="folder of yours"):
            check_output(tmp_path / "a.npy", 10)


def test_a_write_that_fails_leaves_the_earlier_file(result, tmp_path):
    """A file-size limit stands in for a full disk: the write breaks off in the middle."""
    import signal

    path = tmp_path / "draws.npy"
    path.write_bytes(b"earlier")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        with pytest.raises(InputError, match="no space left"):
            write_draws(path, result, make_record(result, MODEL.spec, Scaling()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]
