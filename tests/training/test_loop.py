"""The steps of a training: signals, interruptions, attempts and what is reported."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace

import pytest
from small_training import SHORT, SMALL, StopAt

from kaleido_fast.progress import TrainingProgress
from kaleido_fast.training.loop import TrainingInterruptedError
from kaleido_fast.training.run import learning_rate
from kaleido_fast.training.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore::kaleido_fast.training.trainer.UnstableModelWarning")


def test_attempts_go_on_until_accepted(points):
    """A recipe that cannot succeed uses all of its attempts, each with weights of its own."""
    result = train(points, spec=SMALL, recipe=replace(SHORT, steps=5, attempts=3))
    assert result.card.recipe["attempt"] == 2
    assert [entry.attempt for entry in result.history] == [0] * 5 + [1] * 5 + [2] * 5
    assert len({entry.held_out for entry in result.history}) == 15
    assert len(result.warnings) == 1


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_signal_stops_between_steps(points, tmp_path, number, word):
    assert threading.current_thread() is threading.main_thread()

    def interrupt(progress: TrainingProgress) -> None:
        if progress.step == 11:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    text = rf"{word} after 1[12] of 60 training steps; run the same"
    with pytest.raises(TrainingInterruptedError, match=text) as caught:
        train(points, spec=SMALL, recipe=SHORT, state=tmp_path / "s", callback=interrupt)
    assert caught.value.terminated is (number == signal.SIGTERM)
    assert signal.getsignal(number) is before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_interrupt_without_state_says_so(points):
    with pytest.raises(TrainingInterruptedError, match="nothing was kept"):
        train(points, spec=SMALL, recipe=SHORT, callback=StopAt(2))


def test_progress(points):
    seen: list[TrainingProgress] = []
    result = train(points, spec=SMALL, recipe=SHORT, callback=seen.append)
    assert [progress.step for progress in seen] == list(range(1, 61))
    assert {progress.steps for progress in seen} == {60}
    assert seen[-1].last == result.history[-1]
    assert seen[-1].seconds_left == 0
    assert seen[30].learning_rate == learning_rate(SHORT, 30)
