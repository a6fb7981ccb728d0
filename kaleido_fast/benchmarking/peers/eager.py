"""Plain torch: ``x = model(x)`` in a loop."""

from __future__ import annotations

import torch
from torch import Tensor

from kaleido_fast.benchmarking.contest import Contestant
from kaleido_fast.benchmarking.peers import Setting


def build(setting: Setting) -> Contestant:
    """Eager torch in fp32."""

    @torch.inference_mode()
    def run(z0: Tensor, n_steps: int) -> Tensor:
        x = z0
        for _ in range(n_steps):
            x = setting.model(x)
        return x

    return Contestant(run)
