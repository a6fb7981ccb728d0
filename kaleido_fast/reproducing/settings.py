"""What can be reproduced, and the settings of a reproduction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kaleido_fast.errors import unknown_name
from kaleido_fast.scalars import plain_fields

ALL = "all"


@dataclass(frozen=True)
class Kaleidoscope:
    """One entry of the list.

    Args:
        name: its name on the command line, and of its module here.
        title: heading of its report.
        minutes: expected time on 2 CPU cores, with nothing in the cache.
    """

    name: str
    title: str
    minutes: float

    @property
    def expected(self) -> str:
        """The expected time in words."""
        return f"about {self.minutes:g} minutes" if self.minutes >= 2 else f"about {self.minutes * 60:.0f} seconds"


KALEIDOSCOPES: dict[str, Kaleidoscope] = {
    entry.name: entry
    for entry in (
        Kaleidoscope("points1d", "Four points on a line", 2),
        Kaleidoscope("points2d", "Four points in the plane", 2),
        Kaleidoscope("digits", "8 x 8 digits", 0.5),
        Kaleidoscope("mnist", "MNIST digits", 16),
        Kaleidoscope("depth", "Does depth help?", 6),
    )
}


@dataclass(frozen=True)
class Settings:
    """Settings of a reproduction.

    Args:
        seed: of training and of sampling.
        device: "auto" (a GPU where there is one), "cpu", "cuda", ...
        data: path of the MNIST images where they are not to be fetched by name; ``mnist`` alone reads it.
        steps: training steps for a quick look; None for the recipe's own.
        n_chains: chains that figures are measured on; None for the kaleidoscope's own number.
        cache: folder that keeps trained models; None for `models.cache_folder`.
        progress: show progress bars.
        tell: called with one line on what happens now.
    """

    seed: int = 0
    device: str = "auto"
    data: Path | None = None
    steps: int | None = None
    n_chains: int | None = None
    cache: Path | None = None
    progress: bool = False
    tell: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        plain_fields(self)


def chosen(name: str) -> list[Kaleidoscope]:
    """The entries that a name stands for; an unknown one raises `InputError` with the nearest."""
    if name == ALL:
        return list(KALEIDOSCOPES.values())
    if name not in KALEIDOSCOPES:
        raise unknown_name("kaleidoscope", name, (*KALEIDOSCOPES, ALL))
    return [KALEIDOSCOPES[name]]
