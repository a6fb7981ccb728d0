"""Losses, and the measure by which the best weights are kept."""

from __future__ import annotations

import math

import pytest
import torch
from small_training import SMALL

from kaleido_fast.model import KaleidoMLP, ModelSpec
from kaleido_fast.presets import TrainingRecipe
from kaleido_fast.training.objective import (
    NOISE_LEVELS,
    FixedExamples,
    FlowErrors,
    errors_line,
    held_out_measure,
    mean_loss,
)

FLOW = TrainingRecipe(kind="flow")


def fixed(points, watched=None) -> FixedExamples:
    data = points.data
    return FixedExamples.of(data if watched is None else watched, data, SMALL, FLOW, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bound", ["tanh", "sigmoid"])
def test_losses_are_of_the_networks_output(bound):
    """Both from the output itself, in fp64: squared error, and cross-entropy of shares of the bound's range."""
    spec = ModelSpec((6, 9, 6), bound=bound)
    model = KaleidoMLP(spec)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    low, high = spec.low, spec.high
    clean = torch.rand(50, 6, generator=torch.Generator().manual_seed(1)) * (high - low) + low
    y = model(x).detach().double()
    share, target = (y - low) / (high - low), (clean.double() - low) / (high - low)
    entropy = -(target * share.log() + (1 - target) * (1 - share).log()).mean()
    before = model.before_bound(x).detach()
    assert float(mean_loss(before, clean, spec, "bce")) == pytest.approx(float(entropy), rel=1e-5)
    squared = float((y - clean).square().mean())
    assert float(mean_loss(before, clean, spec, "squared")) == pytest.approx(squared, rel=1e-5)


@pytest.mark.parametrize("bound", ["tanh", "sigmoid"])
@pytest.mark.parametrize("loss", ["squared", "bce"])
def test_a_loss_is_least_at_the_mean_of_what_it_may_have_been(bound, loss):
    """Of a target that is one of two values, the best answer is their mean: that is what a flow needs of f."""
    spec = ModelSpec((1, 1), bound=bound)
    targets = torch.tensor([[0.1], [0.7]])
    before = torch.zeros(2, 1, requires_grad=True)
    for _ in range(400):
        (slope,) = torch.autograd.grad(mean_loss(before.mean() + 0 * before, targets, spec, loss), before)
        before = (before - 2 * slope.sum() / 2).detach().requires_grad_()
    told = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}[bound](before.mean())
    assert float(told.detach()) == pytest.approx(0.4, abs=1e-3)


def test_large_values_before_the_bound_have_a_finite_loss():
    before = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = mean_loss(before, torch.tensor([[-1.0, 1.0]]), ModelSpec((2, 2)), "bce")
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2e4)
    assert before.grad is not None and bool(torch.isfinite(before.grad).all())


def test_the_examples_of_the_measure_are_alike_at_every_level(points):
    examples = fixed(points)
    assert examples.n_levels == len(NOISE_LEVELS)
    parts = examples.targets.chunk(examples.n_levels)
    assert all(torch.equal(parts[0], part) for part in parts)
    assert torch.equal(fixed(points).inputs, examples.inputs)


def test_the_measure_is_the_geometric_mean_from_where_samples_are_decided(points):
    examples = fixed(points)
    errors = examples.errors(lambda inputs: inputs * 0.5)
    assert errors == sorted(errors) and errors[-1] > 4 * errors[0], "more noise, more error"
    measure = held_out_measure(examples, lambda inputs: inputs * 0.5)
    assert measure == pytest.approx((errors[3] * errors[4]) ** 0.5)
    worse = held_out_measure(examples, lambda inputs: inputs * 0.5 + 1e-2)
    assert not math.isclose(worse, measure)
    assert math.isnan(held_out_measure(examples, lambda inputs: inputs * math.nan))
    assert math.isnan(held_out_measure(examples, lambda inputs: inputs * math.inf))


def test_the_measure_rewards_neither_copies_nor_blur():
    """In a law that is known: the best answer beats one that tells training examples, and one that tells the mean."""
    generator = torch.Generator().manual_seed(0)
    spec = ModelSpec((5, 5))
    data, held_out = (0.5 * torch.randn(200, 5, generator=generator) for _ in range(2))

    examples = FixedExamples.of(held_out, data, spec, FLOW, generator)
    levels = torch.tensor(NOISE_LEVELS).repeat_interleave(len(examples.inputs) // len(NOISE_LEVELS))[:, None]

    def best(inputs):
        """E[x | (1 - u) x + u n] of normal x: a line."""
        own, noise = ((1 - levels) * 0.5).square(), levels.square()
        return inputs * own / (own + noise) / (1 - levels)

    def copies(inputs):
        """The same of the training examples alone."""
        distance = (inputs[:, None] - (1 - levels)[:, None] * data[None]).square().sum(dim=2)
        return (-distance / (2 * levels.square())).softmax(dim=1) @ data

    def blur(inputs):
        return data.mean(dim=0).expand_as(inputs)

    found = {f.__name__: held_out_measure(examples, f) for f in (best, copies, blur)}
    assert found["best"] < found["copies"] and found["best"] < found["blur"], found


def test_errors_in_one_line():
    facts = FlowErrors([0.1, 0.9], [0.01234, 0.5], [0.02, 0.6]).to_dict()["denoising_error"]
    assert errors_line(facts) == "u 0.1: 0.0123 (0.02), u 0.9: 0.5 (0.6) for training (held-out) examples"
    assert errors_line({**facts, "held_out": None}).endswith("0.5 for training examples; none were held out")
