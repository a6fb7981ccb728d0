"""`fast_sample`: options become a request, the request a plan, and the plan is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kaleido_fast.checkpoint import Checkpoint
from kaleido_fast.engines.available import plan_here
from kaleido_fast.errors import (
    GeneralModuleWarning,
    InputError,
    SamplerWarning,
    warn_caller,
)
from kaleido_fast.names import DEFAULT_CHECK_EVERY, DEFAULT_MAX_PERIOD, DEFAULT_MODEL, DEFAULT_PATIENCE
from kaleido_fast.planning.merging import complete_request, sampler_note
from kaleido_fast.planning.request import SampleRequest, Trace
from kaleido_fast.progress import Callback
from kaleido_fast.running.blocks import Run
from kaleido_fast.running.execution import execute
from kaleido_fast.running.result import (
    SampleResult,
)
from kaleido_fast.running.subject import check_z0, resolve_subject
from kaleido_fast.system.devices import (
    Device,
    device_facts,
    devices_for,
    refuse_capture,
)
from kaleido_fast.system.neutral import neutral
from kaleido_fast.system.uncompiled import uncompiled


@uncompiled("fast_sample measures time and waits for the device: inside a compiled graph call kaleido_fast.sample_op")
def fast_sample(
    model: nn.Module | Checkpoint | str | Path = DEFAULT_MODEL,
    *,
    n_chains: int,
    first_chain: int = 0,
    sampler: str | None = None,
    burn_in: int | None = None,
    n_draws: int = 1,
    thin: int | None = None,
    seed: int | None = 0,
    z0: Tensor | None = None,
    init: str = "uniform",
    noise: str = "normal",
    jitter: float | None = None,
    settle: int | None = None,
    steps: int | None = None,
    noise_from: float | None = None,
    noise_to: float | None = None,
    tol: float | str | None = "recommended",
    patience: int = DEFAULT_PATIENCE,
    check_every: int = DEFAULT_CHECK_EVERY,
    max_period: int = DEFAULT_MAX_PERIOD,
    retire_cycles: bool = False,
    precision: str = "fp32",
    polish: int = 0,
    engine: str = "auto",
    kernel: str = "auto",
    device: Device | Sequence[Device] = None,
    block_chains: int | None = None,
    tile_chains: int | None = None,
    trace: Trace | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    dim: int | None = None,
    data_range: tuple[float, float] | None = None,
) -> SampleResult:
    """Iterate a network from noise: ``n_chains`` independent chains, each ``burn_in + n_draws * thin`` steps long.

    One step is ``x <- f(clamp(x + jitter * noise, low, high))``; with ``jitter`` off it is ``x <- f(x)``. With the
    sampler "flow" it is ``x <- x + h_t (f(x) - x)``, ``steps`` times for each draw, from noise of its own.
    Chain k of a run has the same bits whatever other chains run beside it (of a module that is no plain MLP: with the
    same ``tile_chains``). Where an option is None, the
    checkpoint's recommendation holds, else the default in brackets.

    Args:
        model: a `KaleidoMLP`; an ``nn.Sequential`` of Linear layers, one kind of activation and a final Tanh or
            Sigmoid; any module that maps (n, D) to (n, D), each row for itself (reference engine only; run as in
            evaluation, and left as it is); a `Checkpoint`, the path of one, or the name of a bundled model.
        n_chains: number of chains.
        first_chain: absolute id of the first: ids, not positions, select the noise.
        sampler: "kaleidoscope" iterates f as above. "flow" makes new samples with a network that was trained for it:
            each draw starts from normal noise of its own and goes ``x <- x + h_t (f(x) - x)`` for ``steps`` steps, the
            last of them whole. Options of the other sampler are refused: ``burn_in``, ``thin``, ``init``, ``noise``,
            ``jitter``, ``settle``, ``tol``, ``polish`` and what looks for cycles are the kaleidoscope's.
        burn_in: steps before the first draw's own (299).
        n_draws: draws kept per chain.
        thin: steps per draw (1). Several draws of a jittered chain: as many as were measured to mix, else ``settle`` +
            64; ``thin`` up to ``settle`` is refused there, as it leaves no jittered step between draws.
        seed: 0 .. 2**64 - 1; None draws one, reported in ``result.request.seed``.
        z0: (n_chains, D) start states instead of start noise, inside the data range: a tensor or an array. Of a flow
            any finite ones, in the place of the first draw's start.
        init: start noise, "uniform" over the data range or "normal" clipped to it.
        noise: "normal" or "uniform" jitter; or "upstream", the published sampler's formula: ``x <- clamp(f(x) +
            jitter * e, low, high)`` with e uniform on [high, 2 high - low), after every step, also the last one.
        jitter: scale of the noise in units of half the data range (0); of "upstream" the published eps (0.01).
        settle: last steps before each draw that stay free of jitter (2); "upstream" has none.
        steps: of sampler "flow", steps per draw (20): more are better and slower.
        noise_from, noise_to: of sampler "flow", share of noise at the first step of a draw (0.9) and at the last (0.1),
            0 < noise_to < noise_from <= 1; between them it falls linearly. The start is ``noise_from`` times normal
            noise in units of half the data range around its middle, not clamped.
        tol: residual below which a chain is frozen and run no further (1e-4): its later draws are its frozen state.
            On a network that contracts by rho a step its states are then within tol * rho / (1 - rho) of their
            limit. None runs every step; with jitter chains are never frozen.
        patience: checks in a row below ``tol`` before a chain is frozen.
        check_every: steps between checks.
        max_period: longest cycle looked for among chains that do not come to rest, found for certain in runs of four
            times as many steps; 1 looks for none.
        retire_cycles: run a chain found in a cycle no further; its later draws are the cycle's states in turn.
        precision: "fp32", "fp64" (reference only), "tf32", "fp16", "bf16".
        polish: with "tf32", "fp16" or "bf16", the last steps before the first draw, and all after it, run in fp32.
        engine: "auto", "triton", "cpu", "reference"; one asked for by name runs or raises.
        kernel: of engine "triton": "narrow", "onchip", "stream", "wide" or "graph"; "auto" takes the one measured best
            on this GPU, else the first that fits. One asked for by name runs or raises.
        device: "cpu", "cuda" (the current one), "cuda:1"; None takes the model's own GPU, else the current one if there
            is one. A list of GPUs of one kind divides the chains, with the bits of one of them; results lie on the
            first. A model in main memory is copied to where it is sampled; one on a GPU is sampled there.
        block_chains: chains at work at once, for less memory; None takes as many as are useful and fit. No bit
            depends on it.
        tile_chains: rows that a module which is no plain MLP gets at once; last bits of its chains may depend on it.
            None chooses by ``n_chains`` (`kaleido_fast.planning.blocks.module_tile`) and reports it in
            ``result.request``.
        trace: chains and steps whose states are wanted besides the draws.
        callback: called with `SampleProgress` as the run goes on.
        progress: show a progress bar, on standard error if that is a terminal or below the cell of a notebook.
        dim, data_range: D and (low, high) of a module that is not an MLP, which its outputs must keep; ``z0`` can
            stand in for ``dim``.

    Raises:
        InputError: a value outside of these ranges, a run that does not fit the memory, or answers of a module
            that cannot be iterated.
        SamplingMemoryError: the memory ran out all the same; it says what to pass.
        SamplingInterruptedError: Ctrl-C; it says how many chains were complete.
    """
    given = locals()  # by name; a test holds this signature to the fields of the request
    if isinstance(z0, np.ndarray):
        z0 = torch.from_numpy(z0.copy())
    run = prepare_run(
        model,
        dim=dim,
        data_range=data_range,
        z0=z0,
        device=device,
        block_chains=block_chains,
        **{field.name: given[field.name] for field in fields(SampleRequest)},
    )
    if z0 is not None:
        check_z0(z0, run.request, run.subject)
    if not progress:
        return execute(run, z0=z0, callback=callback)
    from kaleido_fast.system.bars import sampling_bar  # rich takes a while

    with sampling_bar(callback) as bar:
        return execute(run, z0=z0, callback=bar)


@neutral()
def prepare_run(
    model: nn.Module | Checkpoint | str | Path,
    *,
    device: Device | Sequence[Device] = None,
    block_chains: int | None = None,
    dim: int | None = None,
    data_range: tuple[float, float] | None = None,
    z0: Tensor | None = None,
    stored: bool = False,
    **options: Any,
) -> Run:
    """Everything that can be decided, and refused, before a run: see `fast_sample` for the options.

    Args:
        stored: draws are written as they are made, so that not all need to fit the memory.

    Raises:
        InputError: as `fast_sample`.
    """
    refuse_capture(torch.device("cuda"))
    subject = resolve_subject(model, dim=dim, data_range=data_range, z0=z0)
    request = complete_request(options, subject.recommended)
    note = sampler_note(request, subject.recommended) if subject.has_card else ""
    if note:
        warn_caller(note, SamplerWarning)
    first, *others = devices_for(subject.module, device, packable=subject.spec is not None)
    if stored and others:
        raise InputError("draws written as they are made come from one device: start one process a GPU, with torchrun")
    facts = device_facts(first)
    if others:  # what fits the fullest of them fits all
        facts = replace(facts, memory=min(facts.memory, *(device_facts(other).memory for other in others)))
    plan = plan_here(
        request,
        subject.spec,
        facts,
        subject.dim,
        weights=subject.weights_range,
        stored=stored,
        block_chains=block_chains,
        why_general=subject.why_general,
    )
    if subject.spec is None:
        request = replace(request, tile_chains=plan.tile_rows)
    if subject.spec is None and request.engine == "auto":
        warn_caller(
            f"this model runs as it is, by the slower engine 'reference': {subject.why_general}", GeneralModuleWarning
        )
    return Run(subject, request, plan, first, tuple(others))
