"""Progress bars: on standard error where that is a terminal, below the cell in a notebook."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from kaleido_fast.progress import SampleProgress, TrainingProgress

NOTEBOOK_EVERY = 0.2  # seconds between messages to a notebook
NOTEBOOK_WIDTH = 100


def progress_bar() -> Progress:
    """A bar with a description, a rate field and the time left; silent where it could not be seen moving."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
    )
    display = notebook_display()
    if display is not None:
        return NotebookProgress(display, *columns)
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def notebook_display() -> Callable[..., Any] | None:
    """IPython's function that shows something below the cell that runs; None outside of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is None or not hasattr(shell, "kernel"):  # IPython in a terminal has no kernel
        return None
    from IPython.display import display

    return display


class NotebookProgress(Progress):
    """Bars as text below the cell: needs IPython alone, while rich's own need ipywidgets and show nothing without it.

    Args:
        display: as IPython's.
        columns: of the bars.
    """

    def __init__(self, display: Callable[..., Any], *columns: ProgressColumn) -> None:
        canvas = Console(file=io.StringIO(), width=NOTEBOOK_WIDTH, force_terminal=False, force_jupyter=False)
        super().__init__(*columns, console=canvas, auto_refresh=False)
        self.display = display
        self.handle: Any = None
        self.drawn = 0.0

    def start(self) -> None:
        self.handle = None if self.disable else self.display(self._text(), raw=True, display_id=True)

    def stop(self) -> None:
        self._draw()
        self.handle = None

    def refresh(self) -> None:
        if time.monotonic() - self.drawn >= NOTEBOOK_EVERY:
            self._draw()

    def update(self, *args: Any, **fields: Any) -> None:
        super().update(*args, **fields)
        self.refresh()

    def _draw(self) -> None:
        if self.handle is not None:
            self.drawn = time.monotonic()
            self.handle.update(self._text(), raw=True)

    def _text(self) -> dict[str, str]:
        with self.console.capture() as drawn:
            self.console.print(self.make_tasks_table(self.tasks))
        return {"text/plain": drawn.get().rstrip()}


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
