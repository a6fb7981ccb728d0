"""The weights that a training starts from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_fast.model import KaleidoMLP, ModelSpec
from kaleido_fast.training.start import directions, initialise

PAIRED = ("relu", "leaky_relu", "gelu", "gelu_tanh", "silu")  # a(z) - a(-z) is a multiple of z


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def examples(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    """(n, D) with directions of very different strength."""
    data = torch.randn((n, dim), generator=seeded(seed)) * torch.logspace(0, -2, dim)
    turn = torch.linalg.qr(torch.randn((dim, dim), generator=seeded(seed + 1))).Q
    return (data @ turn).tanh()


def started(widths: tuple[int, ...], activation: str, data: torch.Tensor, seed: int = 1) -> KaleidoMLP:
    model = KaleidoMLP(ModelSpec(widths, activation))
    initialise(model, "principal", seeded(seed), data)
    return model.double()


@pytest.mark.parametrize("init", ["kaiming", "default"])
def test_random_weights(init):
    model = KaleidoMLP(ModelSpec((300, 400, 500, 300)))
    initialise(model, init, seeded(), torch.zeros(1, 300))
    for i, layer in enumerate(model.linears):
        fan_in = layer.in_features
        gain = {"kaiming": 2.0 if i < 2 else 1.0, "default": 1 / 3}[init]
        assert float(layer.weight.detach().var()) == pytest.approx(gain / fan_in, rel=0.02), f"layer {i}"
        assert float(layer.bias.detach().abs().max()) <= (0 if init == "kaiming" else fan_in**-0.5)


@pytest.mark.parametrize("activation", PAIRED)
@pytest.mark.parametrize(("n", "dim"), [(400, 30), (25, 30)])
def test_a_principal_start_is_the_projection(activation, n, dim):
    """Whatever the depth and the widths: the narrowest layer decides, here its first 6 directions."""
    data = examples(n, dim)
    model = started((dim, 12, 13, 40, 12, dim), activation, data)
    centred = data.double().numpy() - data.double().numpy().mean(0)
    best = np.linalg.svd(centred, full_matrices=False)[2][:6]
    x = 3 * torch.randn((50, dim), generator=seeded(2), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model.before_bound(x), x @ torch.from_numpy(best.T @ best), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slope", [0.3, -0.5, 2.0])
def test_a_principal_start_knows_the_slope_of_leaky_relu(slope):
    model = KaleidoMLP(ModelSpec((7, 14, 14, 14, 7), "leaky_relu", negative_slope=slope))
    initialise(model, "principal", seeded(), examples(40, 7))
    x = torch.randn((50, 7), generator=seeded(2))
    with torch.no_grad():
        torch.testing.assert_close(model.before_bound(x), x, rtol=1e-3, atol=1e-3)


def test_an_even_activation_keeps_random_weights():
    spec = ModelSpec((7, 14, 14, 7), "leaky_relu", negative_slope=-1.0)
    one, other = KaleidoMLP(spec), KaleidoMLP(spec)
    initialise(one, "principal", seeded(), examples(40, 7))
    initialise(other, "kaiming", seeded(), examples(40, 7))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_wide_layers_pass_all_of_an_input():
    model = started((7, 14, 51, 15, 7), "silu", examples(40, 7))
    x = torch.randn((50, 7), generator=seeded(2), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model.before_bound(x), x, rtol=1e-5, atol=1e-5)


def test_tanh_is_near_linear_for_small_values():
    model = started((7, 14, 14, 7), "tanh", examples(40, 7))
    x = 0.02 * torch.randn((50, 7), generator=seeded(2), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model.before_bound(x), x, rtol=0, atol=5e-4)


@settings(max_examples=40, deadline=None)
@given(
    hidden=st.lists(st.integers(1, 20), max_size=4),
    dim=st.integers(1, 12),
    n=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
def test_any_widths_and_any_number_of_examples(hidden, dim, n, seed):
    """Linear, and finite in its bits; where a layer has no pair, weights are those of the usual start."""
    data = examples(n, dim)
    model = started((dim, *hidden, dim), "silu", data, seed)
    usual = KaleidoMLP(ModelSpec((dim, *hidden, dim), "silu"))
    initialise(usual, "kaiming", seeded(seed), data)
    x, y = torch.randn((2, 9, dim), generator=seeded(2), dtype=torch.float64)
    with torch.no_grad():
        if hidden and min(hidden) > 1:
            both = model.before_bound(2 * x - y)
            torch.testing.assert_close(both, 2 * model.before_bound(x) - model.before_bound(y), rtol=1e-4, atol=1e-4)
        else:
            assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), usual.parameters(), strict=True))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_start_is_decided_by_its_seed():
    data = examples(60, 20)
    one, same, other = (started((20, 9, 9, 20), "silu", data, seed) for seed in (1, 1, 2))
    weights = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_directions_are_orthonormal_where_examples_have_fewer():
    """Three examples have two directions; the others are there all the same."""
    found = directions(examples(3, 10), 5, seeded()).double()
    torch.testing.assert_close(found @ found.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)
    centred = examples(3, 10).double()
    centred = centred - centred.mean(0)
    torch.testing.assert_close(centred @ found[:2].T @ found[:2], centred, rtol=0, atol=1e-5)
