"""What a network gets in training in the place of an example."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from kaleido_fast.model import ModelSpec
from kaleido_fast.presets import TrainingRecipe


def make_inputs(
    clean: Tensor, data: Tensor, spec: ModelSpec, recipe: TrainingRecipe, generator: torch.Generator
) -> Tensor:
    """Training inputs (n, D) for clean examples (n, D), as the recipe's kind has them."""
    if recipe.kind == "flow":
        return mix_noise(clean, spread_shares(len(clean), generator), spec, generator)
    return corrupt(clean, data, spec, recipe, generator)


def corrupt(clean: Tensor, data: Tensor, spec: ModelSpec, recipe: TrainingRecipe, generator: torch.Generator) -> Tensor:
    """Inputs for attractors: moved towards others of ``data``, noised, clamped to the range.

    The clamp is the sampler's own: the network learns from inputs such as jitter will give it.
    """
    inputs = clean
    if recipe.pair_mix > 0:
        others = torch.randint(len(data), (len(clean),), generator=generator, device=clean.device)
        share = torch.rand((len(clean), 1), generator=generator, device=clean.device) * recipe.pair_mix
        inputs = inputs + share * (data[others] - inputs)
    if recipe.noise > 0:
        scale = recipe.noise * (spec.high - spec.low) / 2
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        inputs = (inputs + scale * noise).clamp(spec.low, spec.high)
    return inputs


def mix_noise(clean: Tensor, shares: Tensor, spec: ModelSpec, generator: torch.Generator) -> Tensor:
    """Inputs for a flow: (1 - u) x + u n in units of half the data range around its middle, not clamped.

    Args:
        clean: x, (n, D).
        shares: u, (n, 1), from 0 (the example) to 1 (normal noise alone).
        spec: gives the data range.
        generator: of the noise.
    """
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    middle, half = (spec.low + spec.high) / 2, (spec.high - spec.low) / 2
    if (middle, half) != (0.0, 1.0):
        noise.mul_(half).add_(middle)
    return torch.lerp(clean, noise, shares)


def spread_shares(n: int, generator: torch.Generator) -> Tensor:
    """Shares of noise (n, 1), uniform in [0, 1), one from each n-th of it: a batch meets every level evenly.

    They rise with the row; rows of a batch are in random order.
    """
    device = generator.device
    within = torch.rand((n, 1), generator=generator, device=device)
    return (torch.arange(n, device=device)[:, None] + within) / n


class Shifts:
    """Pictures moved by one value in a random one of eight directions; what comes in repeats the edge.

    Args:
        sample_shape: of a picture, (H, W) or (H, W, 3).
        share: of the examples that are moved.
        device: where examples are.
    """

    def __init__(self, sample_shape: tuple[int, ...], share: float, device: torch.device) -> None:
        self.share = share
        height, width = sample_shape[:2]
        places = torch.arange(math.prod(sample_shape)).reshape(height, width, -1)
        moves = [(0, 0), *(move for move in itertools.product((-1, 0, 1), repeat=2) if move != (0, 0))]
        sources = [
            places[(torch.arange(height) - down).clamp(0, height - 1)][
                :, (torch.arange(width) - right).clamp(0, width - 1)
            ]
            for down, right in moves
        ]
        self.sources = torch.stack([source.flatten() for source in sources]).to(device)  # (9, D), the first at rest

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """The examples (n, D), some of them moved."""
        moved = torch.rand(len(clean), generator=generator, device=clean.device) < self.share
        move = torch.randint(1, len(self.sources), (len(clean),), generator=generator, device=clean.device)
        return clean.gather(1, self.sources[move * moved])
