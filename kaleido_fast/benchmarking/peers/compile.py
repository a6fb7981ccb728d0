"""torch.compile of the step, the fastest of its modes. On a CPU it needs a C++ compiler."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from kaleido_fast.benchmarking.contest import Contestant, Run, start_states
from kaleido_fast.benchmarking.peers import Setting, two_steps_seconds

MODES = {"cpu": ("default", "max-autotune-no-cudagraphs"), "cuda": ("reduce-overhead", "max-autotune", "default")}


def build(setting: Setting) -> Contestant:
    """The mode with the fastest two steps, of those that the time allows; a quick run takes the first."""
    (model, dtype), began = setting.network(), time.perf_counter()
    z0 = start_states(setting.model, setting.n_chains, setting.device)
    seconds, runs = dict[str, float](), dict[str, Run]()
    for mode in MODES[setting.device.type][: 1 if setting.quick else None]:
        if runs and time.perf_counter() - began > setting.seconds:
            break
        runs[mode] = _runner(torch.compile(model, mode=mode, dynamic=False), dtype)
        seconds[mode] = two_steps_seconds(runs[mode], z0)
    return Contestant(runs[min(seconds, key=seconds.__getitem__)], precision=setting.precision)


def _runner(step: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Run:
    @torch.inference_mode()
    def run(z0: Tensor, n_steps: int) -> Tensor:
        x = z0.to(dtype)
        for _ in range(n_steps):
            torch.compiler.cudagraph_mark_step_begin()
            x = step(x)
        return x.to(torch.float32, copy=True)  # a CUDA graph's output is overwritten by its next run

    return run
