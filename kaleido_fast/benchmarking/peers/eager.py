"""Plain torch: ``x = model(x)`` in a loop."""

from __future__ import annotations

import torch
from torch import Tensor

from kaleido_fast.benchmarking.contest import Contestant
from kaleido_fast.benchmarking.peers import Setting


def build(setting: Setting) -> Contestant:
    """Eager torch with weights and states in the setting's precision; states are returned in fp32."""
    model, dtype = setting.network()

    @torch.inference_mode()
    def run(z0: Tensor, n_steps: int) -> Tensor:
        x = z0.to(dtype)
        for _ in range(n_steps):
            x = model(x)
        return x.to(torch.float32)

    return Contestant(run, precision=setting.precision)
