"""A prepared run from its first launch to its result."""

from __future__ import annotations

import itertools
import time

import torch
from torch import Tensor

from kaleido_fast.errors import (
    SamplingInterruptedError,
    SamplingMemoryError,
)
from kaleido_fast.planning.plan import SamplePlan
from kaleido_fast.planning.request import SampleRequest, Trace
from kaleido_fast.progress import Callback, Meter
from kaleido_fast.running.blocks import Run, run_blocks, split
from kaleido_fast.running.engine import build_phases
from kaleido_fast.running.phases import Phase
from kaleido_fast.running.result import ChainArrays, ChainFigures, SampleResult, SampleStats
from kaleido_fast.running.sharing import run_shared
from kaleido_fast.running.subject import Subject
from kaleido_fast.system.devices import on_device
from kaleido_fast.system.memory import is_lack_of_memory
from kaleido_fast.system.neutral import neutral


def run_plan(
    subject: Subject,
    request: SampleRequest,
    plan: SamplePlan,
    device: torch.device,
    *,
    z0: Tensor | None = None,
    callback: Callback | None = None,
) -> SampleResult:
    """Run a plan on one device; see `execute`."""
    return execute(Run(subject, request, plan, device), z0=z0, callback=callback)


def execute(run: Run, *, z0: Tensor | None = None, callback: Callback | None = None) -> SampleResult:
    """Run what was prepared; see `fast_sample`.

    Raises:
        SamplingMemoryError: the memory ran out; what the run held of it is free.
    """
    try:
        with neutral(run.device):
            return _execute(run, z0, callback)
    except (RuntimeError, MemoryError) as problem:
        if not is_lack_of_memory(problem):
            raise
    # Raised here, where the other error is over: kept as its context it would keep the frames that hold the tensors.
    raise memory_advice(run)


def _execute(run: Run, z0: Tensor | None, callback: Callback | None) -> SampleResult:
    subject, request, plan, device = run.subject, run.request, run.plan, run.device
    began = time.perf_counter()
    if z0 is not None:
        z0 = z0.detach().to(device, torch.float64 if request.precision == "fp64" else torch.float32)
    phases = build_phases(subject, request, plan, device)
    n = request.n_chains
    meter = Meter(n, request.schedule.n_steps, callback)
    try:
        whole, chain_steps = compute_chains(run, phases, meter, z0)
        traced = None if request.trace is None else _trace(phases, request, request.trace, z0, device)
    except KeyboardInterrupt as stop:
        raise SamplingInterruptedError(meter.chains_done, n) from stop
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    stats = SampleStats.of(
        request,
        plan,
        ", ".join(map(str, (device, *run.others))),
        ChainFigures.of(whole, request),
        chain_steps=chain_steps,
        seconds=meter.seconds(),
        setup_seconds=meter.began - began,
        compile_seconds=sum(getattr(phase.engine, "compile_seconds", 0.0) for phase in phases),
    )
    return SampleResult(
        whole.draws,
        whole.residual,
        whole.steps,
        whole.period,
        whole.outcome,
        traced,
        stats,
        request,
        plan,
        subject.model_hash,
    )


def compute_chains(run: Run, phases: list[Phase], meter: Meter, z0: Tensor | None) -> tuple[ChainArrays, int]:
    """All chains of a run and the chain-steps that they took; waits for no GPU unless chains are frozen."""
    n = run.request.n_chains
    whole = ChainArrays.empty(n, run.request, run.subject.dim, run.device)
    if run.others:
        return whole, run_shared(run, phases, meter, whole, z0)
    with on_device(run.device):
        blocks = run_blocks(run, phases, split(n, run.plan.block_chains), meter, whole=whole, z0=z0)
        return whole, sum(block.chain_steps for block in blocks)


def memory_advice(run: Run) -> SamplingMemoryError:
    """The error for a run that found too little memory; what it packed is forgotten."""
    if run.subject.packed is not None:
        run.subject.packed.drop_engines()
    size = min(run.plan.block_chains, -(-run.request.n_chains // (1 + len(run.others))))
    smaller = max(1, size // 2)
    advice = f"block_chains={smaller} (--block-chains)"
    if run.subject.spec is None and run.plan.tile_rows > 1:  # it is given so many rows whatever the blocks
        advice = f"tile_chains={run.plan.tile_rows // 2}, or {advice}"
    return SamplingMemoryError(
        f"out of memory on {', '.join(map(str, (run.device, *run.others)))} with blocks of {size:,} chains: pass "
        f"{advice}; if that is not enough, fewer chains or draws at a time",
        block_chains=smaller,
    )


def _trace(
    phases: list[Phase], request: SampleRequest, trace: Trace, z0: Tensor | None, device: torch.device
) -> Tensor:
    """States of chosen chains at chosen steps: a run of just these chains, which have the same bits alone."""
    chain_ids = torch.tensor(trace.chains, dtype=torch.int64, device=device)
    state = None if z0 is None else z0[chain_ids - request.first_chain]
    wanted = sorted({0, *trace.steps, *(phase.first for phase in phases)})
    states: dict[int, Tensor] = {0: phases[0].engine.start(chain_ids) if state is None else state}
    for first, last in itertools.pairwise(wanted):
        phase = next(phase for phase in phases if phase.first <= first < phase.last)
        before = states[first] if first > 0 else state  # the engine makes its own start noise
        states[last] = phase.engine.advance(chain_ids, before, first, last, None, lambda _: None).state
    return torch.stack([states[step] for step in trace.steps], dim=1)
