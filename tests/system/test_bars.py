"""Where a progress bar is shown: on a terminal, below the cell of a notebook, nowhere else."""

from __future__ import annotations

import sys
import types

import pytest
from rich.progress import Progress

from kaleido_fast import fast_sample
from kaleido_fast.system.bars import NotebookProgress, progress_bar

from conftest import random_mlp  # isort: skip


class Notebook:
    """What IPython gives a program: a shell, and a function that shows and changes what is below a cell."""

    def __init__(self, shell: object) -> None:
        self.shown: list[str] = []
        display = types.SimpleNamespace(display=self.show)
        self.module = types.SimpleNamespace(get_ipython=lambda: shell, display=display)

    def show(self, data, *, raw, display_id):
        assert raw and display_id
        self.update(data, raw=raw)
        return self

    def update(self, data, *, raw):
        self.shown.append(data["text/plain"])


def enter(monkeypatch, shell: object) -> Notebook:
    notebook = Notebook(shell)
    monkeypatch.setitem(sys.modules, "IPython", notebook.module)
    monkeypatch.setitem(sys.modules, "IPython.display", notebook.module.display)
    return notebook


IN_NOTEBOOK = types.SimpleNamespace(kernel=None)


def test_a_notebook_shows_a_bar_that_ends_at_its_end(monkeypatch, capsys):
    notebook = enter(monkeypatch, IN_NOTEBOOK)
    fast_sample(random_mlp(4, 5, 4), n_chains=300, burn_in=20, device="cpu", progress=True)
    assert notebook.shown[0] == "", "shown before the first step"
    last = notebook.shown[-1]
    assert last.startswith("sampling") and "100 %" in last and "chain-steps/s" in last
    assert "\x1b" not in "".join(notebook.shown), "no control characters of terminals"
    assert capsys.readouterr() == ("", ""), "nor anything elsewhere"


def test_a_notebook_gets_few_messages_and_the_last_state(monkeypatch):
    notebook = enter(monkeypatch, IN_NOTEBOOK)
    with progress_bar() as bar:
        assert isinstance(bar, NotebookProgress)
        task = bar.add_task("[red]counting", total=10_000, rate="[/x]")
        for done in range(10_001):
            bar.update(task, completed=done)
    assert len(notebook.shown) < 1000
    assert "100 %" in notebook.shown[-1]
    assert "[red]counting" in notebook.shown[-1] and "[/x]" in notebook.shown[-1], "brackets are brackets"


def test_an_interruption_leaves_the_state_it_came_at(monkeypatch):
    notebook = enter(monkeypatch, IN_NOTEBOOK)
    with pytest.raises(KeyboardInterrupt), progress_bar() as bar:
        bar.update(bar.add_task("x", total=4, rate=""), completed=3)
        raise KeyboardInterrupt
    assert "75 %" in notebook.shown[-1]


@pytest.mark.parametrize("shell", [None, object()], ids=["a program that imports IPython", "IPython in a terminal"])
def test_elsewhere_a_bar_needs_a_terminal(monkeypatch, capsys, shell):
    notebook = enter(monkeypatch, shell)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with progress_bar() as bar:
        assert type(bar) is Progress and bar.disable
        bar.update(bar.add_task("x", total=1, rate=""), completed=1)
    assert notebook.shown == [] and capsys.readouterr() == ("", "")
