"""How new the samples of a network are: measured at the end of its training, for its card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kaleido_fast.evaluating.diagnostics import evenly
from kaleido_fast.evaluating.quality import authentic_share, nearest_example_mse
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.sampling import fast_sample

N_SAMPLES = 1000
FEWEST_EXAMPLES = 2  # an example is a copy's measure only beside another


@dataclass(frozen=True)
class Novelty:
    """Samples beside real examples that the network has not seen, both against its training examples.

    Args:
        n_samples: samples looked at.
        nearest: median of the mean squared difference to the nearest training example, in squared data units.
        authentic: share of samples that are no copies, see `kaleido_fast.evaluating.quality.authentic_share`.
        nearest_held_out, authentic_held_out: the same of held-out examples; None where none were held out.
    """

    n_samples: int
    nearest: float
    authentic: float
    nearest_held_out: float | None
    authentic_held_out: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a model card."""
        return {"novelty": asdict(self)}


def measure_novelty(
    model: KaleidoMLP,
    sampling: Mapping[str, Any],
    examples: Tensor,
    held_out: Tensor | None,
    device: torch.device,
) -> Novelty | None:
    """Draw samples with the recommended settings and look how near they lie to training examples.

    Args:
        model: trained, in eval mode.
        sampling: recommended options of `kaleido_fast.fast_sample`.
        examples, held_out: (m, D) and (k, D) that were trained on, and that were not.
        device: runs the chains.

    Returns:
        None where there are too few training examples to tell.
    """
    if len(examples) < FEWEST_EXAMPLES:
        return None
    samples = fast_sample(model, n_chains=N_SAMPLES, seed=0, device=device, **sampling).final
    if not bool(samples.isfinite().all()):
        return None
    real = None if held_out is None else evenly(held_out, N_SAMPLES)
    return Novelty(
        N_SAMPLES,
        _nearest(samples, examples),
        authentic_share(samples, examples),
        None if real is None else _nearest(real, examples),
        None if real is None else authentic_share(real, examples),
    )


def _nearest(points: Tensor, examples: Tensor) -> float:
    return float(nearest_example_mse(points, examples).median())


def novelty_line(facts: Mapping[str, Any]) -> str:
    """What was measured, in one line; ``facts`` under "novelty" of `Novelty.to_dict`."""

    def figure(name: str, form: str) -> str:
        real = facts[f"{name}_held_out"]
        return f"{facts[name]:{form}}" + ("" if real is None else f" (real {real:{form}})")

    return (
        f"of {facts['n_samples']:,} samples {figure('authentic', '.0%')} are no copies of training examples; "
        f"nearest one at {figure('nearest', '.3g')}, mean squared"
    )
