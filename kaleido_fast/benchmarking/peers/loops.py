"""The two loops around a torch step: calls in a row, and one captured step replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kaleido_fast.benchmarking.contest import Procedure
from kaleido_fast.benchmarking.peers import Setting

Step = Callable[[Tensor], Tensor]
"""(n, D) states of a dtype -> the next ones, in the same dtype."""
WARM_UPS = 3  # libraries and compilers set themselves up outside of the capture


def looped(step: Step, dtype: torch.dtype) -> Procedure:
    """``x = step(x)`` in ``dtype``, time after time; states are returned in fp32."""

    @torch.inference_mode()
    def run(z0: Tensor, n_steps: int) -> Tensor:
        x = z0.to(dtype)
        for _ in range(n_steps):
            x = step(x)
        return x.to(torch.float32)

    return run


def captured(step: Step, setting: Setting, dtype: torch.dtype) -> Procedure:
    """A step of all chains on one static buffer in a CUDA graph, so that no launch waits for Python.

    On CPU tensors it runs uncaptured, for tests.
    """
    states = torch.zeros(setting.n_chains, setting.model.spec.dim, dtype=dtype, device=setting.device)

    @torch.inference_mode()
    def advance() -> None:
        states.copy_(step(states))

    replay = capture(advance, setting.device) if setting.device.type == "cuda" else advance

    def run(z0: Tensor, n_steps: int) -> Tensor:
        states.copy_(z0)
        for _ in range(n_steps):
            replay()
        return states.to(torch.float32, copy=True)

    return run


@dataclass(frozen=True)
class Captured:
    """Work in a CUDA graph; a call replays it.

    Args:
        graph: it holds addresses alone.
        work: keeps what lies there. Without it the 16-bit copy of a model was freed once it was captured, later tensors
            took its memory, and the next replay gave NaN (seen on an H200).
    """

    graph: torch.cuda.CUDAGraph
    work: Callable[[], None]

    def __call__(self) -> None:
        self.graph.replay()


def capture(work: Callable[[], None], device: torch.device) -> Captured:
    """Capture ``work`` on a CUDA device."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # outside of the graph's own, so that a failed capture gives the stream back
        for _ in range(WARM_UPS):
            work()
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, stream=side):
            work()
    return Captured(graph, work)
