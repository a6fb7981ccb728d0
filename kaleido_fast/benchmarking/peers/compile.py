"""torch.compile of the step, the fastest of its modes. On a CPU it needs a C++ compiler."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from kaleido_fast.benchmarking.contest import Contestant, Run, start_states
from kaleido_fast.benchmarking.peers import Setting

MODES = {"cpu": ("default", "max-autotune-no-cudagraphs"), "cuda": ("default", "reduce-overhead", "max-autotune")}


def build(setting: Setting) -> Contestant:
    """The mode with the fastest two steps; a quick run takes the first."""
    torch.compiler.reset()  # or after some networks its limit of recompilations leaves the next ones to eager torch
    z0 = start_states(setting.model, setting.n_chains, setting.device)
    seconds: dict[str, float] = {}
    runs: dict[str, Run] = {}
    for mode in MODES[setting.device.type][: 1 if setting.quick else None]:
        runs[mode] = _runner(torch.compile(setting.model, mode=mode, dynamic=False))
        float(runs[mode](z0, 2)[0, 0])
        began = time.perf_counter()
        float(runs[mode](z0, 2)[0, 0])  # reading a value waits for the device
        seconds[mode] = time.perf_counter() - began
    return Contestant(runs[min(seconds, key=seconds.__getitem__)])


def _runner(step: Callable[[Tensor], Tensor]) -> Run:
    @torch.inference_mode()
    def run(z0: Tensor, n_steps: int) -> Tensor:
        for _ in range(n_steps):
            torch.compiler.cudagraph_mark_step_begin()
            z0 = step(z0)
        return z0.clone()  # a CUDA graph's output is overwritten by its next run

    return run
