"""What a run in fp32 on a CPU with AMX would have taken in bf16: an estimate by a cost model, in words.

The model has what one core of a Xeon (AVX-512 and AMX, about 3 GHz) took for each part of a step. Only the ratio of two
of its sums is used, so that other clocks and numbers of cores fall out. Times as fast, measured and by the model:
points1d 0.8, 0.8; points2d 3.4, 3.3; digits 8.7, 6.5; deep128 6.9, 6.2; mnist 7.0, 6.2; cifar 6.9, 6.7; with SiLU
digits 4.1, 4.2; deep128 3.1, 3.3; mnist 5.0, 5.2.
"""

from __future__ import annotations

from kaleido_fast.model import ModelSpec
from kaleido_fast.planning.low_precision import CLEARLY_FASTER, low_request, low_words
from kaleido_fast.planning.request import SampleRequest

FLOPS = {"fp32": 190e9, "bf16": 1300e9}
"""Operations a second in layers."""
LAYER_SECONDS = {"fp32": 0.2e-9, "bf16": 0.6e-9}
"""What a layer costs a chain besides."""
ACTIVATION_SECONDS = {"relu": 0.0, "leaky_relu": 0.0, "silu": 0.27e-9, "sigmoid": 0.26e-9, "tanh": 0.35e-9}
"""Of one value; others take `_OTHER_SECONDS`."""
_OTHER_SECONDS = 0.55e-9
NOISE_SECONDS = 1.0e-9
"""Of one value of jitter."""
_INPUTS, _OUTPUTS = 32, 16  # a tile's; layers are filled up to it


def in_bf16(request: SampleRequest, spec: ModelSpec, *, seconds: float) -> str | None:
    """About how long a run would have taken in bf16, and by which flags; None where that is not worth it.

    It is not known of runs that freeze chains: in 16 bits none is frozen before the polish.

    Args:
        request: of the run, by the CPU engine of a processor that computes bf16 by AMX.
        spec: its network.
        seconds: what it took, without compiling.
    """
    other = low_request(request, "bf16")
    if other is None or request.freezes or seconds <= 0:
        return None
    steps, exact = request.schedule.n_steps, request.schedule.n_steps - other.polish_from if other.polish else 0
    jitters = request.schedule.jitter > 0 and not request.schedule.restarts
    one = {precision: step_seconds(spec, precision, jitters=jitters) for precision in FLOPS}
    share = (exact * one["fp32"] + (steps - exact) * one["bf16"]) / (steps * one["fp32"])
    return low_words(other, share * seconds) if CLEARLY_FASTER * share <= 1 else None


def step_seconds(spec: ModelSpec, precision: str, *, jitters: bool = False) -> float:
    """What one step of one chain takes one core, by the model."""
    inputs, outputs = (_INPUTS, _OUTPUTS) if precision == "bf16" else (1, 1)
    flops = sum(
        2 * _filled(n_in, inputs) * _filled(n_out, outputs)
        for n_in, n_out in zip(spec.widths[:-1], spec.widths[1:], strict=True)
    )
    hidden = sum(spec.widths[1:-1]) * ACTIVATION_SECONDS.get(spec.activation, _OTHER_SECONDS)
    bound = spec.dim * ACTIVATION_SECONDS[spec.bound]
    noise = spec.dim * NOISE_SECONDS if jitters else 0.0
    return flops / FLOPS[precision] + spec.n_layers * LAYER_SECONDS[precision] + hidden + bound + noise


def _filled(n: int, unit: int) -> int:
    return -(-n // unit) * unit
