"""States of chains that are to be shown: out of a file of draws, or from a network run for the purpose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kaleido_fast.checkpoint import Checkpoint, Scaling, load_checkpoint
from kaleido_fast.errors import InputError
from kaleido_fast.model import ModelSpec
from kaleido_fast.planning.merging import recommended_sampler
from kaleido_fast.planning.request import Trace
from kaleido_fast.sampling import fast_sample, prepare_run
from kaleido_fast.showing.pictures import is_image_shape
from kaleido_fast.storing.draws import read_draws

MOST_FRAMES = 80


@dataclass(frozen=True)
class Shown:
    """States of some chains over some steps.

    Args:
        states: (chains, steps, D) float32 in model values, none of them NaN.
        steps: number of steps made before each state; 0 is the start noise. Of states with ``captions``, their place.
        spec: sizes, shape and range of a sample; of a file without a record, a stand-in for the network's.
        scaling: raw data to model values.
        first_chain: absolute id of the first chain.
        name: of the model or the file.
        captions: what stands above each state, where it is not the number of steps.
    """

    states: Tensor
    steps: tuple[int, ...]
    spec: ModelSpec
    scaling: Scaling
    first_chain: int = 0
    name: str = ""
    captions: tuple[str, ...] = ()

    @property
    def titles(self) -> tuple[str, ...]:
        """What is written on a frame of each state."""
        return self.captions or tuple("start noise" if step == 0 else f"step {step:,}" for step in self.steps)

    @property
    def are_pictures(self) -> bool:
        """Whether a sample is a picture; otherwise it is a point of one or two values."""
        return is_image_shape(self.spec.sample_shape)


def read_shown(
    path: Path, *, first: int = 0, n_chains: int, shape: tuple[int, ...] = (), last_only: bool = False
) -> Shown:
    """Some chains of a file of draws; no other part of a file that is read by blocks is touched.

    Args:
        path: a .npy, .npz or .safetensors file of draws, or a .zarr store.
        first: the first chain wanted, counted from the start of the file.
        n_chains: as many chains at most.
        shape: of one sample, where the file has no record of it or another is wanted.
        last_only: the last draw of each chain, for still pictures.

    Raises:
        InputError: a file that cannot be read, no such chains, NaN, or a shape that does not fit.
    """
    draws, record = _open(path)
    total, n_draws, dim = draws.shape
    if not total or not n_draws or not dim:
        raise InputError(f"{path} holds no draws: its shape is {tuple(draws.shape)}")
    if not 0 <= first < total:
        raise InputError(f"{path} holds chains 0 to {total - 1:,}: there is no chain {first:,}")
    wanted = slice(n_draws - 1, n_draws) if last_only else slice(0, n_draws)
    states = torch.from_numpy(np.array(draws[first : first + n_chains, wanted], dtype=np.float32))
    _check_finite(states, str(path))
    request = record.get("request", {})
    burn_in, thin = int(request.get("burn_in", 0)), int(request.get("thin", 1))
    return Shown(
        states,
        tuple(burn_in + (i + 1) * thin for i in range(n_draws))[wanted],
        _spec(record, dim, shape, states, path),
        Scaling(**record["scaling"]) if "scaling" in record else Scaling(),
        int(request.get("first_chain", 0)) + first,
        path.stem,
    )


def sample_shown(
    model: Checkpoint | str | Path,
    *,
    n_chains: int,
    n_steps: int | None = None,
    shape: tuple[int, ...] = (),
    most_frames: int = MOST_FRAMES,
    steps: tuple[int, ...] | None = None,
    **options: Any,
) -> Shown:
    """Run a network from noise and keep its states on the way.

    Args:
        model: a checkpoint, the path of one, or the name of a bundled one.
        n_chains: number of chains, all of them kept.
        n_steps: steps of each, of a flow those of a draw; None for as many as the model recommends.
        shape: of one sample, where another one than the model's is wanted.
        most_frames: of longer runs this many steps are kept, ever further apart.
        steps: exactly these steps instead.
        options: of `kaleido_fast.fast_sample`.

    Raises:
        InputError: as `fast_sample`; NaN.
    """
    checkpoint = model if isinstance(model, Checkpoint) else load_checkpoint(model)
    if n_steps is not None:
        options |= _of_length(n_steps, chosen_sampler(checkpoint, options))
    planned = prepare_run(
        checkpoint, n_chains=n_chains, **{k: v for k, v in options.items() if k not in ("progress", "callback")}
    ).request
    steps = frame_steps(planned.schedule.n_steps, most_frames) if steps is None else steps
    first = planned.first_chain
    trace = Trace(tuple(range(first, first + n_chains)), steps)
    result = fast_sample(checkpoint, n_chains=n_chains, trace=trace, **options)
    assert result.trace is not None
    return checked(result.trace.cpu().float(), steps, checkpoint, shape, first_chain=first)


def checked(
    states: Tensor,
    steps: tuple[int, ...],
    checkpoint: Checkpoint,
    shape: tuple[int, ...] = (),
    *,
    first_chain: int = 0,
    captions: tuple[str, ...] = (),
) -> Shown:
    """States of a checkpoint's network as they are shown; see `Shown`, and `sample_shown` for ``shape``.

    Raises:
        InputError: NaN, or a shape that does not fit.
    """
    spec, card = checkpoint.model.spec, checkpoint.card
    _check_finite(states, f"model {card.name}")
    if shape:
        spec = _spec({"model": json.loads(spec.to_json())}, spec.dim, shape, states, checkpoint.path)
    return Shown(states, steps, spec, card.scaling, first_chain, card.name, captions)


def chosen_sampler(checkpoint: Checkpoint, options: Mapping[str, Any]) -> str:
    """The sampler of a run with these options: the one asked for, else the checkpoint's."""
    return str(options.get("sampler") or recommended_sampler(checkpoint.card.sampling))


def _of_length(n_steps: int, sampler: str) -> dict[str, int]:
    """Options of a run of one draw that takes so many steps."""
    return {"steps": n_steps} if sampler == "flow" else {"burn_in": n_steps - 1, "thin": 1}


def frame_steps(n_steps: int, most: int = MOST_FRAMES) -> tuple[int, ...]:
    """Steps to show of a run: 0, then every one while there is room, then ever wider apart up to ``n_steps``."""
    if n_steps < most or most < 4:
        return tuple(range(n_steps + 1)) if n_steps < most else tuple(sorted({0, n_steps}))
    head = most // 2
    ratio = (n_steps / head) ** (1 / (most - 1 - head))
    steps = {*range(head + 1), *(round(head * ratio**i) for i in range(1, most - 1 - head)), n_steps}
    return tuple(sorted(steps))


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """Draws (n_chains, n_draws, D), which can be sliced, and their record."""
    file = read_draws(path)
    return file.draws, file.record


def _check_finite(states: Tensor, what: str) -> None:
    bad = int((~torch.isfinite(states)).flatten(1).any(dim=1).sum())
    if bad:
        raise InputError(
            f"{what}: {bad:,} of {len(states):,} chains hold NaN or infinite values, which cannot be drawn; "
            "see their outcome, and show other chains"
        )


def _spec(record: dict[str, Any], dim: int, shape: tuple[int, ...], states: Tensor, path: Path) -> ModelSpec:
    """What is known of a sample: the record's, with ``shape`` put in its place where it is given."""
    if "model" in record:
        known = ModelSpec.from_json(json.dumps(record["model"]))
        if known.dim != dim:
            raise InputError(
                f"{path}: draws of {dim} values, but its record says {known.dim}: the record belongs to another file"
            )
        bound, low, high, shape = known.bound, known.low, known.high, shape or known.sample_shape
    else:
        lowest, highest = float(states.min()), float(states.max())
        if lowest < -1 or highest > 1:
            raise InputError(
                f"{path} has no record, and values from {lowest:g} to {highest:g}: only [-1, 1] can be shown"
            )
        bound = "tanh" if lowest < 0 else "sigmoid"
        low, high = (-1.0, 1.0) if lowest < 0 else (0.0, 1.0)
    return ModelSpec((dim, dim), bound=bound, low=low, high=high, sample_shape=shape)
