"""The steps of a training until its end, a signal or a lost worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaleido_fast.evaluating.diagnostics import Diagnostics, diagnose
from kaleido_fast.evaluating.novelty import measure_novelty
from kaleido_fast.evaluating.thinning import measure_thin
from kaleido_fast.progress import TrainingProgress
from kaleido_fast.system.signals import StopFlag, stop_flag
from kaleido_fast.training.run import TrainingRun, learning_rate

ACCEPTED_ERROR = 0.02


class TrainingInterruptedError(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during training; with a state path, the same call goes on from ``step``.

    ``printed_elsewhere``: another worker prints it.
    """

    def __init__(
        self, step: int, steps: int, state: Path | None, *, terminated: bool = False, printed_elsewhere: bool = False
    ) -> None:
        kept = f"run the same command again to go on from {state}" if state else "nothing was kept: no state path given"
        super().__init__(
            f"{'terminated' if terminated else 'interrupted'} after {step:,} of {steps:,} training steps; {kept}"
        )
        self.step = step
        self.steps = steps
        self.state = state
        self.terminated = terminated
        self.printed_elsewhere = printed_elsewhere


@dataclass(frozen=True)
class Loop:
    """Steps until the run's last one, with callback, state file and Ctrl-C."""

    run: TrainingRun
    state: Path | None
    save_every: float
    callback: Callable[[TrainingProgress], None] | None

    def finish(self) -> None:
        """Make all steps that are left of the current attempt."""
        run = self.run
        run.prepare()
        steps = run.recipe.steps
        began, first, saved = time.monotonic(), run.step, time.monotonic()
        with stop_flag(several=run.workers.size > 1) as requested:
            while run.step < steps:
                stop = self._advance(requested)
                try:
                    self._notify((time.monotonic() - began) / (run.step - first) * (steps - run.step))
                except KeyboardInterrupt:
                    requested.set()
                if stop or (run.workers.size == 1 and requested.is_set()):
                    self._save()
                    raise self._interrupted(requested)
                if time.monotonic() - saved >= self.save_every or run.step == steps:
                    self._save()
                    saved = time.monotonic()

    def measure_thin(self, sampling: Mapping[str, Any]) -> dict[str, Any] | None:
        """How far apart draws of a chain have to be: measured by the first worker, for all."""
        run = self.run

        def measure() -> dict[str, Any] | None:
            found = measure_thin(run.model, sampling, run.device)
            return None if found is None else found.to_dict()

        return self._measured("thin", measure)

    def measure_novelty(self, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """How new samples are, as a card has it: measured by the first worker, for all; empty where it cannot be."""
        run = self.run

        def measure() -> dict[str, Any]:
            held_out = None if run.watched is run.data else run.watched
            found = measure_novelty(run.model, sampling, run.data, held_out, run.device)
            return {} if found is None else found.to_dict()

        return self._measured("novelty", measure)

    def calibrate(self, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """Calibrate the network, as a card has it: measured by the first worker, for all; empty where it is not."""
        run = self.run

        def measure() -> dict[str, Any]:
            found = run.calibrate(sampling)
            return {} if found is None else found.to_dict()

        facts: dict[str, Any] = self._measured("calibration", measure)
        if facts and not run.workers.is_first:
            run.stretch(facts["calibration"]["gain"])
        return facts

    def _measured(self, what: str, measure: Callable[[], Any]) -> Any:
        run = self.run
        try:
            return run.workers.broadcast(what, measure)
        except KeyboardInterrupt as stop:
            raise TrainingInterruptedError(run.step, run.recipe.steps, self.state) from stop

    def _advance(self, requested: StopFlag) -> bool:
        """One step; whether all workers stop after it."""
        run = self.run
        try:
            return run.advance(requested.is_set())
        except RuntimeError as problem:
            again = "start all again" if self.state is None else f"start all again to go on from {self.state}"
            lost = run.workers.lost(problem, f"another worker of this training has ended; {again}")
            if lost is None:
                raise
            self._save()  # the step was not made
            raise lost from problem

    def _interrupted(self, requested: StopFlag) -> TrainingInterruptedError:
        run = self.run
        return TrainingInterruptedError(
            run.step,
            run.recipe.steps,
            self.state,
            terminated=requested.terminated,
            printed_elsewhere=not run.workers.is_first,
        )

    def _save(self) -> None:
        if self.state is not None and self.run.workers.is_first:
            self.run.save(self.state)

    def _notify(self, seconds_left: float) -> None:
        if self.callback is None:
            return
        run = self.run
        rate = learning_rate(run.recipe, run.step - 1)
        last = run.history[-1] if run.history else None
        self.callback(TrainingProgress(run.attempt, run.step, run.recipe.steps, rate, seconds_left, last))


def train_until_accepted(run: TrainingRun, loop: Loop) -> Diagnostics:
    """Train attractors; where the recipe allows several attempts, until every example is a stable fixed point."""
    while True:
        loop.finish()
        run.take_best()
        run.finish()
        found = run.workers.broadcast(f"attempt {run.attempt}", lambda: diagnose(run.model, run.data).to_dict())
        diagnostics = Diagnostics(**found)
        accepted = diagnostics.max_error < ACCEPTED_ERROR and diagnostics.spectral_radius_max < 1
        if accepted or run.attempt + 1 >= run.recipe.attempts:
            return diagnostics
        run.begin(run.attempt + 1)


def train_flow(run: TrainingRun, loop: Loop, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Train a flow; what its card says of it, as `FlowErrors` and `Calibration` have it.

    Args:
        run, loop: at any step.
        sampling: recommended options of `kaleido_fast.fast_sample`.
    """
    loop.finish()
    run.take_best()
    calibration = loop.calibrate(sampling)
    run.finish()
    found: dict[str, Any] = run.workers.broadcast("errors", lambda: run.flow_errors().to_dict())
    return {**found, **calibration}
