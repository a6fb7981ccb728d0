"""Progress bars on standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from kaleido_fast.sampling import SampleProgress
    from kaleido_fast.training import TrainingProgress


def progress_bar() -> Progress:
    """A bar with a description, a rate field and the time left; silent where standard error is not a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


@contextlib.contextmanager
def sampling_bar(also: Callable[[SampleProgress], None] | None = None) -> Iterator[Callable[[SampleProgress], None]]:
    """A callback for `fast_sample` that moves a bar, and calls ``also``."""
    with progress_bar() as bar:
        task = bar.add_task("sampling", total=None, rate="")

        def update(state: SampleProgress) -> None:
            rate = f"{state.chain_steps_done / max(state.seconds, 1e-9):,.3g} chain-steps/s"
            bar.update(task, total=state.chain_steps, completed=state.chain_steps_done, rate=rate)
            if also is not None:
                also(state)

        yield update


@contextlib.contextmanager
def training_bar() -> Iterator[Callable[[TrainingProgress], None]]:
    """A callback for `train` that moves a bar with loss, learning rate and time left."""
    with progress_bar() as bar:
        task = bar.add_task("training", total=None, rate="")

        def update(state: TrainingProgress) -> None:
            loss = f"loss {state.last.held_out:.4g}, " if state.last is not None else ""
            name = "training" if state.attempt == 0 else f"training, seed {state.attempt + 1}"
            rate = f"{loss}learning rate {state.learning_rate:.2g}"
            bar.update(task, description=name, total=state.steps, completed=state.step, rate=rate)

        yield update
