"""From a plan to engines that hold the weights: the one place that knows all engines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kaleido_fast.engines.base import Engine
from kaleido_fast.engines.cpu import CpuEngine
from kaleido_fast.engines.general import ModuleEngine
from kaleido_fast.engines.reference import ReferenceEngine
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.planning.plan import SamplePlan
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.running.settling import Phase
from kaleido_fast.running.subject import Subject
from kaleido_fast.system.devices import (
    current_stream,
    device_facts,
)


def build_phases(subject: Subject, request: SampleRequest, plan: SamplePlan, device: torch.device) -> list[Phase]:
    """The engine over all steps; with ``polish`` a second one, in fp32, for the last of them."""
    n_steps = request.schedule.n_steps
    if not request.polish or request.polish_from == 0:
        final = replace(request, precision="fp32", polish=0) if request.polish else request
        return [Phase(build_engine(subject, final, plan, device), 0, n_steps)]
    exact = build_engine(subject, replace(request, precision="fp32", polish=0), plan, device)
    return [
        Phase(build_engine(subject, request, plan, device), 0, request.polish_from),
        Phase(exact, request.polish_from, n_steps),
    ]


def build_engine(subject: Subject, request: SampleRequest, plan: SamplePlan, device: torch.device) -> Engine:
    """The engine of the plan, with the model's weights packed for it, now or in an earlier call."""
    if subject.packed is None:
        return _pack(subject.module, subject, request, plan, device)
    # Weights are packed, and kernels have their scratch, on the caller's stream.
    how = (plan.engine, plan.kernel, plan.tile_rows, request.precision, request.kernel)
    key = (*how, device, current_stream(device))
    engine = subject.packed.engine(key, lambda weights: _pack(weights, subject, request, plan, device))
    return engine.with_request(request)


def _pack(
    module: nn.Module, subject: Subject, request: SampleRequest, plan: SamplePlan, device: torch.device
) -> Engine:
    if plan.engine == "reference":
        place: dict[str, Any] = {"dim": subject.dim, "data_range": subject.data_range, "device": device}
        if subject.spec is None:
            return ModuleEngine(module, request, tile_rows=plan.tile_rows, **place)
        assert isinstance(module, KaleidoMLP)
        return ReferenceEngine(module, request, tile_rows=plan.tile_rows, **place)
    assert isinstance(module, KaleidoMLP)
    if plan.engine == "cpu":
        return CpuEngine(module, request)
    from kaleido_fast.engines.triton import TritonEngine  # only who uses it pays for Triton's import

    return TritonEngine(module, request, device, device_facts(device))
