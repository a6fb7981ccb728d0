"""A run's schedule as the loops read it."""

from __future__ import annotations

import numpy as np

from kaleido_fast.engines.loops import arrays
from kaleido_fast.engines.loops.arrays import Steps
from kaleido_fast.planning.request import SampleRequest

MASK32 = 0xFFFFFFFF


def pack_steps(request: SampleRequest) -> Steps:
    schedule = request.schedule
    return Steps(
        burn_in=schedule.burn_in,
        n_draws=schedule.n_draws,
        thin=schedule.thin,
        settle=schedule.settle,
        noise=getattr(arrays, schedule.jitter_kind.upper()),
        jitter=np.float32(schedule.jitter),
        key_low=request.seed & MASK32,
        key_high=request.seed >> 32,
        kept=np.array(schedule.kept_shares, np.float32),
    )


def start_kind(request: SampleRequest) -> int:
    """The code of the noise that chains start from."""
    if request.schedule.restarts:
        return arrays.RESTART
    return arrays.START_UNIFORM if request.init == "uniform" else arrays.START_NORMAL
