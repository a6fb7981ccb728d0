"""From a plan to engines that hold the weights: the one place that knows all engines."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from kaleido_fast.engines.base import Engine
from kaleido_fast.engines.cpu import CpuEngine
from kaleido_fast.engines.general import ModuleEngine
from kaleido_fast.engines.reference import ReferenceEngine
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.planning.plan import PlannedPhase, SamplePlan
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.running.phases import Phase
from kaleido_fast.running.subject import Subject
from kaleido_fast.system.devices import (
    current_stream,
)


def build_phases(subject: Subject, request: SampleRequest, plan: SamplePlan, device: torch.device) -> list[Phase]:
    """The engines of a plan, each over its steps."""
    return [
        Phase(build_engine(subject, request, plan, phase, device), phase.first, phase.last) for phase in plan.phases
    ]


def build_engine(
    subject: Subject, request: SampleRequest, plan: SamplePlan, phase: PlannedPhase, device: torch.device
) -> Engine:
    """The engine of a phase, with the model's weights packed for it, now or in an earlier call."""
    if phase.precision != request.precision:
        request = replace(request, precision=phase.precision, polish=0)
    build = partial(_pack, subject=subject, request=request, plan=plan, phase=phase, device=device)
    if subject.packed is None:
        return build(subject.module)
    # Weights are packed, and kernels have their scratch, on the caller's stream.
    packing = None if phase.kernel is None else phase.kernel.packing
    key = (plan.engine, plan.tile_rows, phase.precision, packing, device, current_stream(device))
    return subject.packed.engine(key, build).with_request(request)


def _pack(
    module: nn.Module,
    *,
    subject: Subject,
    request: SampleRequest,
    plan: SamplePlan,
    phase: PlannedPhase,
    device: torch.device,
) -> Engine:
    if plan.engine == "reference":
        place: dict[str, Any] = {"dim": subject.dim, "data_range": subject.data_range, "device": device}
        if subject.spec is None:
            return ModuleEngine(module, request, tile_rows=plan.tile_rows, **place)
        assert isinstance(module, KaleidoMLP)
        return ReferenceEngine(module, request, tile_rows=plan.tile_rows, **place)
    assert isinstance(module, KaleidoMLP)
    if phase.kernel is None:
        return CpuEngine(module, request)
    from kaleido_fast.engines.triton import TritonEngine  # Triton's import takes a while

    return TritonEngine(module, request, phase.kernel, device)
