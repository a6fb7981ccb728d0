"""Eager torch captured in a CUDA graph: one step, replayed, so that no launch waits for Python."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kaleido_fast.benchmarking.contest import Contestant
from kaleido_fast.benchmarking.peers import Setting


def build(setting: Setting) -> Contestant:
    """A step of all chains on one static buffer; on CPU tensors it runs uncaptured, for tests."""
    model, dtype = setting.network()
    states = torch.zeros(setting.n_chains, setting.model.spec.dim, dtype=dtype, device=setting.device)

    @torch.inference_mode()
    def step() -> None:
        states.copy_(model(states))

    replay: Callable[[], None] = step
    if setting.device.type == "cuda":
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(setting.device)
        with torch.cuda.stream(side):
            step()  # libraries set themselves up outside of the capture
        torch.cuda.synchronize(setting.device)
        with torch.cuda.graph(graph, stream=side):
            step()
        replay = graph.replay

    def run(z0: Tensor, n_steps: int) -> Tensor:
        states.copy_(z0)
        for _ in range(n_steps):
            replay()
        return states.to(torch.float32, copy=True)

    return Contestant(run, precision=setting.precision)
