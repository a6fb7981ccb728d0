"""The real examples that a model is compared with: those it was trained on and those it has not seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from kaleido_fast.checkpoint import Checkpoint
from kaleido_fast.errors import InputError
from kaleido_fast.model import ModelSpec
from kaleido_fast.names import BACKGROUND
from kaleido_fast.reading.datasets import DOWNLOADED, NAMES, Dataset, built_in, load_dataset
from kaleido_fast.showing.pictures import is_image_shape
from kaleido_fast.system.neutral import neutral


@dataclass(frozen=True)
class Reference:
    """Real examples that samples are compared with.

    Args:
        train: what the model was trained on; None if it is not at hand.
        held_out: examples that it has not seen; None if there are none.
        notes: what a reader of the figures should know.
    """

    train: Dataset | None
    held_out: Dataset | None
    notes: tuple[str, ...] = ()


@neutral()
def find_reference(
    checkpoint: Checkpoint,
    source: Any = None,
    *,
    held_out: Any = None,
    labels: Any = None,
    value_range: tuple[float, float] | None = None,
    background: str = BACKGROUND,
    channels: str | None = None,
) -> Reference:
    """The examples that a model was trained on and those that it has not seen.

    From the card of the model: the examples that were left out by a limit or kept back while training are held out.

    Args:
        checkpoint: the model.
        source: its training data, whole: a `Dataset`, or what `load_dataset` takes; by default what its card names, if
            that needs no download.
        held_out: other examples to compare with, likewise.
        labels, value_range: as `load_dataset` takes them, for ``source``; the range also for ``held_out``, and for that
            alone where ``source`` is left out.
        background, channels: as `load_dataset` takes them, for both.

    Raises:
        InputError: no data at hand, data of another shape than the model's, or not those it was trained on.
    """
    card, spec, of_held_out = checkpoint.card, checkpoint.model.spec, value_range
    if source is None:
        value_range = None if held_out is not None else value_range
        named = card.dataset.get("name")
        source = built_in(named) if named in NAMES and named not in DOWNLOADED else None
        if source is None and held_out is None:
            known = f" ({named})" if named else ""
            raise InputError(f"the data{known} that {checkpoint.path} was trained on are not at hand: pass their path")
    read = partial(load_dataset, bound=spec.bound, background=background, channels=channels)
    train, kept, notes = None, None, []
    if source is None:
        notes.append("no training data at hand: distances to it and its basins are left out")
    else:
        data = source if isinstance(source, Dataset) else read(source, labels=labels, value_range=value_range)
        _check_shape(data, spec)
        again = None if data is source else partial(read, source, value_range=value_range)
        train, kept = _divide(data, again, checkpoint)
        if not card.dataset.get("sha256"):
            notes.append("the model does not say what it was trained on: all of the data count as training data")
    if held_out is not None:
        kept = held_out if isinstance(held_out, Dataset) else read(held_out, value_range=of_held_out)
        _check_shape(kept, spec)
    if kept is None:
        notes.append("no held-out examples: samples are compared with the training examples themselves")
    return Reference(train, kept, tuple(notes))


def _check_shape(data: Dataset, spec: ModelSpec) -> None:
    if data.dim != spec.dim or (is_image_shape(spec.sample_shape) and data.sample_shape != spec.sample_shape):
        raise InputError(
            f"data {data.name} has examples of shape {data.sample_shape}, the model samples of {spec.sample_shape}: "
            "give data of the model's shape"
        )


def _divide(
    data: Dataset, again: Callable[..., Dataset] | None, checkpoint: Checkpoint
) -> tuple[Dataset, Dataset | None]:
    """Training examples, and those not seen: left out by a limit, or kept back while training.

    ``again`` reads the data with a ``limit``, where they were read.
    """
    card = checkpoint.card
    used, rest = data, None
    n, digest = card.dataset.get("n_examples", len(data)), card.dataset.get("sha256") or data.sha256
    if data.sha256 != digest and n < len(data) and again is not None:
        used = again(limit=n)
        seen = torch.zeros(len(data), dtype=torch.bool)
        seen[torch.arange(n) * len(data) // n] = True
        rest = data.take((~seen).nonzero()[:, 0])
        used = replace(used, labels=None if data.labels is None else data.labels[seen])
    if used.sha256 != digest:
        raise InputError(
            f"data {data.name} are not what {checkpoint.path} was trained on ({card.dataset.get('name')}, {n:,} "
            "examples): give those, read as they were then (value_range, background, channels), or pass these as "
            "held-out examples"
        )
    train, kept = used.split(int(card.recipe.get("held_out", 0)))
    return train, _joined(kept, rest)


def _joined(first: Dataset | None, second: Dataset | None) -> Dataset | None:
    if first is None or second is None:
        return first or second
    labels = None
    if first.labels is not None and second.labels is not None:
        labels = torch.cat((first.labels, second.labels))
    return replace(first, data=torch.cat((first.data, second.data)), labels=labels, sha256="")
