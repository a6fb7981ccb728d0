"""Which engine can run here: a plan for this machine, with what is known of numba only once it is loaded."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from kaleido_fast.model import ModelSpec
from kaleido_fast.planning.facts import DeviceFacts
from kaleido_fast.planning.plan import NOT_COMPILED, SamplePlan, make_plan
from kaleido_fast.planning.request import SampleRequest


def plan_here(
    request: SampleRequest,
    spec: ModelSpec | None,
    facts: DeviceFacts,
    dim: int,
    **options: Any,
) -> SamplePlan:
    """`make_plan` with what is known of numba only once it is loaded, which takes half a second.

    Args:
        request, spec, facts, dim, options: as there.

    Raises:
        InputError: as there.
    """
    return make_plan(
        request, spec, _with_loops(facts) if _asks_for_loops(request, spec, facts) else facts, dim, **options
    )


def _asks_for_loops(request: SampleRequest, spec: ModelSpec | None, facts: DeviceFacts) -> bool:
    """Whether the plan depends on what the compiled loops can do."""
    wanted = request.kernel == "auto" and request.engine in ("auto", "cpu")
    computed = request.precision in ("fp32", "bf16")
    return spec is not None and facts.kind == "cpu" and facts.has_numba and wanted and computed


def _with_loops(facts: DeviceFacts) -> DeviceFacts:
    """Facts with what the compiled loops can do, which are loaded for it."""
    loops, problem = _load_loops()
    if problem:
        return replace(facts, numba_problem=problem)
    bf16 = loops.LOOPS[loops.bf16_loops()]
    return replace(facts, slow_bf16="" if bf16.speed > 1 else bf16.about)


def cpu_arithmetic(engine: str, precision: str) -> str:
    """What the last bits of an engine's results on this processor depend on; empty for nothing.

    Loops in fp32 give the same bits wherever multiply-adds are fused; torch's products depend on the processor, or on
    the instructions that it was told to use (ATEN_CPU_CAPABILITY).
    """
    if engine == "reference":
        return f"torch's kernels for {torch.backends.cpu.get_cpu_capability()}"
    loops, problem = _load_loops()
    return "" if problem or engine != "cpu" else loops.arithmetic(precision)


def has_fast_bf16() -> bool:
    """Whether engine 'cpu' computes bf16 faster than fp32 here: by AMX, or by AVX512-BF16 on AMD's processors."""
    loops, problem = _load_loops()
    return not problem and loops.LOOPS[loops.bf16_loops()].speed > 1


def instruction_set() -> str:
    """The widest instructions used here by the loops of engine 'cpu', or by torch without them: "AVX2", "AMX", ..."""
    loops, problem = _load_loops()
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "AVX-512"}.get(capability, capability) if problem else loops.instruction_set()


@functools.cache
def _load_loops() -> tuple[Any, str]:
    """The module of compiled loops, or why there is none."""
    try:
        from kaleido_fast.engines.loops import choice
    except Exception as problem:  # of numba, which refuses unknown versions of numpy, or of a broken library below it
        return None, f"numba cannot be loaded ({' '.join(str(problem).split())[:200]}): install versions that fit"
    return choice, "" if choice.IS_COMPILED else NOT_COMPILED
