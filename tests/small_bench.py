"""A benchmark of seconds."""

from __future__ import annotations

import torch

from kaleido_fast.benchmarking import runner
from kaleido_fast.benchmarking.cases import BenchNetwork
from kaleido_fast.benchmarking.peers import PEERS

CPU = torch.device("cpu")
SMALL = ("--chains", "20", "--steps", "2", "--rounds", "1", "--no-first-calls", "--engine", "reference")


def small_request(**options) -> runner.BenchRequest:
    defaults = {
        "networks": [BenchNetwork("points1d", network="points1d")],
        "engine": "reference",
        "peers": [PEERS["eager"], PEERS["chunked"]],
        "skipped": {"jax": "jax not installed"},
        "precision": "fp32",
        "device": CPU,
        "n_chains": 30,
        "n_steps": 2,
        "rounds": 3,
        "first_calls": False,
    }
    return runner.BenchRequest(**{**defaults, **options})
