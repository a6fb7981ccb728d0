"""What a run in fp32 on a GPU would have taken in fp16: an estimate by the kernels' cost model, in words.

It never promises more than the model says: of the time that was measured, only the part that the model gives to the
kernels becomes less; writing, noise, and whatever else took time is left as it was.
"""

from __future__ import annotations

from collections.abc import Sequence

from kaleido_fast.errors import InputError
from kaleido_fast.model import ModelSpec
from kaleido_fast.planning.facts import DeviceFacts
from kaleido_fast.planning.low_precision import CLEARLY_FASTER, low_request, low_words
from kaleido_fast.planning.plan import PlannedPhase, SamplePlan, choose_engine
from kaleido_fast.planning.request import SampleRequest
from kaleido_kernels.precision import WeightsRange
from kaleido_kernels.proving.trials import expected_milliseconds
from kaleido_kernels.tile import GpuFacts

BY_PARTS = 1.15
"""How much longer than the model says a flow takes in fp16, against fp32. Of steps by parts it knows nothing: an H200
took up to 1.14 times as long in fp16 (deep128; mnist 1.12; in `wide` 1.16, before its whole steps became 10 % faster),
and 1.05 to 1.07 times in fp32."""
MODELLED_GPU = (9, 0)
"""Compute capability of the H100 and the H200, whose rates the cost model has."""
MODELLED_KERNELS = ("narrow", "onchip", "stream", "wide")
"""Kernels whose estimates were compared with times of an H200; the library's products of "graph" were not."""
MODELLED_PRECISIONS = ("fp16x3", "fp16")
"""Device precisions of which that holds."""


def in_fp16(
    request: SampleRequest,
    plan: SamplePlan,
    spec: ModelSpec,
    facts: DeviceFacts,
    weights: WeightsRange,
    *,
    n_chains: int,
    seconds: float,
) -> str | None:
    """About how long a run would have taken in fp16, and by which flags; None where it is not known or not worth it.

    It is not known of runs that freeze chains: in 16 bits none is frozen before the polish, and the cost model has no
    kernels that look at their chains.

    Args:
        request, plan: of the run.
        spec, weights: its network.
        facts: its GPU.
        n_chains: chains that were computed, by this process alone.
        seconds: what that took, without compiling.
    """
    modelled = facts.kind == "cuda" and facts.gpu.capability == MODELLED_GPU
    if not modelled or request.freezes or n_chains < 1 or seconds <= 0:
        return None
    other = low_request(request, "fp16")
    phases = None if other is None else _fp16_phases(other, spec, facts, weights)
    if other is None or phases is None:
        return None
    exact, polished = (
        kernel_seconds(each, spec, facts.gpu, n_chains, plan.block_chains) for each in (plan.phases, phases)
    )
    if exact is None or polished is None:
        return None
    if request.sampler == "flow":
        polished *= BY_PARTS
    expected = seconds - min(1.0, seconds / exact) * (exact - polished)
    return low_words(other, expected) if seconds >= CLEARLY_FASTER * expected else None


def kernel_seconds(
    phases: Sequence[PlannedPhase], spec: ModelSpec, gpu: GpuFacts, n_chains: int, block_chains: int
) -> float | None:
    """What the cost model says of the launches of a run, one of each phase for each block; None of what it lacks."""
    blocks, rest = divmod(n_chains, block_chains)
    milliseconds = 0.0
    for phase in phases:
        kernel = phase.kernel
        if (
            kernel is None
            or kernel.precision not in MODELLED_PRECISIONS
            or kernel.choice.kernel not in MODELLED_KERNELS
        ):
            return None
        for launches, chains in ((blocks, block_chains), (1, rest)):
            if launches and chains:
                milliseconds += launches * expected_milliseconds(
                    spec,
                    kernel.precision,
                    kernel.choice.tile,
                    gpu,
                    n_chains=chains,
                    n_steps=phase.last - phase.first,
                )
    return milliseconds / 1e3


def _fp16_phases(
    request: SampleRequest, spec: ModelSpec, facts: DeviceFacts, weights: WeightsRange
) -> tuple[PlannedPhase, ...] | None:
    """What would run in which steps; None, or phases without kernels, where weights or GPU do not take fp16."""
    try:
        return choose_engine(request, spec, facts, weights)[2]
    except InputError:
        return None
