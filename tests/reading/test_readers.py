"""IDX, .npy and .npz files: read, or refused in one line whatever was done to them."""

from __future__ import annotations

import gzip
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from example_data import refused
from raw_files import idx_bytes, images_of, npy_bytes, npz_bytes

from kaleido_fast.checkpoint import Scaling
from kaleido_fast.errors import InputError
from kaleido_fast.reading.datasets import load_dataset
from kaleido_fast.reading.readers import IDX_TYPES, choose_arrays, find_labels

SHARED_DATA = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.fixture
def mnist_images() -> Path:
    path = SHARED_DATA / "mnist10k-images-idx3-ubyte.gz"
    if not path.is_file():
        pytest.skip(f"real MNIST digits are not at {path}")
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_of_bytes(tmp_path, zipped):
    images, labels = images_of(), np.arange(7, dtype=np.uint8)
    pack = gzip.compress if zipped else bytes
    ending = ".gz" if zipped else ""
    (tmp_path / f"t-images-idx3-ubyte{ending}").write_bytes(pack(idx_bytes(images)))
    (tmp_path / "t-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    for path in (tmp_path / f"t-images-idx3-ubyte{ending}", tmp_path):
        data = load_dataset(path)
        assert data.sample_shape == (5, 3)
        assert data.labels is not None
        assert data.labels.tolist() == labels.tolist()
        back = data.scaling.undo(data.data).reshape(7, 5, 3).numpy()
        assert np.abs(back - images).max() < 1e-4
        assert np.abs(data.data.reshape(7, 5, 3).numpy() - (images / 127.5 - 1)).max() < 1e-6


@pytest.mark.parametrize("code", [c for c in IDX_TYPES if c != 8])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_idx_types_and_ranks(tmp_path, code, rank):
    shape = (6, 2, 3, 1)[:rank]
    values = np.random.default_rng(2).integers(-100, 100, shape).astype(IDX_TYPES[code])
    (tmp_path / "x.idx").write_bytes(idx_bytes(values))
    data = load_dataset(tmp_path / "x.idx", value_range=(-100, 100))
    assert data.sample_shape == ((1,) if rank == 1 else shape[1:3])  # an axis of one colour is none
    assert np.abs(data.data.numpy().reshape(shape) - values.astype(float) / 100).max() < 1e-6


@pytest.mark.parametrize("dtype", ["f4", "f8", ">f4", "f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_floats(tmp_path, dtype, order):
    values = np.asarray(np.random.default_rng(3).uniform(-1, 1, (11, 2, 3)).astype(dtype), order=order)
    np.save(tmp_path / "x.npy", values)
    data = load_dataset(tmp_path / "x.npy")
    assert data.scaling == Scaling()
    assert np.abs(data.data.reshape(11, 2, 3).numpy() - values.astype("f8")).max() < 1e-7


def test_hash_does_not_depend_on_storage_order(tmp_path):
    values = np.random.default_rng(3).uniform(-1, 1, (11, 6)).astype("f4")
    np.save(tmp_path / "c.npy", values)
    np.save(tmp_path / "f.npy", np.asfortranarray(values))
    np.save(tmp_path / "big.npy", values.astype(">f4"))
    assert len({load_dataset(tmp_path / f"{name}.npy").sha256 for name in ("c", "f", "big")}) == 1


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_with_labels(tmp_path, compressed):
    content = npz_bytes(compressed, images=images_of(), y=np.arange(7), extra=np.zeros(2))
    (tmp_path / "x.npz").write_bytes(content)
    data = load_dataset(tmp_path / "x.npz")
    assert data.sample_shape == (5, 3)
    assert data.labels is not None
    assert data.labels.tolist() == list(range(7))


def test_which_arrays_of_an_npz():
    path = Path("x.npz")
    assert choose_arrays(path, ["arr_0"]) == ("arr_0", None)
    assert choose_arrays(path, ["labels", "arr_0"]) == ("arr_0", "labels")
    with pytest.raises(InputError, match="a, b"):
        choose_arrays(path, ["a", "b"])


def test_labels_beside_idx_files(tmp_path):
    images = tmp_path / "train-images-idx3-ubyte.gz"
    assert find_labels(images) is None
    (tmp_path / "train-labels-idx1-ubyte.gz").touch()
    assert find_labels(images) == tmp_path / "train-labels-idx1-ubyte.gz"
    assert find_labels(tmp_path / "other.idx") is None


def test_real_mnist(mnist_images, tmp_path):
    data = load_dataset(mnist_images)
    assert data.data.shape == (10_000, 784)
    assert data.labels is not None
    assert data.labels.bincount(minlength=10).min() > 800
    ink = float(data.scaling.undo(data.data).mean())
    assert 30 < ink < 37, f"mean grey level {ink}, the literature's is 33.3 of 255"
    # A folder of its own: the data's folder may hold other sets too, and is refused then.
    for name in ("mnist10k-images-idx3-ubyte.gz", "mnist10k-labels-idx1-ubyte.gz"):
        (tmp_path / name).symlink_to(mnist_images.with_name(name).resolve())
    folder = load_dataset(tmp_path, limit=100)
    assert len(folder) == 100
    assert folder.labels is not None


def test_headers_that_promise_too_much(tmp_path):
    path = tmp_path / "x.idx"
    path.write_bytes(struct.pack(">HBBII", 0, 8, 2, 2**31, 2**31))
    refused(path, "4,611,686,018,427,387,904 bytes")
    path.write_bytes(struct.pack(">HBBII", 0, 8, 2, 1000, 1000) + b"0" * 500)
    refused(path, "cannot hold")
    path.write_bytes(struct.pack(">HBBII", 0, 8, 2, 10, 10) + b"0" * 99)
    refused(path, "cut short")
    path.write_bytes(struct.pack(">HBBII", 0, 8, 2, 10, 10) + b"0" * 101)
    refused(path, "goes on")
    path.write_bytes(struct.pack(">HBB", 0, 8, 255))
    refused(path, "IDX")
    path.write_bytes(b"")
    refused(path, "nothing")
    header = npy_bytes(np.zeros((2, 3))).replace(b"(2, 3), }", b"(2000000,3), }")
    (tmp_path / "x.npy").write_bytes(header)
    refused(tmp_path / "x.npy")


def test_zip_bombs(tmp_path):
    bomb = gzip.compress(struct.pack(">HBBII", 0, 8, 2, 1 << 15, 1 << 15) + bytes(1 << 20))
    (tmp_path / "x.idx.gz").write_bytes(bomb)
    refused(tmp_path / "x.idx.gz", "cannot hold")
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.npy", npy_bytes(np.zeros((1 << 24,), np.uint8)))
        archive.getinfo("data.npy").file_size = 1 << 40
    refused(tmp_path / "x.npz", "bytes")
