"""Eager torch with weights and states in a 16-bit type, shared by the two adapters of that kind."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from kaleido_fast.benchmarking.contest import Contestant
from kaleido_fast.benchmarking.peers import Setting


def build_half(setting: Setting, dtype: torch.dtype, precision: str) -> Contestant:
    """Eager torch in ``dtype``, states returned in fp32."""
    model = copy.deepcopy(setting.model).to(dtype)

    @torch.inference_mode()
    def run(z0: Tensor, n_steps: int) -> Tensor:
        x = z0.to(dtype)
        for _ in range(n_steps):
            x = model(x)
        return x.to(torch.float32)

    return Contestant(run, precision=precision)
