"""The moving average of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kaleido_fast.training.average import EVERY, WeightAverage


def averaged(decay: float, steps: int) -> tuple[float, list[float]]:
    """The average after steps whose weight is the step's number, from weights that must not count."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1e6)
    average = WeightAverage(layer, decay)
    for step in range(1, steps + 1):
        nn.init.constant_(layer.weight, float(step))
        average.add(layer, step)
    return float(average.tensors["weight"]), list(range(1, steps + 1))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 7, EVERY])
def test_first_steps_count_one_by_one_and_the_start_not_at_all(decay, steps):
    found, values = averaged(decay, steps)
    weights = [decay ** (steps - value) for value in values]
    assert found == pytest.approx(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights), rel=1e-5)


@pytest.mark.parametrize("steps", [EVERY * 5, EVERY * 5 + 3])
def test_later_ones_count_for_those_between(steps):
    decay, last = 0.9, steps - steps % EVERY
    found, _ = averaged(decay, steps)
    seen = [(value, 1) for value in range(1, EVERY + 1)] + [(v, EVERY) for v in range(2 * EVERY, last + 1, EVERY)]
    parts = [(value, decay ** (last - value) * (1 - decay**since)) for value, since in seen]
    assert found == pytest.approx(sum(v * w for v, w in parts) / sum(w for _, w in parts), rel=1e-5)


def test_the_model_is_not_changed():
    layer = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    average = WeightAverage(layer, 0.9)
    average.add(layer, 1)
    with torch.no_grad():
        layer.weight.add_(1)
    assert all(torch.equal(average.tensors[name], tensor) for name, tensor in before.items())
