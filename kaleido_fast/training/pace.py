"""How many steps of a training fit into a time: measured on its first steps, which are then made anew."""

from __future__ import annotations

import time
from collections.abc import Callable

TRIAL_SHARE = 0.02  # of the time, at most TRIAL_SECONDS; the first step makes what is made once and does not count
TRIAL_SECONDS = 5.0


def steps_in_time(
    seconds: float, advance: Callable[[], object], evaluate: Callable[[], object], n_evaluations: int
) -> int:
    """Steps that fit into ``seconds`` from now on with the evaluations between them, at least 1.

    Args:
        seconds: wall time, the trial included.
        advance: makes one step.
        evaluate: measures the held-out error once.
        n_evaluations: of a run.
    """
    began = time.perf_counter()
    advance()
    first = time.perf_counter()
    evaluate()
    tried = time.perf_counter()
    n = 0
    while n == 0 or time.perf_counter() - tried < min(TRIAL_SECONDS, TRIAL_SHARE * seconds):
        advance()
        n += 1
    now = time.perf_counter()
    left = seconds - (now - began) - n_evaluations * (tried - first)
    return max(1, int(left * n / (now - tried)))
