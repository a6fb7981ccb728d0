"""The fastest that this machine multiplies."""

from __future__ import annotations

import pytest
import torch
from small_bench import CPU

from kaleido_fast.benchmarking import ceiling


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp64", "bf16"])
def test_ceiling_runs_in_every_precision_and_leaves_the_setting_alone(precision, monkeypatch):
    monkeypatch.setattr(ceiling, "SIDE", 32)
    before = torch.get_float32_matmul_precision()
    assert ceiling.ceiling_run(precision, CPU)() == 0.0
    assert torch.get_float32_matmul_precision() == before
