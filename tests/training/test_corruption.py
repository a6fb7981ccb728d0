"""What a network gets in the place of an example."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_training import SHORT, SMALL

from kaleido_fast.model import ModelSpec
from kaleido_fast.presets import TrainingRecipe
from kaleido_fast.training.corruption import Shifts, corrupt, make_inputs, mix_noise, spread_shares

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_corruption(points):
    generator = torch.Generator().manual_seed(0)
    clean = points.data.repeat(400, 1)
    plain = corrupt(clean, points.data, SMALL, replace(SHORT, noise=0.0), generator)
    assert torch.equal(plain, clean)
    noisy = corrupt(clean * 0, points.data, SMALL, replace(SHORT, noise=0.1), generator)
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.02)
    narrow = replace(SMALL, bound="sigmoid", low=0.0, high=1.0)
    inside = corrupt(clean.abs(), points.data, narrow, replace(SHORT, noise=2.0), generator)
    assert (float(inside.min()), float(inside.max())) == (0.0, 1.0)
    mixed = corrupt(clean, points.data, SMALL, replace(SHORT, noise=0.0, pair_mix=0.4), generator)
    reach = (mixed - clean).norm(dim=1) / torch.cdist(clean, points.data).amax(dim=1)
    assert 0.2 < float(reach.max()) <= 0.4 + 1e-6


@pytest.mark.parametrize(("bound", "low", "high"), [("tanh", -1, 1), ("sigmoid", 0, 1), ("tanh", -0.5, 0.75)])
def test_a_flow_goes_straight_from_the_example_to_noise(bound, low, high):
    """At u: mean (1 - u) x + u m and deviation u h, of the middle m and the half h of the range, and unclamped."""
    spec = ModelSpec((40, 7, 40), bound=bound, low=low, high=high)
    middle, half = (low + high) / 2, (high - low) / 2
    clean = (torch.rand(1, 40, generator=seeded(1)) * (high - low) + low).repeat(4000, 1)
    for share in (0.0, 0.25, 0.9, 1.0):
        inputs = mix_noise(clean, torch.full((4000, 1), share), spec, seeded(2))
        expected = (1 - share) * clean[0] + share * middle
        error = (inputs.mean(dim=0) - expected).abs().max()
        assert float(error) <= 5 * share * half / 4000**0.5 + 1e-6, f"u = {share}: mean {float(error):g} away"
        assert float(inputs.std(dim=0).mean()) == pytest.approx(share * half, rel=0.02, abs=1e-6)
    assert float(inputs.max()) > high + 2 * half and float(inputs.min()) < low - 2 * half


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
def test_a_batch_meets_every_level_of_noise_evenly(n, seed):
    shares = spread_shares(n, seeded(seed))
    assert shares.shape == (n, 1)
    assert bool(((shares * n).floor()[:, 0] - torch.arange(n)).abs().max() <= 1), "one from each n-th, to rounding"
    assert float(shares.min()) >= 0 and float(shares.max()) <= 1


def test_a_flow_is_what_the_recipe_makes(points):
    recipe = TrainingRecipe(kind="flow", batch_size=20_000)
    clean = torch.zeros(20_000, 5)
    inputs = make_inputs(clean, points.data, SMALL, recipe, seeded())
    rms = inputs.square().mean(dim=1).sqrt()
    assert float(rms[:2000].mean()) < 0.12 < 0.85 < float(rms[-2000:].mean())
    assert float(inputs.square().mean()) == pytest.approx(1 / 3, rel=0.02), (
        "u uniform in [0, 1]: the mean of its square"
    )


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    colours=st.sampled_from([(), (3,)]),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_moved_pictures_are_their_neighbours_with_the_edge_repeated(height, width, colours, share, seed):
    shape = (height, width, *colours)
    pictures = torch.rand((64, *shape), generator=seeded(seed))
    moved = Shifts(shape, share, CPU)(pictures.flatten(1), seeded(seed + 1)).reshape(pictures.shape)
    padded = torch.cat([pictures[:, :1], pictures, pictures[:, -1:]], dim=1)
    padded = torch.cat([padded[:, :, :1], padded, padded[:, :, -1:]], dim=2)
    candidates = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    found = [bool(torch.stack([(c[i] == moved[i]).all() for c in candidates]).any()) for i in range(64)]
    assert all(found), f"picture {found.index(False)} is none of the nine"


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_as_many_pictures_move_as_were_asked_for(share):
    pictures = torch.rand((8000, 49), generator=seeded())
    moved = Shifts((7, 7), share, CPU)(pictures, seeded(1))
    rate = float((moved != pictures).any(dim=1).double().mean())
    assert rate == pytest.approx(share, abs=0.03 * (0 < share < 1))
