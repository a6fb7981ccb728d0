"""What the noise of a run does: decided before it, and described after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kaleido_fast.errors import InputError
from kaleido_fast.names import PUBLISHED_EPS
from kaleido_kernels.schedule import Schedule

_KALEIDOSCOPE = ("burn_in", "n_draws", "thin", "settle", "jitter", "noise")


def fit_to_noise(options: Mapping[str, Any], explicit: Mapping[str, Any], noise: object) -> dict[str, Any]:
    """Options of a request as its kind of noise takes them.

    The published noise ("upstream") comes after every step, so that no step is clean: what a checkpoint recommends
    for jitter and settle was measured with centred noise before the step and does not hold for it.

    Args:
        options: recommended ones and explicit ones, merged.
        explicit: those that the caller passed.
        noise: kind of noise.

    Raises:
        InputError: clean steps asked for where there are none.
    """
    if noise != "upstream":
        return dict(options)
    jitter, settle = explicit.get("jitter", PUBLISHED_EPS), explicit.get("settle", 0)
    if jitter and settle:
        raise InputError(
            f"settle {settle} with noise 'upstream': the published noise is added after every step, also the last one, "
            "so that no step is clean; leave settle out, or pass noise 'normal' or 'uniform'"
        )
    return {**options, "jitter": jitter, "settle": 0}


def run_words(run: Mapping[str, Any]) -> str:
    """Steps and noise of a run in words, from a mapping that holds the options of its schedule."""
    if run.get("sampler") == "flow":
        schedule = Schedule.flow(run["n_draws"], run["steps"], run["noise_from"], run["noise_to"])
    else:
        schedule = Schedule(**{name: run[name] for name in _KALEIDOSCOPE})
    words = jitter_words(schedule)
    return f"{schedule.n_steps} steps{f', {words}' if words else ' without noise'}"


def jitter_words(schedule: Schedule) -> str:
    """What noise a run has, as a part of a line; empty for none."""
    if not schedule.jitter:
        return ""
    if schedule.restarts:
        end = f" to {schedule.noise_to:g}" if schedule.thin > 1 else ""  # one step goes all the way
        return f"{schedule.thin} a draw, from noise {schedule.jitter:g}{end}"
    if schedule.noise == "upstream":
        return f"published noise {schedule.jitter:g} after every step"
    kind = "" if schedule.noise == "normal" else f"{schedule.noise} "
    if not schedule.n_jittered:
        return f"{kind}jitter {schedule.jitter:g} on no step: all are clean"
    return f"{kind}jitter {schedule.jitter:g} ({schedule.settle} clean steps before a draw)"
