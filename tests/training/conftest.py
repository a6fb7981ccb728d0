"""Fixtures of the tests of training."""

from __future__ import annotations

import pytest
import torch

from kaleido_fast.reading.datasets import Dataset


@pytest.fixture
def points() -> Dataset:
    """23 points in 5 dimensions."""
    data = torch.rand((23, 5), generator=torch.Generator().manual_seed(3)) * 1.6 - 0.8
    return Dataset("points", data)
