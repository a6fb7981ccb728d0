"""Which engine can run here: a plan for this machine, with what is known of numba only once it is loaded."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    facts = _as_far_as_known(facts)
    plan = make_plan(request, spec, facts, dim, **options)
    if plan.engine != "cpu":
        return plan
    known = _with_loops(facts)
    return plan if known == facts else make_plan(request, spec, known, dim, **options)


def _as_far_as_known(facts: DeviceFacts) -> DeviceFacts:
    """Facts with why numba cannot be used, as far as that is known without loading it."""
    asked = facts.kind == "cpu" and facts.has_numba and not facts.numba_problem
    return replace(facts, numba_problem=_numba_problem()) if asked else facts


def _with_loops(facts: DeviceFacts) -> DeviceFacts:
    """Facts with what the compiled loops can do, which are loaded for it."""
    loops, problem = _load_loops()
    return replace(facts, numba_problem=problem, has_bf16=facts.has_bf16 and not problem and loops.HAS_BF16)


def cpu_arithmetic() -> str:
    """How the loops of engine 'cpu' differ from what they compute elsewhere; empty where they do not."""
    loops, problem = _load_loops()
    return "" if problem or loops.fuses() else "products are rounded before they are added (no fused multiply-add)"


def _numba_problem() -> str:
    """Why numba cannot be used here, as far as is known without loading it for nothing."""
    told = "NUMBA_DISABLE_JIT" in os.environ or Path(".numba_config.yaml").is_file()
    if not (told or "kaleido_fast.engines.cpu_kernels" in sys.modules):
        return ""
    return _load_loops()[1]


@functools.cache
def _load_loops() -> tuple[Any, str]:
    """The module of compiled loops, or why there is none."""
    try:
        from kaleido_fast.engines import cpu_kernels
    except Exception as problem:  # of numba, which refuses unknown versions of numpy, or of a broken library below it
        return None, f"numba cannot be loaded ({' '.join(str(problem).split())[:200]}): install versions that fit"
    return cpu_kernels, "" if cpu_kernels.IS_COMPILED else NOT_COMPILED
