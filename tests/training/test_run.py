"""One training run: batches, corruption, learning rates, initial weights and the weights that are kept."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from small_training import SHORT, SMALL

from kaleido_fast.training.run import Batches, TrainingRun, learning_rate, stream_seed
from kaleido_fast.training.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore::kaleido_fast.training.trainer.UnstableModelWarning")

# --- best weights


def test_kept_weights_are_those_of_the_least_held_out_error(points):
    """A learning rate far too high at the end of no schedule makes the last weights worse than earlier ones."""
    recipe = replace(SHORT, steps=200, learning_rate=0.05, schedule="constant", held_out=6)
    result = train(points, spec=SMALL, recipe=recipe, seed=1)
    errors = [entry.held_out for entry in result.history]
    best = int(np.argmin(errors))
    assert best < len(errors) - 1, "the last weights were the best: this run cannot tell"
    assert result.card.final_loss == errors[best]
    assert result.card.recipe["best_step"] == result.history[best].step
    run = TrainingRun(points, SMALL, recipe, 1, torch.device("cpu"))
    with torch.no_grad():
        measured = float((result.model(run.fixed.inputs) - run.fixed.targets).square().mean())
    assert measured == pytest.approx(errors[best], rel=1e-6)


def test_held_out_examples_are_not_trained_on(points):
    train_part, held_out = points.split(6)
    assert held_out is not None
    run = TrainingRun(points, SMALL, replace(SHORT, held_out=6), 0, torch.device("cpu"))
    assert torch.equal(run.data, train_part.data)
    measured = {tuple(row) for row in run.fixed.targets.tolist()}
    assert measured == {tuple(row) for row in held_out.data.tolist()}


def test_evaluation_is_the_same_every_time_and_many_draws(points):
    run = TrainingRun(points, SMALL, SHORT, 0, torch.device("cpu"))
    again = TrainingRun(points, SMALL, SHORT, 0, torch.device("cpu"))
    assert torch.equal(run.fixed.inputs, again.fixed.inputs)
    assert len(run.fixed.inputs) >= 1000
    assert len(torch.unique(run.fixed.inputs, dim=0)) == len(run.fixed.inputs)


# --- parts


@pytest.mark.parametrize(("n", "size"), [(4, 16), (23, 7), (5, 5), (1, 3), (10, 128)])
def test_batches_are_shuffles_end_to_end(n, size):
    batches = Batches(n, size, seed=4)
    steps = 3 * n
    row = torch.cat([batches.rows(step) for step in range(steps)])
    assert len(row) == steps * size
    for epoch in row[: len(row) // n * n].view(-1, n):
        assert sorted(epoch.tolist()) == list(range(n))
    late = Batches(n, size, seed=4).rows(steps - 1)
    assert torch.equal(late, row[-size:])


def test_streams_are_apart():
    seeds = {stream_seed(seed, word, step) for seed in range(5) for word in range(5) for step in range(2000)}
    assert len(seeds) == 50_000
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_learning_rates():
    recipe = replace(SHORT, steps=1000, warmup=100, learning_rate=2.0)
    rates = [learning_rate(recipe, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02, rel=1e-3)
    assert np.argmax(rates) in range(95, 105)
    assert all(late < early for early, late in pairwise(rates[110:]))
    assert rates[-1] == pytest.approx(0.02, rel=0.01)
    assert {learning_rate(replace(recipe, schedule="constant", warmup=0), step) for step in (0, 500, 999)} == {2.0}
