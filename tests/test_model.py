"""The network and its specification."""

from __future__ import annotations

import pytest
import torch
from conftest import random_mlp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kaleido_fast import InputError, KaleidoMLP, ModelSpec
from kaleido_fast.model import ACTIVATIONS, check_finite, model_hash


@given(
    hidden=st.lists(st.integers(1, 40), max_size=5),
    dim=st.integers(1, 9),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bound=st.sampled_from(["tanh", "sigmoid"]),
    bias=st.booleans(),
)
def test_specifications_survive_json_and_count_parameters(hidden, dim, activation, bound, bias):
    spec = ModelSpec((dim, *hidden, dim), activation, bound, bias=bias)
    assert ModelSpec.from_json(spec.to_json()) == spec
    model = KaleidoMLP(spec)
    assert spec.n_parameters == sum(p.numel() for p in model.parameters())
    assert spec.flops_per_step == 2 * sum(layer.weight.numel() for layer in model.linears)
    x = torch.rand(3, dim)
    assert model(x).shape == (3, dim)
    assert bool((model(x) >= spec.low).all())
    assert bool((model(x) <= spec.high).all())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"widths": (3,)}, "at least two"),
        ({"widths": (3, 0, 3)}, "whole numbers from 1"),
        ({"widths": (3, 4)}, "needs both equal"),
        ({"widths": (3, 4.5, 3)}, "whole numbers"),
        ({"widths": (3, 4, 3), "activation": "swish"}, "unknown activation 'swish'"),
        ({"widths": (3, 4, 3), "bound": "tan"}, "did you mean 'tanh'"),
        ({"widths": (3, 4, 3), "low": -2.0}, r"must lie inside \[-1.0, 1.0\]"),
        ({"widths": (3, 4, 3), "low": 0.5, "high": 0.5}, "must lie inside"),
        ({"widths": (6, 4, 6), "sample_shape": (2, 4)}, "does not hold 6"),
        ({"widths": (3, 4, 3), "bias": (True,)}, "1 bias flags for 2 layers"),
    ],
)
def test_inconsistent_specifications_are_named(options, text):
    with pytest.raises(InputError, match=text):
        ModelSpec(**options)


def test_sequential_is_taken_over_and_shares_its_parameters():
    sequential = nn.Sequential(
        nn.Linear(4, 7), nn.LeakyReLU(0.2), nn.Identity(), nn.Linear(7, 4, bias=False), nn.Tanh()
    )
    model = KaleidoMLP.from_sequential(sequential, sample_shape=(2, 2))
    assert model.spec == ModelSpec((4, 7, 4), "leaky_relu", sample_shape=(2, 2), bias=(True, False), negative_slope=0.2)
    assert model.linears[0].weight is sequential[0].weight
    x = torch.randn(5, 4)
    assert torch.equal(model(x), sequential(x))


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        ([nn.Linear(3, 3)], "does not end with a bound"),
        ([nn.Linear(3, 3), nn.ReLU()], "ends with ReLU"),
        ([nn.ReLU(), nn.Linear(3, 3)], "module 0 of the Sequential is ReLU, where a Linear layer"),
        ([nn.Linear(3, 3), nn.BatchNorm1d(3)], "ends with BatchNorm1d"),
        ([nn.Linear(3, 5), nn.Softplus(), nn.Linear(5, 3), nn.Tanh()], "position 1: 'Softplus'.*by engine 'reference'"),
        (
            [nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 3), nn.Tanh()],
            r"mixed \(relu, silu\).*by engine 'reference'",
        ),
        ([nn.Linear(3, 5), nn.ReLU(), nn.Linear(4, 3), nn.Tanh()], "linear layer 1 takes 4 values but gets 5"),
        ([nn.Linear(3, 5), nn.Tanh()], "needs both equal"),
        ([], "does not end with a bound"),
    ],
)
def test_a_sequential_that_does_not_fit_is_refused_by_name(modules, text):
    with pytest.raises(InputError, match=text):
        KaleidoMLP.from_sequential(nn.Sequential(*modules))


def test_hash_names_weights_and_specification():
    model = random_mlp(3, 5, 3)
    assert model_hash(model) == model_hash(random_mlp(3, 5, 3))
    assert model_hash(model) != model_hash(random_mlp(3, 5, 3, seed=1))
    assert model_hash(model) != model_hash(random_mlp(3, 5, 3, activation="silu"))


def test_weights_that_are_not_finite_are_named(small_model):
    with torch.no_grad():
        small_model.layers[1].weight[2, 3] = torch.inf
    with pytest.raises(InputError, match=r"layers\.1\.weight holds 1 NaN or infinite"):
        check_finite(small_model)
