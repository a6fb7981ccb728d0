"""Recipes and networks: defaults, presets, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_training import SHORT, SMALL

from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.presets import PRESETS, PUBLISHED_RECIPE
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.training.recipe import default_recipe, default_spec, find_recipe
from kaleido_fast.training.run import initialise
from kaleido_fast.training.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore::kaleido_fast.training.trainer.UnstableModelWarning")


def test_every_preset_fits_its_data_and_network():
    for name, preset in PRESETS.items():
        assert preset.network.widths[0] == preset.network.widths[-1] == int(np.prod(preset.network.sample_shape)), name
        assert find_recipe(name) == preset.recipe


def test_published_recipe_is_plain(points):
    """No noise, torch's own initialisation, a constant rate: the first step is that of a plain torch trainer."""
    assert find_recipe("published") == PUBLISHED_RECIPE
    recipe = replace(PUBLISHED_RECIPE, steps=3, batch_size=23)
    result = train(points, spec=SMALL, recipe=recipe, seed=2)
    model = KaleidoMLP(SMALL)
    initialise(model, "default", seed=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    for _ in range(3):  # full batches, so that their order does not matter
        optimizer.zero_grad()
        (model(points.data) - points.data).square().mean().backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    assert result.card.sampling == {}


def test_defaults_from_data(points):
    assert default_spec(points).widths == (5, 256, 256, 256, 256, 256, 5)
    assert default_spec(points).bound == "tanh"
    large = Dataset("large", torch.rand(3, 784), sample_shape=(28, 28))
    assert default_spec(large).widths[1] == 512
    assert default_spec(large).bound == "sigmoid"
    assert default_spec(large).sample_shape == (28, 28)
    assert default_recipe(large).pair_mix > 0
    assert default_recipe(points).pair_mix == 0


RECIPE_FIELDS = {
    "steps": st.integers(max_value=0) | st.floats() | st.booleans(),
    "batch_size": st.integers(max_value=0) | st.none(),
    "warmup": st.integers(max_value=-1),
    "held_out": st.integers(max_value=-1),
    "attempts": st.integers(max_value=0),
    "learning_rate": st.floats(max_value=0) | st.floats(min_value=1, exclude_min=True) | st.text(),
    "noise": st.floats(max_value=0, exclude_max=True) | st.floats(min_value=10, exclude_min=True),
    "pair_mix": st.floats(min_value=1, exclude_min=True),
    "init": st.text(),
    "schedule": st.text(),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(sorted(RECIPE_FIELDS)))
def test_refused_recipes(points, data, name):
    value = data.draw(RECIPE_FIELDS[name])
    with pytest.raises(InputError) as caught:
        train(points, spec=SMALL, recipe=replace(SHORT, **{name: value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
