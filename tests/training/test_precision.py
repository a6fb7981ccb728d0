"""Which type the products of a training have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kaleido_fast.training.precision import autocast, compare, faster_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("fp32", "bf16", "choice"),
    [(1.0, 0.5, "bf16"), (1.0, 0.79, "bf16"), (1.0, 0.85, "fp32"), (1.0, 1.5, "fp32"), (1.0, 50.0, "fp32")],
)
def test_bf16_has_to_be_faster_by_a_quarter(fp32, bf16, choice):
    made: list[str] = []

    def seconds(precision: str) -> float:
        made.append(precision)
        late = 1.3 if len(made) % 3 == 0 else 1.0  # by what else the machine does: the least time counts
        return late * {"fp32": fp32, "bf16": bf16}[precision]

    assert compare(seconds) == choice
    assert made.count("bf16") <= (2 if bf16 > 10 * fp32 else 6), "a slow type is not tried for long"


def test_measuring_changes_nothing():
    network = nn.Sequential(nn.Linear(20, 30), nn.SiLU(), nn.Linear(30, 20))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    assert faster_precision(network, 16, 20, CPU) in ("fp32", "bf16")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_products_have_the_type():
    layer, x = nn.Linear(8, 8), torch.ones(2, 8)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(precision, CPU):
            assert layer(x).dtype == dtype
        assert layer(x).dtype == torch.float32
