"""Trainings of seconds."""

from __future__ import annotations

from kaleido_fast.model import ModelSpec
from kaleido_fast.presets import TrainingRecipe
from kaleido_fast.progress import TrainingProgress

SMALL = ModelSpec((5, 17, 13, 5))
SHORT = TrainingRecipe(steps=60, batch_size=7, learning_rate=2e-3, noise=0.3, warmup=10)


class StopAt:
    """A callback that acts like Ctrl-C after a step."""

    def __init__(self, step: int, attempt: int = 0) -> None:
        self.step, self.attempt = step, attempt

    def __call__(self, progress: TrainingProgress) -> None:
        if (progress.attempt, progress.step) == (self.attempt, self.step):
            raise KeyboardInterrupt
