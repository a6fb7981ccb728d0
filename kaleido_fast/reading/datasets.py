"""Training data: by name or from files, scaled into the range of a bound."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kaleido_fast.checkpoint import Scaling
from kaleido_fast.errors import InputError, unknown_name, warn_caller
from kaleido_fast.model import BOUND_RANGES, BOUNDS, MAX_WIDTH
from kaleido_fast.names import BACKGROUND, BUILT_IN_PREFIX
from kaleido_fast.reading.arrays import as_classes, place_channels, read_memory, to_array
from kaleido_fast.reading.image_files import check_background
from kaleido_fast.reading.raw_data import RawData
from kaleido_fast.reading.readers import read_npz_file
from kaleido_fast.reading.sources import KINDS, read_file, read_path
from kaleido_fast.scalars import plain_number, plain_numbers, real_number
from kaleido_fast.system.files import atomic_path
from kaleido_fast.system.neutral import neutral

__all__ = ["DOWNLOADED", "NAMES", "DataWarning", "Dataset", "Scaling", "built_in", "load_dataset"]

SPLIT_SEED = 0
FAINT = 31  # bytes up to here are seldom pictures with black at 0 and white at 255
_OPENML_IDS = {"mnist": 554, "fashion-mnist": 40996, "cifar10": 40927}  # ids are fixed for ever, names are not
_OPENML_SHAPES = {"mnist": (28, 28), "fashion-mnist": (28, 28), "cifar10": (3, 32, 32)}
DOWNLOADED = tuple(_OPENML_IDS)
NAMES = ("points1d", "points2d", "digits", *DOWNLOADED)


@dataclass(frozen=True)
class Dataset:
    """Examples in model values.

    Args:
        name: short name, kept in checkpoints.
        data: float32 (n, D), inside the range of the bound it was scaled for.
        labels: int64 (n,) classes, or None.
        sample_shape: shape of one example; its product is D. Colour images are (height, width, 3): channels last.
        scaling: how raw values became ``data``; its inverse gives raw values back for pictures.
        sha256: hash of the raw values and their shape.

    Raises:
        InputError: values that are not finite float32, or parts that do not fit each other.
    """

    name: str
    data: Tensor
    labels: Tensor | None = None
    sample_shape: tuple[int, ...] = ()
    scaling: Scaling = field(default_factory=Scaling)
    sha256: str = ""

    def __post_init__(self) -> None:
        for name in ("data", "labels"):
            if isinstance(getattr(self, name), np.ndarray):
                object.__setattr__(self, name, torch.from_numpy(getattr(self, name).copy()))
        if self.data.ndim != 2 or self.data.dtype != torch.float32 or 0 in self.data.shape:
            raise InputError(
                f"data set {self.name}: data of shape {tuple(self.data.shape)} and {self.data.dtype}: "
                "give float32 (n, D) with at least one example and one value"
            )
        bad = int((~torch.isfinite(self.data)).sum())
        if bad:
            raise InputError(f"data set {self.name}: {bad} values are NaN or infinite: every value must be finite")
        object.__setattr__(self, "sample_shape", tuple(self.sample_shape) or (self.dim,))
        if math.prod(self.sample_shape) != self.dim:
            raise InputError(f"data set {self.name}: sample shape {self.sample_shape} does not hold {self.dim} values")
        self._check_labels()
        if not self.sha256:
            object.__setattr__(self, "sha256", _digest(self.data.cpu().numpy()))

    def _check_labels(self) -> None:
        labels = self.labels
        if labels is None:
            return
        if labels.shape == (len(self), 1):
            labels = labels[:, 0]
            object.__setattr__(self, "labels", labels)
        if labels.shape != (len(self),) or labels.dtype != torch.int64:
            raise InputError(
                f"data set {self.name}: labels of shape {tuple(labels.shape)} and {labels.dtype} "
                f"for {len(self)} examples: give one int64 per example"
            )

    def __len__(self) -> int:
        return self.data.shape[0]

    @property
    def dim(self) -> int:
        """D, the number of values in one example."""
        return self.data.shape[1]

    def take(self, indices: Tensor, name: str | None = None) -> Dataset:
        """The examples at ``indices`` (int64, (m,)); their hash derives from this one's and the indices."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        digest = hashlib.sha256(self.sha256.encode() + indices.numpy().astype("<i8").tobytes()).hexdigest()
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, name=name or self.name, data=self.data[indices], labels=labels, sha256=digest)

    def split(self, held_out: int) -> tuple[Dataset, Dataset | None]:
        """The training part and ``held_out`` examples kept back (None when 0): the same ones every time.

        The order is ``numpy.random.RandomState(0).permutation(n)``, a stream that numpy has frozen for good; its
        first ``held_out`` examples are kept back.

        Raises:
            InputError: a negative count, or one that leaves nothing to train on.
        """
        held_out = plain_number(held_out)
        if held_out == 0 and not isinstance(held_out, bool):
            return self, None
        if isinstance(held_out, bool) or not isinstance(held_out, int) or not 0 < held_out < len(self):
            raise InputError(
                f"held_out = {held_out!r} of {len(self)} examples: give 0 to {len(self) - 1}, so that some are left"
            )
        order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(len(self)).astype(np.int64))
        train, kept = order[held_out:].sort().values, order[:held_out].sort().values
        return self.take(train, f"{self.name}[train]"), self.take(kept, f"{self.name}[held out]")


class DataWarning(UserWarning):
    """How data were read, where that is not the only way to read them."""


@neutral()
def load_dataset(
    source: Any,
    *,
    bound: str = "tanh",
    limit: int | None = None,
    labels: Any = None,
    value_range: tuple[float, float] | None = None,
    background: str = BACKGROUND,
    channels: str | None = None,
) -> Dataset:
    """Read a data set and scale it into the range of ``bound``.

    Args:
        source: one of

            - a name: points1d, points2d, digits, mnist, fashion-mnist, cifar10. Where a file or folder of that name
              lies here too, write ``builtin:mnist`` for the data set, ``./mnist`` for the file;
            - a path: an IDX or .npy file (gz or not), an .npz file, a table as text (.csv, .tsv, .txt), a picture or
              its frames, a folder of pictures of one size, a folder of such folders (the classes), or one with an IDX
              file of images;
            - an array or tensor (n, ...) of n examples, or (n,) of n examples of one value; pictures of Pillow.

        bound: tanh ([-1, 1]) or sigmoid ([0, 1]).
        limit: keep that many examples, evenly spaced through the data (so that sorted classes all come in).
        labels: classes, (n,) or (n, 1), or a file of them, where they are not found with the data.
        value_range: raw values that become the ends of the bound's range. Known for bytes (0, 255), truth values
            (0, 1), pictures of 8 and 16 bits, and named data; without it other numbers must lie in the bound's range
            and are taken as they are.
        background: what transparent pictures are laid over: the name of a colour, or #rrggbb.
        channels: where arrays of pictures have their colours: "first", "last", "none" (there is no such axis); None
            finds out, and asks where the shape does not show it.

    Warns:
        DataWarning: what was decided in reading, such as for transparent pictures or left-out frames.

    Raises:
        InputError: an unknown name, a missing, damaged or unsuitable file, values that are not finite or out of range.
    """
    if bound not in BOUNDS:
        raise unknown_name("bound", bound, BOUNDS)
    check_background(background)
    raw = _read_raw(source, background, channels)
    if labels is not None:
        raw = replace(raw, labels=_read_labels(labels, background))
    raw = _checked(_limited(raw, limit))
    scaling = _find_scaling(raw, BOUND_RANGES[bound], value_range)
    for note in (*raw.notes, *_doubts(raw, value_range)):
        warn_caller(f"data {raw.name}: {note}", DataWarning)
    return Dataset(
        name=raw.name,
        data=_scaled(raw.values, scaling, BOUND_RANGES[bound]),
        labels=None if raw.labels is None else torch.from_numpy(raw.labels),
        sample_shape=raw.values.shape[1:],
        scaling=scaling,
        sha256=_digest(raw.values),
    )


def _digest(values: np.ndarray) -> str:
    """SHA-256 over type, shape and the little-endian bytes in C order."""
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
    digest = hashlib.sha256(f"{little.dtype.str}{little.shape}".encode())
    digest.update(little.tobytes())
    return digest.hexdigest()


def built_in(name: str) -> str:
    """How to write the name of a built-in data set so that no file or folder here can stand in its place."""
    return BUILT_IN_PREFIX + name


def _read_raw(source: Any, background: str, channels: str | None) -> RawData:
    if not isinstance(source, (str, Path)):
        return place_channels(read_memory(source, background), channels)
    name, path = str(source), Path(source)
    if not name:
        raise InputError(f"the name of the data is empty: give {KINDS}, or one of {', '.join(NAMES)}")
    if name.startswith(BUILT_IN_PREFIX):
        name = name.removeprefix(BUILT_IN_PREFIX)
        if name not in NAMES:
            raise unknown_name("built-in data set", name, NAMES)
        return _read_named(name)
    if isinstance(source, str) and name in NAMES and path.exists():
        raise InputError(
            f"{name!r} is a built-in data set, and a {'folder' if path.is_dir() else 'file'} of that name lies here: "
            f"write {built_in(name)} for the data set, ./{name} for the {'folder' if path.is_dir() else 'file'}"
        )
    if name in NAMES and not path.exists():
        return _read_named(name)
    if not path.exists():
        if path.suffix or name != path.name:
            raise InputError(f"data {name} does not exist: give {KINDS}")
        raise InputError(f"{unknown_name('data set', name, NAMES)}; nor is there a file or folder of that name")
    raw = read_path(path, background, channels)
    # A card with a built-in name would have the built-in data taken for these.
    return replace(raw, name=f"./{raw.name}") if raw.name in NAMES else raw


def _read_named(name: str) -> RawData:
    return _BUILT_IN[name]() if name in _BUILT_IN else _fetch_openml(name)


def _read_labels(source: Any, background: str) -> np.ndarray:
    if not isinstance(source, (str, Path)):
        return to_array(source, "labels")
    path = Path(source)
    if not path.is_file():
        raise InputError(f"labels {path}: no such file; give an IDX, .npy, .npz or CSV file of whole numbers")
    raw = read_file(path, background, "none")
    return raw.labels if raw.labels is not None else raw.values


def _doubts(raw: RawData, value_range: tuple[float, float] | None) -> Iterator[str]:
    """What looks as if it were meant otherwise."""
    if value_range is None and raw.value_range == (0.0, 255.0) and 0 < raw.values.max() <= FAINT:
        yield (
            f"bytes up to {raw.values.max()} only, of which 255 is white: "
            f"value_range=(0, {raw.values.max()}) (--value-range) makes that the end of the range"
        )


def _limited(raw: RawData, limit: int | None) -> RawData:
    if limit is None:
        return raw
    limit = plain_number(limit)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise InputError(f"limit = {limit!r}: give a whole number of examples, at least 1")
    n = len(raw.values)
    kept = np.arange(min(limit, n)) * n // min(limit, n)
    labels = raw.labels[kept] if raw.labels is not None and len(raw.labels) == n else raw.labels
    return replace(raw, values=raw.values[kept], labels=labels)


def _checked(raw: RawData) -> RawData:
    values, labels = raw.values, raw.labels
    if values.ndim == 0 or 0 in values.shape:
        raise InputError(f"data {raw.name} has shape {values.shape}: it must hold at least one example of one value")
    if math.prod(values.shape[1:]) > MAX_WIDTH:
        raise InputError(
            f"data {raw.name}: examples of shape {values.shape[1:]} are too large: at most {MAX_WIDTH:,} values each"
        )
    if values.ndim == 1:
        raw = replace(raw, values=values[:, None])
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise InputError(f"data {raw.name}: {bad} values are NaN or infinite: every value must be finite")
    return raw if labels is None else replace(raw, labels=as_classes(labels, len(values), raw.name))


def _find_scaling(raw: RawData, bound: tuple[float, float], value_range: tuple[float, float] | None) -> Scaling:
    low, high = bound
    seen_low, seen_high = float(raw.values.min()), float(raw.values.max())
    known = value_range if value_range is not None else raw.value_range
    if known is None:
        if low <= seen_low and seen_high <= high:
            return Scaling()
        raise InputError(
            f"data {raw.name}: values from {seen_low:g} to {seen_high:g} are outside of [{low:g}, {high:g}]: "
            "pass value_range=(lowest, highest) (--value-range) to have them scaled"
        )
    ends = plain_numbers(known)
    if not isinstance(ends, tuple) or len(ends) != 2:
        raise InputError(f"value_range = {value_range!r}: give two finite numbers, the lower one first")
    bottom, top = (math.nan if end is None else end for end in map(real_number, ends))
    if not (math.isfinite(top - bottom) and bottom < top):
        raise InputError(f"value_range = ({bottom:g}, {top:g}): give two finite numbers, the lower one first")
    if seen_low < bottom or seen_high > top:
        raise InputError(
            f"data {raw.name}: values from {seen_low:g} to {seen_high:g} are outside of [{bottom:g}, {top:g}]: "
            "pass a value_range=(lowest, highest) (--value-range) that holds them"
        )
    scale = (high - low) / (top - bottom)
    return Scaling(scale=scale, offset=low - bottom * scale)


def _scaled(values: np.ndarray, scaling: Scaling, bound: tuple[float, float]) -> Tensor:
    """Model values (n, D), computed in fp64 and clamped: rounding must not leave the range."""
    flat = values.reshape(len(values), -1)
    data = torch.empty(flat.shape, dtype=torch.float32)
    for start in range(0, len(flat), 4096):  # in blocks, so that the fp64 copy stays small
        block = scaling.apply(torch.from_numpy(flat[start : start + 4096].astype(np.float64)))
        data[start : start + 4096] = block.clamp(*bound).float()
    return data


def _points1d() -> RawData:
    return RawData("points1d", np.array([[-0.8], [-0.2], [0.2], [0.8]]))


def _points2d() -> RawData:
    return RawData("points2d", np.array([[x, y] for x in (0.2, 0.8) for y in (0.2, 0.8)]))


@contextmanager
def _needs_scikit_learn(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as problem:
        raise InputError(f"data set {name} comes with scikit-learn: pip install 'kaleido-fast[data]'") from problem


def _digits() -> RawData:
    """1797 hand-written digits of 8 x 8 with 17 grey levels, from scikit-learn itself: no network."""
    with _needs_scikit_learn("digits"):
        from sklearn.datasets import load_digits
    bunch = load_digits()
    return RawData("digits", bunch.images.astype(np.uint8), bunch.target, (0.0, 16.0))


_BUILT_IN: dict[str, Callable[[], RawData]] = {"points1d": _points1d, "points2d": _points2d, "digits": _digits}


def _fetch_openml(name: str) -> RawData:
    """A data set from OpenML by scikit-learn; parsing takes minutes, so the bytes are kept beside its cache."""
    with _needs_scikit_learn(name):
        from sklearn.datasets import fetch_openml, get_data_home
    home = Path(get_data_home())
    cached = home / "kaleido-fast" / f"{name}.npz"
    if not cached.is_file():
        try:
            # "liac-arff" is the parser that needs no further package, so results do not depend on what is installed
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a warning for each retry; the error below says it all
                bunch = fetch_openml(data_id=_OPENML_IDS[name], as_frame=False, parser="liac-arff", data_home=str(home))
        except (OSError, ValueError) as problem:
            text = " ".join(str(problem).split()) or type(problem).__name__
            raise InputError(
                f"data set {name} could not be fetched from OpenML (id {_OPENML_IDS[name]}, cache {home}): {text}; "
                "check the network, or give the path of its IDX file or of an .npz file instead"
            ) from problem
        _keep_bytes(cached, name, bunch)
    raw = read_npz_file(cached)
    return replace(raw, name=name)


def _keep_bytes(cached: Path, name: str, bunch: Any) -> None:
    images = np.asarray(bunch.data).astype(np.uint8).reshape(-1, *_OPENML_SHAPES[name])
    if images.ndim == 4:
        images = images.transpose(0, 2, 3, 1)  # stored as three planes; we keep colour last
    cached.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(cached) as temporary, temporary.open("wb") as file:
        np.savez(file, data=np.ascontiguousarray(images), labels=np.asarray(bunch.target).astype(np.int64))
