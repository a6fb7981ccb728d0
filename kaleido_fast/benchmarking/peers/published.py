"""The published sampler's procedure (arXiv 2402.11793), written afresh from its description."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from kaleido_fast.benchmarking.contest import Contestant
from kaleido_fast.benchmarking.peers import Setting
from kaleido_fast.noise import jitter_noise

EPS = 0.01  # as published


def build(setting: Setting) -> Contestant:
    """Each step: forward, loss (never read), uniform noise on [high, 2 high - low), clamp.

    Timed with noise drawn where the states are (published: on the CPU); checked with that of ``noise="upstream"``.
    """
    low, high = setting.model.spec.low, setting.model.spec.high

    def drawn(x: Tensor, step: int) -> Tensor:
        return (high - low) * torch.rand_like(x) + high

    def counted(x: Tensor, step: int) -> Tensor:
        return jitter_noise(0, torch.arange(len(x), device=x.device), x.shape[1], step + 1, "upstream", low, high)

    @torch.no_grad()
    def run(x: Tensor, n_steps: int, noise: Callable[[Tensor, int], Tensor] = drawn) -> Tensor:
        for step in range(n_steps):
            y = setting.model(x)
            mse_loss(y, x)
            x = (y + EPS * noise(y, step)).clamp(low, high)
        return x

    return Contestant(run, lambda z0, n_steps: run(z0, n_steps, counted), {"noise": "upstream", "jitter": EPS})
