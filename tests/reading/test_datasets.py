"""Data sets: what is read is right, and whatever else is refused in one line."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from kaleido_fast.checkpoint import Scaling
from kaleido_fast.errors import InputError
from kaleido_fast.reading.datasets import Dataset, load_dataset
from kaleido_fast.reading.readers import IDX_TYPES, choose_arrays, find_labels

SHARED_DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SLOW = settings(QUICK, max_examples=2500)


@pytest.fixture
def mnist_images() -> Path:
    path = SHARED_DATA / "mnist10k-images-idx3-ubyte.gz"
    if not path.is_file():
        pytest.skip(f"real MNIST digits are not at {path}")
    return path


def images_of(n: int = 7, height: int = 5, width: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width), dtype=np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    code = {np.dtype(text): code for code, text in IDX_TYPES.items()}[array.dtype.newbyteorder(">")]
    return (
        struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
        + array.astype(array.dtype.newbyteorder(">")).tobytes()
    )


def npy_bytes(array: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def npz_bytes(compressed: bool = True, **arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def png_bytes(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def tiff_bytes(pages: np.ndarray) -> bytes:
    stream = io.BytesIO()
    first, *rest = (Image.fromarray(page) for page in pages)
    first.save(stream, "TIFF", save_all=True, append_images=rest)
    return stream.getvalue()


def refused(path, *parts: str, **options) -> str:
    """The data is refused by one line that holds all parts."""
    with pytest.raises(InputError) as caught:
        load_dataset(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text
    return text


# --- named sets


@pytest.mark.parametrize("bound", ["tanh", "sigmoid"])
def test_digits(bound):
    digits = load_dataset("digits", bound=bound)
    assert digits.data.shape == (1797, 64)
    assert digits.sample_shape == (8, 8)
    assert digits.labels is not None
    assert digits.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    low = -1.0 if bound == "tanh" else 0.0
    assert (float(digits.data.min()), float(digits.data.max())) == (low, 1.0)
    raw = digits.scaling.undo(digits.data)
    assert torch.equal(raw, raw.round())
    assert (float(raw.min()), float(raw.max())) == (0.0, 16.0)


def test_same_raw_values_same_hash():
    assert load_dataset("digits").sha256 == load_dataset("digits", bound="sigmoid").sha256
    assert load_dataset("digits").sha256 != load_dataset("digits", limit=1000).sha256


def test_points_are_taken_as_they_are():
    line, square = load_dataset("points1d"), load_dataset("points2d", bound="sigmoid")
    torch.testing.assert_close(line.data[:, 0], torch.tensor([-0.8, -0.2, 0.2, 0.8]))
    assert {tuple(round(v, 6) for v in row) for row in square.data.tolist()} == {
        (0.2, 0.2), (0.2, 0.8), (0.8, 0.2), (0.8, 0.8),
    }  # fmt: skip
    assert line.scaling == square.scaling == Scaling()


def test_digits_without_scikit_learn(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused("digits", "scikit-learn", "kaleido-fast[data]")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_without_network(name, monkeypatch, tmp_path):
    import sklearn.datasets

    def offline(**options):
        raise OSError("no route to host")

    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", offline)
    refused(name, "OpenML", str(tmp_path), "no route to host", "IDX")


def test_cifar_from_the_cache_has_its_colours_last(monkeypatch, tmp_path):
    import sklearn.datasets
    from sklearn.utils import Bunch

    planes = np.random.default_rng(1).integers(0, 256, (5, 3, 32, 32))
    calls = []

    def fetch(**options):
        calls.append(options)
        return Bunch(data=planes.reshape(5, -1).astype(float), target=np.array(list("30129")))

    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    first, second = load_dataset("cifar10"), load_dataset("cifar10")
    assert len(calls) == 1  # the second came from the bytes that were kept
    assert first.sample_shape == (32, 32, 3)
    assert torch.equal(first.data, second.data)
    assert first.labels is not None
    assert first.labels.tolist() == [3, 0, 1, 2, 9]
    back = first.scaling.undo(first.data).reshape(5, 32, 32, 3).round().numpy()
    assert (back == planes.transpose(0, 2, 3, 1)).all()


def test_unknown_names():
    refused("digit", "unknown data set", "did you mean 'digits'")
    refused("digits", "unknown bound", bound="tanhh")
    refused("no/such.npy", "does not exist")


# --- files


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


def test_labels_from_elsewhere(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 2)))
    np.save(tmp_path / "classes.npy", np.array([3, 1, 2, 2]))
    data = load_dataset(tmp_path / "x.npy", labels=tmp_path / "classes.npy")
    assert data.labels is not None
    assert data.labels.tolist() == [3, 1, 2, 2]
    np.save(tmp_path / "classes.npy", np.array([3, 1]))
    refused(tmp_path / "x.npy", "labels", "(2,)", labels=tmp_path / "classes.npy")


@pytest.mark.parametrize("colour", [False, True])
def test_folder_of_images(tmp_path, colour):
    images = np.random.default_rng(4).integers(0, 256, (3, 4, 5, 3) if colour else (3, 4, 5), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    data = load_dataset(tmp_path)
    assert data.sample_shape == images.shape[1:]
    assert (data.scaling.undo(data.data).round().numpy().reshape(images.shape) == images).all()


def test_folder_with_training_and_test_images(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(images_of(9)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(images_of(4)))
    assert len(load_dataset(tmp_path)) == 9
    (tmp_path / "train-images-idx3-ubyte").rename(tmp_path / "some-images-idx3-ubyte")
    refused(tmp_path, "several IDX files")


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


# --- bad input


def test_colour_and_size_mixtures(tmp_path):
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "b.png")
    refused(tmp_path, "a.png", "5 x 4", "b.png", "6 x 4")
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "b.png")
    refused(tmp_path, "grey", "colour")


def test_odd_images(tmp_path):
    Image.fromarray(np.zeros((1500, 1500), np.uint8)).save(tmp_path / "a.png")
    refused(tmp_path, "1500 x 1500")
    refused(tmp_path / "a.png", "1500 x 1500")


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (np.array([[0.5, np.nan]]), "NaN"),
        (np.array([[0.5, np.inf]]), "infinite"),
        (np.array([[0.5, 1.5]]), "value_range"),
        (np.array([[3, -7]], np.int32), "from -7 to 3"),
        (np.zeros((0, 4)), "empty"),
        (np.zeros((4, 0)), "empty"),
        (np.float64(3.0), "at least one example"),
        (np.array([["a"]]), "<U1"),
        (np.array([[1j]]), "complex"),
        (np.array(["2020-01-01"], "M8[D]"), "datetime"),
        (np.zeros(3, [("a", "f4")]), "type"),
        (np.array([{}], object), "pickle"),
        (np.zeros((1, 1 << 21), bool), "too large"),
    ],
)
def test_unsuitable_arrays(tmp_path, values, part):
    np.save(tmp_path / "x.npy", values)
    refused(tmp_path / "x.npy", part)


@pytest.mark.parametrize(
    ("value_range", "part"),
    [((0, 0.5), "outside"), ((1, 0), "lower one first"), ((0, float("inf")), "finite"), ((float("nan"), 1), "finite")],
)
def test_value_ranges(tmp_path, value_range, part):
    np.save(tmp_path / "x.npy", np.array([[0.0, 0.75]]))
    refused(tmp_path / "x.npy", part, value_range=value_range)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_limits(limit):
    refused("points1d", "limit", limit=limit)


def test_limit_keeps_sorted_classes(tmp_path):
    (tmp_path / "x.npz").write_bytes(npz_bytes(data=np.zeros((1000, 2)), labels=np.repeat(np.arange(10), 100)))
    labels = load_dataset(tmp_path / "x.npz", limit=50).labels
    assert labels is not None
    assert labels.bincount().tolist() == [5] * 10


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


def test_empty_folder(tmp_path):
    refused(tmp_path, "no image")


# --- mutated files: each is read or refused in one line

VALID = {
    "idx": ("x.idx", idx_bytes(images_of())),
    "idx.gz": ("x.idx.gz", gzip.compress(idx_bytes(images_of()), mtime=0)),
    "npy": ("x.npy", npy_bytes(np.linspace(-1, 1, 35, dtype=np.float32).reshape(7, 5))),
    "npz": ("x.npz", npz_bytes(data=images_of(), labels=np.arange(7))),
    "plain npz": ("x.npz", npz_bytes(False, data=images_of(), labels=np.arange(7))),
    "png": ("b.png", png_bytes(images_of()[0])),
    "npy.gz": ("x.npy.gz", gzip.compress(npy_bytes(np.linspace(-1, 1, 35).reshape(7, 5)), mtime=0)),
    "csv": ("x.csv", b"label,a,b\n1,0.5,-0.25\n2,0.125,1\n"),
    "tiff": ("x.tif", tiff_bytes(images_of())),
}


@st.composite
def mutations(draw, valid: bytes):
    """1 to 4 edits of a valid file: bytes changed, cut out, doubled or put in, or the end cut off."""
    content = bytearray(valid)
    # Headers are short but decide most, so half of the edits fall into the first 64 bytes.
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(64, len(content))) | st.integers(0, len(content)))
        kind = draw(st.sampled_from(["set", "set", "flip", "cut", "double", "insert", "end"]))
        length = draw(st.integers(1, 16))
        if kind == "set":
            content[at : at + 1] = bytes([draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))])
        elif kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at : at + length]
        elif kind == "double":
            content[at:at] = content[at : at + length]
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "end":
            del content[at:]
    return bytes(content)


def check_read_or_refused(folder: Path, name: str, content: bytes) -> None:
    path = folder / name
    path.write_bytes(content)
    if path.suffix == ".png":
        (folder / "a.png").write_bytes(png_bytes(images_of()[1]))
        path = folder
    try:
        data = load_dataset(path)
    except InputError as problem:
        assert "\n" not in str(problem)
        assert len(str(problem)) < 1000
    else:
        assert torch.isfinite(data.data).all()
        assert float(data.data.abs().max()) <= 1
        assert data.data.numel() <= 1 << 24


def mutation_test(kind: str, effort: settings):
    name, valid = VALID[kind]

    @effort
    @given(content=mutations(valid))
    @example(content=b"")
    @example(content=valid)
    def test(tmp_path, content):
        check_read_or_refused(tmp_path, name, content)

    return test


@pytest.mark.filterwarnings("ignore::kaleido_fast.reading.datasets.DataWarning")
@pytest.mark.parametrize("kind", VALID)
def test_mutated_files(kind, tmp_path):
    mutation_test(kind, QUICK)(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", VALID)
def test_many_mutated_files(kind, tmp_path):
    mutation_test(kind, SLOW)(tmp_path)


# --- the record itself


def test_split_is_fixed_and_whole():
    digits = load_dataset("digits")
    train, held_out = digits.split(500)
    assert held_out is not None
    assert (len(train), len(held_out)) == (1297, 500)
    joined = torch.cat([train.data, held_out.data])
    assert sorted(map(tuple, joined.tolist())) == sorted(map(tuple, digits.data.tolist()))
    again = digits.split(500)[1]
    assert again is not None
    assert torch.equal(again.data, held_out.data)
    assert held_out.labels is not None
    assert held_out.labels[:12].tolist() == [1, 2, 4, 5, 6, 9, 4, 7, 8, 9, 2, 7]
    assert digits.split(0) == (digits, None)
    for count in (-1, 1797, 5000):
        with pytest.raises(InputError, match="held_out"):
            digits.split(count)


def test_dataset_refuses_misfits():
    good = torch.zeros(3, 4)
    for options in (
        {"data": good.double()},
        {"data": good[0]},
        {"data": torch.full((2, 2), float("nan"))},
        {"data": good, "sample_shape": (3,)},
        {"data": good, "labels": torch.zeros(2, dtype=torch.int64)},
        {"data": good, "labels": torch.zeros(3)},
    ):
        with pytest.raises(InputError, match="data set bad"):
            Dataset("bad", **options)
