"""How a network acts at its examples, on maps whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kaleido_fast.evaluating.diagnostics import diagnose, growth_rates, spectral_radii, stable_examples
from kaleido_fast.model import KaleidoMLP, ModelSpec


def linear_map(matrix: torch.Tensor) -> KaleidoMLP:
    """tanh(A x): its Jacobian at 0 is A."""
    n = len(matrix)
    model = KaleidoMLP(ModelSpec((n, n), bias=(False,)))
    with torch.no_grad():
        model.linears[0].weight.copy_(matrix)
    return model


@pytest.mark.parametrize("n", [1, 2, 33, 96])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_spectral_radius_of_known_matrices(n, scale):
    matrix = torch.randn((n, n), generator=torch.Generator().manual_seed(n)) * scale / n**0.5
    exact = float(np.abs(np.linalg.eigvals(matrix.double().numpy())).max())
    model, origin = linear_map(matrix), torch.zeros(3, n)
    torch.testing.assert_close(spectral_radii(model, origin).float(), torch.full((3,), exact), rtol=1e-4, atol=1e-6)
    estimate = growth_rates(model, origin)
    assert float((estimate / exact - 1).abs().max()) < 0.15, f"exact {exact}, estimated {estimate.tolist()}"


def test_growth_rate_of_a_rotation():
    """A complex pair: lengths under one product swing between 0.09 and 8.1, the radius is 0.9."""
    matrix = torch.tensor([[0.0, 8.1], [-0.1, 0.0]])
    assert float(growth_rates(linear_map(matrix), torch.zeros(1, 2))) == pytest.approx(0.9, rel=0.02)


def test_zero_jacobian():
    assert float(growth_rates(linear_map(torch.zeros(3, 3)), torch.zeros(2, 3)).max()) < 1e-30
    assert float(spectral_radii(linear_map(torch.zeros(3, 3)), torch.zeros(2, 3)).max()) == 0


def test_large_models_are_measured_without_their_jacobian():
    digits = linear_map(torch.eye(200) * 0.7)
    figures = diagnose(digits, torch.zeros(5, 200))
    assert figures.spectral_radius_median == pytest.approx(0.7, rel=1e-4)


def test_stable_examples():
    halving = linear_map(torch.eye(4) * 0.5)  # everything goes to 0
    points = torch.tensor([[0.0] * 4, [0.1] * 4, [0.5] * 4])
    assert stable_examples(halving, points).tolist() == [True, True, False]
    doubling = linear_map(torch.eye(4) * 2.0)  # 0 repels, +-0.9575 attracts
    points = torch.tensor([[0.0] * 4, [1e-3] * 4, [0.95] * 4, [-0.95] * 4])
    assert stable_examples(doubling, points).tolist() == [False, False, True, True]
    flipping = linear_map(torch.eye(4) * -2.0)  # a cycle of period 2
    assert stable_examples(flipping, torch.full((1, 4), 0.9575)).tolist() == [False]
