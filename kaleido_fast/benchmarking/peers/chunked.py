"""Eager torch over chunks of chains that stay in cache for all steps: the hand-tuned baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from kaleido_fast.benchmarking.contest import Contestant, Run, start_states
from kaleido_fast.benchmarking.peers import Setting, two_steps_seconds

ROWS = {"cpu": (512, 4096, 32_768), "cuda": (8192, 16_384, 32_768)}  # a GPU is not filled by fewer


def build(setting: Setting) -> Contestant:
    """The fastest of three sizes of chunks, found by two steps of (at most) 32,768 chains."""
    sizes = ROWS[setting.device.type]
    z0 = start_states(setting.model, min(setting.n_chains, sizes[-1]), setting.device)
    runs = {rows: _runner(setting, rows) for rows in [rows for rows in sizes if rows <= len(z0)] or [len(z0)]}
    seconds = {rows: two_steps_seconds(run, z0) for rows, run in runs.items()}
    return Contestant(runs[min(seconds, key=seconds.__getitem__)], precision=setting.precision)


def _runner(setting: Setting, rows: int) -> Run:
    model, dtype = setting.network()

    @torch.inference_mode()
    def run(z0: Tensor, n_steps: int) -> Tensor:
        final = torch.empty_like(z0)
        for target, start in zip(final.split(rows), z0.split(rows), strict=True):
            x = start.to(dtype)
            for _ in range(n_steps):
                x = model(x)
            target.copy_(x)
        return final

    return run
