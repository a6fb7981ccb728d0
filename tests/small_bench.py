"""A benchmark of seconds."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from kaleido_fast.benchmarking import runner
from kaleido_fast.benchmarking.cases import BenchNetwork
from kaleido_fast.benchmarking.peers import PEERS

CPU = torch.device("cpu")
SMALL = ("--chains", "20", "--steps", "2", "--rounds", "1", "--no-first-calls", "--engine", "reference", "--busy")


def small_request(**options) -> runner.BenchRequest:
    defaults = {
        "networks": [BenchNetwork("points1d", network="points1d")],
        "engine": "reference",
        "peers": [PEERS["eager"], PEERS["chunked"]],
        "skipped": {"jax": "jax not installed"},
        "precisions": ["fp32"],
        "device": CPU,
        "n_chains": 30,
        "n_steps": 2,
        "rounds": 3,
        "first_calls": False,
        "busy": True,
        "apart": False,
    }
    return runner.BenchRequest(**{**defaults, **options})


def bench_apart(result: Path) -> None:
    """A benchmark with processes of its own; the names of those it timed go to a file."""
    (found,) = runner.run_bench(small_request(apart=True)).results
    result.write_text(" ".join(found.timings))


def children_of(pid: int) -> list[int]:
    """Processes of contestants that a process has started, also where it is gone."""
    wanted = ["kaleido_fast.benchmarking.child", str(pid)]
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_text().split("\0")[-3:-1] == wanted:
                found.append(int(folder.name))
    return found
