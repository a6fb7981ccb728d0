"""How new samples are: copies, fresh data, and what cannot be told."""

from __future__ import annotations

import pytest
import torch

from kaleido_fast.evaluating import novelty
from kaleido_fast.evaluating.novelty import measure_novelty, novelty_line
from kaleido_fast.evaluating.quality import authentic_share, nearest_example_mse
from kaleido_fast.model import KaleidoMLP, ModelSpec
from kaleido_fast.sampling import fast_sample

FLOW = {"sampler": "flow", "steps": 3, "noise_from": 0.9, "noise_to": 0.1}
CPU = torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return KaleidoMLP(ModelSpec((4, 8, 4), activation="silu")).eval()


def test_samples_are_measured_as_the_figures_are_defined(model):
    examples, held_out = torch.rand(50, 4) * 2 - 1, torch.rand(30, 4) * 2 - 1
    found = measure_novelty(model, FLOW, examples, held_out, CPU)
    samples = fast_sample(model, n_chains=1000, **FLOW).final
    assert found is not None
    assert found.nearest == float(nearest_example_mse(samples, examples).median())
    assert found.authentic == authentic_share(samples, examples)
    assert found.nearest_held_out == float(nearest_example_mse(held_out, examples).median())
    assert found.authentic_held_out == authentic_share(held_out, examples)


def test_samples_that_are_the_examples_are_copies(model):
    copies = fast_sample(model, n_chains=1000, **FLOW).final
    found = measure_novelty(model, FLOW, copies, None, CPU)
    assert found is not None and found.nearest == 0 and found.authentic == 0
    assert found.nearest_held_out is None
    line = novelty_line(found.to_dict()["novelty"])
    assert line == "of 1,000 samples 0% are no copies of training examples; nearest one at 0, mean squared"


def test_one_example_tells_nothing(model):
    assert measure_novelty(model, FLOW, torch.zeros(1, 4), None, CPU) is None


def test_samples_that_are_not_finite_have_no_figures(model, monkeypatch):
    def sampled(*args, **options):
        result = fast_sample(*args, **options)
        result.draws[3, 0, 1] = float("nan")
        return result

    monkeypatch.setattr(novelty, "fast_sample", sampled)
    assert measure_novelty(model, FLOW, torch.rand(5, 4), None, CPU) is None
