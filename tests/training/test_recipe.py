"""Recipes and networks: defaults, presets, and what is refused."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_training import SHORT, SMALL

from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.presets import (
    FLOW_RECIPE,
    NETWORKS,
    PRESETS,
    PUBLISHED_RECIPE,
    TrainingRecipe,
    find_preset,
    recipe_facts,
)
from kaleido_fast.reading.datasets import Dataset
from kaleido_fast.training.recipe import default_recipe, default_spec, find_recipe, resolve_recipe
from kaleido_fast.training.run import START, stream_seed
from kaleido_fast.training.start import initialise
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
    initialise(model, "default", torch.Generator().manual_seed(stream_seed(2, START)), points.data)
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
    assert default_recipe(large).kind == "flow", "pictures"
    assert default_spec(large, "flow").activation == "silu"
    assert find_recipe("attractors", large).pair_mix > 0
    assert default_recipe(points) == find_recipe("attractors", points) == TrainingRecipe()


@pytest.mark.parametrize("n", [1, 15, 16, 800, 80_000])
def test_a_flow_holds_out_a_part_of_any_data(n):
    held_out = find_recipe("flow", Dataset("n", torch.rand(n, 4), sample_shape=(2, 2))).held_out
    assert held_out == min(n // 16, 1000)


@pytest.mark.parametrize(
    ("name", "n", "held_out"),
    [("mnist", 60_000, 1000), ("mnist", 8000, 500), ("mnist", 800, 50), ("digits", 1797, 500), ("digits", 400, 133)],
)
def test_a_preset_holds_out_less_of_few_examples(name, n, held_out):
    """Whatever they are called: a limit leaves the name as it is."""
    preset = PRESETS[name]
    data = Dataset(name, torch.zeros(n, preset.network.widths[0]), sample_shape=preset.network.sample_shape)
    assert resolve_recipe(None, data, preset) == replace(preset.recipe, held_out=held_out)
    for known in ("mnist", "digits"):
        assert resolve_recipe("attractors", data, find_preset(known, "attractors")).held_out < n


def test_a_recipe_by_name_moves_pictures_alone():
    flat = Dataset("flat", torch.zeros(90, 784))
    assert resolve_recipe("mnist", flat, None) == replace(PRESETS["mnist"].recipe, shift=0.0)


@pytest.mark.parametrize(
    ("shape", "moved"), [((28, 28), True), ((16, 20, 3), True), ((8, 8), False), ((64, 15), False), ((784,), False)]
)
def test_pictures_are_moved_where_they_are_large(shape, moved):
    recipe = find_recipe("flow", Dataset("n", torch.zeros(9, math.prod(shape)), sample_shape=shape))
    assert (recipe.shift > 0) == moved


def test_presets_are_flows_for_pictures_and_have_attractors_beside_them():
    for name in ("digits", "mnist", "fashion-mnist", "cifar"):
        assert find_preset(name).recipe.kind == "flow" and find_preset(name).sampling["sampler"] == "flow"
    for name in ("points1d", "points2d", "digits", "deep128", "mnist", "cifar"):
        preset = find_preset(name, "attractors")
        assert preset.recipe.kind == "attractors" and preset.network == NETWORKS[name]
        assert "sampler" not in preset.sampling
    mnist = PRESETS["mnist"]
    assert 2 * mnist.network.n_parameters < 3.5e6 and mnist.recipe.weights == "fp16"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"noise": 0.3}, "noise = 0.3 with kind 'flow'"),
        ({"pair_mix": 0.1}, "pair_mix = 0.1 with kind 'flow'"),
        ({"attempts": 2}, "attempts = 2 with kind 'flow'"),
        ({"shift": 0.5}, "shift = 0.5 with examples of shape (5,): only pictures"),
        ({"held_out": 23}, "held_out = 23 of 23 examples: give 0 to 22"),
        ({"average": 1}, "average = 1: give a decay below 1"),
    ],
)
def test_what_a_flow_refuses_by_name(points, change, text):
    with pytest.raises(InputError) as caught:
        train(points, spec=SMALL, recipe=TrainingRecipe(**{"kind": "flow", **change}))
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_data_of_one_value_are_refused_in_one_line():
    for data in (np.zeros((9, 4, 4), np.uint8), np.full((5, 3), 0.25, np.float32)):
        with pytest.raises(
            InputError, match=r"holds one value only \((-1|0.25)\), [\d,]+ times: there is nothing"
        ) as caught:
            train(data)
        assert "\n" not in str(caught.value)


def test_what_an_earlier_version_asked_for_compares_equal():
    """Its recipes had ten fields; the others are left out while they are at their default."""
    facts = recipe_facts(asdict(TrainingRecipe(noise=0.3)))
    assert list(facts) == [*list(asdict(SHORT))[:10]] and facts["noise"] == 0.3
    assert recipe_facts(facts) == facts
    assert recipe_facts(asdict(FLOW_RECIPE))["kind"] == "flow"
    assert recipe_facts(asdict(replace(FLOW_RECIPE, loss="bce"))) != recipe_facts(asdict(FLOW_RECIPE))


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
    "kind": st.text(),
    "loss": st.text(),
    "precision": st.text(),
    "weights": st.text() | st.none(),
    "average": st.floats(max_value=0, exclude_max=True) | st.floats(min_value=1),
    "weight_decay": st.floats(max_value=0, exclude_max=True) | st.booleans(),
    "seconds": st.floats(max_value=0, exclude_max=True) | st.just(float("inf")),
    "shift": st.floats(min_value=1, exclude_min=True) | st.none(),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(sorted(RECIPE_FIELDS)))
def test_refused_recipes(points, data, name):
    value = data.draw(RECIPE_FIELDS[name])
    with pytest.raises(InputError) as caught:
        train(points, spec=SMALL, recipe=replace(SHORT, **{name: value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
