"""What a process of the report is asked, and how it answers: plain values, so that they can travel and be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict

Emit = Callable[[dict[str, Any]], None]
"""Called with what is known so far; each call replaces the one before."""


class ReportJob(TypedDict):
    """What all jobs of the report have in common.

    Args:
        device: of torch.
        quick: whether shorter timings will do.
        tiny: whether small networks stand for the six.
        rounds: timings of each contestant.
    """

    device: str
    quick: bool
    tiny: bool
    rounds: int


class FactsJob(ReportJob):
    """What the GPU is, and every check and tile that is to be proved for ``networks``."""

    kind: Literal["facts"]
    networks: list[str]


class CeilingsJob(ReportJob):
    """How fast the GPU multiplies and copies at best."""

    kind: Literal["ceilings"]


class CheckJob(ReportJob):
    """A kernel against the reference."""

    kind: Literal["check"]
    network: str
    precision: str
    kernel: str


class ProveJob(ReportJob):
    """A tile, as `kaleido_kernels.tuned.tile_to_json` returns it, against the reference."""

    kind: Literal["prove"]
    network: str
    precision: str
    tile: dict[str, Any]


class NetworkJob(ReportJob):
    """One network tuned and timed.

    Args:
        n_chains: of a timing.
        seconds: for all of it.
        timing_seconds: of one timing.
        tiles: by precision, those that were proved.
        peers: their names.
        tune, time: whether to.
        keep: whether to write the user's table of tiles.
        known: the record of a process that was lost to a tile or a contestant; {} at first.
    """

    kind: Literal["network"]
    network: str
    n_chains: int
    seconds: float
    timing_seconds: float
    tiles: dict[str, list[dict[str, Any]]]
    peers: list[str]
    tune: bool
    time: bool
    keep: bool
    known: dict[str, Any]


class LookJob(TypedDict):
    """What the GPU is, and whether it can be used for a first contact; with ``busy`` one that others use will do."""

    kind: Literal["look"]
    device: str
    busy: bool


class ContactJob(TypedDict):
    """One case of a first contact.

    Args:
        timed: whether it is timed; otherwise it is checked.
        compile_only: whether launches compute nothing, so that no state is judged.
        chains: of a check.
        repeats: of the same work, which must give the same bits.
        timed_chains: of a timing.
    """

    kind: Literal["contact"]
    device: str
    network: str
    precision: str
    kernel: str
    timed: bool
    compile_only: bool
    chains: int
    repeats: int
    timed_chains: int


Job = FactsJob | CeilingsJob | CheckJob | ProveJob | NetworkJob | LookJob | ContactJob
