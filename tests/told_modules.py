"""A module with settings of many kinds, which runs and stores are to tell from others."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

GAIN = 1.5
RUN = {"n_chains": 4096 * 2 + 9, "burn_in": 1, "chunk_chains": 4096, "dim": 3, "data_range": (-1.0, 1.0)}


def squash(x: torch.Tensor) -> torch.Tensor:
    """A helper that a module calls."""
    return torch.tanh(x)


class Net(nn.Module):
    """A module with settings of many kinds."""

    words = frozenset(("some", "words", "in", "no", "order"))

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.register_buffer("shift", torch.zeros(3))
        self.scale = scale
        self.activation = functools.partial(F.gelu, approximate="tanh")
        self.names = set(self.words)
        self.table = np.arange(3)
        self.shape = {"rows": [1, (2, None)]}

    def forward(self, x, bias=0.25):
        return squash(self.activation(self.inner(x)) * self.scale * GAIN + self.shift + bias)


def net(scale: float = 1.0, seed: int = 0) -> Net:
    """A module of given weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(scale).eval()
