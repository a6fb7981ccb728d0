"""torch.compile of the step, the fastest of its modes. On a CPU it needs a C++ compiler."""

from __future__ import annotations

from functools import partial

import torch

from kaleido_fast.benchmarking.contest import Contestant, Procedure, start_states
from kaleido_fast.benchmarking.peers import Setting, fastest
from kaleido_fast.benchmarking.peers.loops import captured, looped

# Not "reduce-overhead": its CUDA graphs refuse an output that is the next call's input (pytorch issue 170604), so on a
# GPU the compiled step is captured here. "max-autotune" takes longest to build: it comes last.
MODES = ("default", "max-autotune-no-cudagraphs")


def build(setting: Setting) -> Contestant:
    """The mode with the fastest two steps, of those that work and that the time allows; a quick run takes the first."""
    z0 = start_states(setting.model, setting.n_chains, setting.device)
    modes = {mode: partial(_compiled, setting, mode) for mode in MODES[: 1 if setting.quick else None]}
    run, about = fastest(modes, z0, setting.seconds)
    return Contestant(run, precision=setting.precision, about=about)


def _compiled(setting: Setting, mode: str) -> Procedure:
    model, dtype = setting.network()
    step = torch.compile(model, mode=mode, dynamic=False)
    return captured(step, setting, dtype) if setting.device.type == "cuda" else looped(step, dtype)
