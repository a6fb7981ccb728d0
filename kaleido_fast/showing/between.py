"""From the samples of one seed to those of another: a flow gives each start one sample, so starts can be mixed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kaleido_fast.checkpoint import Checkpoint, load_checkpoint
from kaleido_fast.errors import InputError, SamplerWarning
from kaleido_fast.planning.request import Trace
from kaleido_fast.sampling import fast_sample
from kaleido_fast.scalars import whole_number
from kaleido_fast.showing.states import Shown, checked, chosen_sampler

DEFAULT_FRAMES = 25
_LEAST_SINE = 1e-6  # of the angle between two starts; below it they lie on one line


def sample_between(
    model: Checkpoint | str | Path,
    *,
    seeds: tuple[int, int],
    n_chains: int,
    first_chain: int = 0,
    n_frames: int = DEFAULT_FRAMES,
    shape: tuple[int, ...] = (),
    **options: Any,
) -> Shown:
    """Draws of a flow from starts that move, chain by chain, from the start noise of one seed to that of another.

    Every state is a finished draw; the first and the last are those of the two seeds, bit for bit.

    Args:
        model: a checkpoint, the path of one, or the name of a bundled one.
        seeds: two different ones.
        n_chains: number of chains, from ``first_chain`` on.
        n_frames: starts of a chain, 2 or more, at equal angles (see `interpolate_starts`).
        shape: of one sample, where another one than the model's is wanted.
        options: of `kaleido_fast.fast_sample`, for one draw of sampler "flow".

    Raises:
        InputError: a model that is not sampled as a flow; equal seeds; two starts of a chain with no arc between them;
            and as `fast_sample`.
    """
    checkpoint = model if isinstance(model, Checkpoint) else load_checkpoint(model)
    refuse_kaleidoscope(checkpoint, options)
    first, last = (whole_number("seed", seed, 0, 2**64 - 1) for seed in seeds)
    whole_number("n_frames", n_frames, 2, 2**31 - 1)
    if first == last:
        raise InputError(f"the seeds {first} and {last} are the same, so there is no way between: give two others")
    spec = checkpoint.model.spec
    shares = torch.arange(n_frames, dtype=torch.float64) / (n_frames - 1)
    ends = [_start(checkpoint, seed, n_chains, first_chain, options) for seed in (first, last)]
    starts = interpolate_starts(ends[0], ends[1], shares, (spec.low + spec.high) / 2)
    draws = fast_sample(checkpoint, n_chains=n_chains * n_frames, z0=starts.flatten(0, 1), **options).final
    states = draws.cpu().float().unflatten(0, (n_frames, n_chains)).transpose(0, 1).contiguous()
    captions = (f"seed {first}", *(f"{share:.0%}" for share in shares[1:-1].tolist()), f"seed {last}")
    return checked(states, tuple(range(n_frames)), checkpoint, shape, first_chain=first_chain, captions=captions)


def interpolate_starts(first: Tensor, last: Tensor, shares: Tensor, middle: float) -> Tensor:
    """Starts on the way from one to another along the arc between them, at constant angular speed.

    The angle is counted from ``middle``, and the distance from there goes evenly from that of the first to that of the
    last (Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985, for vectors of any length): noise of
    many values lies in a thin shell, and a straight line between two points of it would pass inside, through states
    that are no noise of this scale. Share 0 is ``first`` and share 1 is ``last``, bit for bit.

    Args:
        first, last: (n, D), of one floating type.
        shares: (k,) of the way, 0 to 1.
        middle: of the data range.

    Returns:
        (k, n, D) in the type of ``first``.

    Raises:
        InputError: a chain whose two starts lie on one line through the middle.
    """
    a, b = first.double() - middle, last.double() - middle
    lengths = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    angle = ((a * b).sum(dim=1, keepdim=True) / (lengths[0] * lengths[1])).clamp(-1, 1).acos()
    alone = (~(angle.sin() >= _LEAST_SINE)).flatten().nonzero()
    if len(alone):
        raise InputError(
            f"the two starts of place {int(alone[0])} lie on one line through the middle of the range, as all of one "
            "value do: no arc leads from one to the other; take another seed, or a model of longer samples"
        )
    to = shares.double().to(first.device)[:, None, None]
    length = (1 - to) * lengths[0] + to * lengths[1]
    of_a = ((1 - to) * angle).sin() / angle.sin() * (length / lengths[0])
    of_b = (to * angle).sin() / angle.sin() * (length / lengths[1])
    return (of_a * first.double() + of_b * last.double() + (1 - of_a - of_b) * middle).to(first.dtype)


def refuse_kaleidoscope(checkpoint: Checkpoint, options: dict[str, Any]) -> None:
    """Refuse a model that would not be sampled as a flow: `InputError`."""
    sampler = chosen_sampler(checkpoint, options)
    if sampler != "flow":
        raise InputError(
            f"the way between two seeds is for sampler 'flow', and model {checkpoint.card.name} would be sampled with "
            f"{sampler!r}: there many starts lead to one end, so that between two of them little moves; take a model "
            "trained as a flow"
        )


def _start(checkpoint: Checkpoint, seed: int, n_chains: int, first_chain: int, options: dict[str, Any]) -> Tensor:
    """Start noise of a seed, (n_chains, D), as the engine itself makes it."""
    options = {**options, "seed": seed, "steps": 1, "progress": False}  # it does not depend on the steps
    trace = Trace(tuple(range(first_chain, first_chain + n_chains)), (0,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SamplerWarning)  # the run of the draws says it
        result = fast_sample(checkpoint, n_chains=n_chains, first_chain=first_chain, trace=trace, **options)
    assert result.trace is not None
    return result.trace[:, 0]
