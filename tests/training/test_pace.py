"""Trainings of a given time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_training import SHORT, SMALL, StopAt

from kaleido_fast.model import model_hash
from kaleido_fast.training import pace
from kaleido_fast.training import run as training_run
from kaleido_fast.training.loop import TrainingInterruptedError
from kaleido_fast.training.pace import steps_in_time
from kaleido_fast.training.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore::kaleido_fast.training.trainer.UnstableModelWarning")


@pytest.mark.parametrize("step", [0.001, 0.02, 3.0])
@pytest.mark.parametrize("evaluation", [0.0, 0.4])
def test_as_many_steps_as_fit(monkeypatch, step, evaluation):
    """On a machine that always takes the same time; its first step takes longer."""
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    made = []

    def work(seconds: float) -> None:
        now[0] += seconds

    def advance() -> None:
        work(step if made else step + 0.5)
        made.append(step)

    n = steps_in_time(300.0, advance, lambda: work(evaluation), 100)
    total = now[0] + n * step + 100 * evaluation
    assert 300 - 2 * step <= total <= 300 + 1e-6, f"{n} steps, {total:g} s"


def test_a_time_too_short_is_one_step():
    assert steps_in_time(1e-9, lambda: None, lambda: None, 100) == 1


def test_a_timed_training_is_that_of_as_many_steps(points, tmp_path, monkeypatch):
    """The trial leaves no trace, and the number is kept by a run that goes on, however fast the machine has become."""
    recipe = replace(SHORT, seconds=1.0, pair_mix=0.2, held_out=5, average=0.9)
    with pytest.raises(TrainingInterruptedError) as caught:
        train(points, spec=SMALL, recipe=recipe, state=tmp_path / "s", callback=StopAt(7))
    monkeypatch.setattr(training_run, "steps_in_time", lambda *_: 1 / 0)
    timed = train(points, spec=SMALL, recipe=recipe, state=tmp_path / "s")
    steps = timed.card.recipe["steps_made"]
    assert caught.value.steps == steps == timed.history[-1].step
    told = train(points, spec=SMALL, recipe=replace(recipe, seconds=0.0, steps=steps))
    assert told.history == timed.history and model_hash(told.model) == model_hash(timed.model)
    assert timed.card.recipe["steps"] == SHORT.steps, "what was asked for is what a finished run is told by"
