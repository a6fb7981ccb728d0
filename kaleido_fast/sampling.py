"""`fast_sample`: request -> plan -> engine -> result, the only place that joins them."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kaleido_fast.checkpoint import load_checkpoint
from kaleido_fast.engines.base import Engine
from kaleido_fast.engines.cpu import CpuEngine
from kaleido_fast.engines.general import ModuleEngine
from kaleido_fast.engines.reference import ReferenceEngine
from kaleido_fast.errors import (
    GeneralModuleWarning,
    InputError,
    SamplingInterruptedError,
    SamplingMemoryError,
    warn_caller,
)
from kaleido_fast.model import KaleidoMLP, ModelSpec, plain_mlp
from kaleido_fast.modules.general import check_data_range, check_dim, check_module
from kaleido_fast.modules.identity import identify
from kaleido_fast.modules.recognition import UnknownModuleError, look_through
from kaleido_fast.names import DEFAULT_CHECK_EVERY, DEFAULT_MAX_PERIOD, DEFAULT_MODEL, DEFAULT_PATIENCE
from kaleido_fast.planning.jitter import fit_to_noise
from kaleido_fast.planning.plan import RECOMMENDABLE, SamplePlan, SampleRequest, Trace, merge_options
from kaleido_fast.planning.spacing import default_thin, recommended_options, refuse_copies
from kaleido_fast.running.mixing import measure_mixing
from kaleido_fast.running.packed import PACKED, PackedModel, layers_of
from kaleido_fast.running.result import (
    ChainArrays,
    SampleResult,
    SampleStats,
    judge,
    outcome_shares,
    quantiles,
    residual_quantiles,
    steps_histogram,
)
from kaleido_fast.running.settling import Phase, run_block
from kaleido_fast.system.devices import (
    Device,
    current_stream,
    device_facts,
    devices_for,
    home_of,
    is_lack_of_memory,
    on_device,
    plan_here,
    refuse_capture,
)
from kaleido_fast.system.neutral import neutral
from kaleido_fast.system.uncompiled import uncompiled
from kaleido_fast.system.versions import library_versions


@dataclass(frozen=True)
class SampleProgress:
    """Handed to ``callback``: how far a run is."""

    chains_done: int
    n_chains: int
    chain_steps_done: int
    chain_steps: int
    seconds: float


Callback = Callable[[SampleProgress], None]


@dataclass(frozen=True)
class Subject:
    """What is sampled: a module with all that the engines need to know of it.

    Args:
        module: the network.
        spec: of an MLP that is understood exactly; None for a module that is run as it is.
        dim, data_range: D and (low, high).
        recommended: options that its checkpoint recommends.
        model_hash: names it in records; "" for a module whose parts cannot all be told.
        packed: its weights as engines keep them, where it has a ``spec``.
        why_general: why it has none.
        untold: why it has no hash.
    """

    module: nn.Module
    spec: ModelSpec | None
    dim: int
    data_range: tuple[float, float]
    recommended: dict[str, Any]
    model_hash: str
    packed: PackedModel | None = None
    why_general: str = ""
    untold: str = ""


@dataclass(frozen=True)
class Run:
    """What is sampled, what is asked for, how and where it is computed; results lie on ``device``, ``others`` help."""

    subject: Subject
    request: SampleRequest
    plan: SamplePlan
    device: torch.device
    others: tuple[torch.device, ...] = ()


@dataclass(frozen=True)
class Block:
    """Chains of a run at their end: ``rows`` are their places in the run (chain id less ``first_chain``)."""

    rows: slice
    chains: ChainArrays
    chain_steps: int


@uncompiled("fast_sample measures time and waits for the device: inside a compiled graph call kaleido_fast.sample_op")
def fast_sample(
    model: nn.Module | str | Path = DEFAULT_MODEL,
    *,
    n_chains: int,
    first_chain: int = 0,
    burn_in: int | None = None,
    n_draws: int = 1,
    thin: int | None = None,
    seed: int | None = 0,
    z0: Tensor | None = None,
    init: str = "uniform",
    noise: str = "normal",
    jitter: float | None = None,
    settle: int | None = None,
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

    One step is ``x <- f(clamp(x + jitter * noise, low, high))``; with ``jitter`` off it is ``x <- f(x)``.
    Chain k of a run has the same bits whatever other chains run beside it (of a module that is no plain MLP: with the
    same ``tile_chains``). Where an option is None, the
    checkpoint's recommendation holds, else the default in brackets.

    Args:
        model: a `KaleidoMLP`; an ``nn.Sequential`` of Linear layers, one kind of activation and a final Tanh or
            Sigmoid; any module that maps (n, D) to (n, D), each row for itself (reference engine only; run as in
            evaluation, and left as it is); a checkpoint's path, or the name of a bundled model.
        n_chains: number of chains.
        first_chain: absolute id of the first: ids, not positions, select the noise.
        burn_in: steps before the first draw's own (299).
        n_draws: draws kept per chain.
        thin: steps per draw (1). Several draws of a jittered chain: as many as were measured to mix, else ``settle`` +
            64; ``thin`` up to ``settle`` is refused there, as it leaves no jittered step between draws.
        seed: 0 .. 2**64 - 1; None draws one, reported in ``result.request.seed``.
        z0: (n_chains, D) start states instead of start noise, inside the data range: a tensor or an array.
        init: start noise, "uniform" over the data range or "normal" clipped to it.
        noise: "normal" or "uniform" jitter; or "upstream", the published sampler's formula: ``x <- clamp(f(x) +
            jitter * e, low, high)`` with e uniform on [high, 2 high - low), after every step, also the last one.
        jitter: scale of the noise in units of half the data range (0); of "upstream" the published eps (0.01).
        settle: last steps before each draw that stay free of jitter (2); "upstream" has none.
        tol: residual below which a chain is frozen and run no further (1e-4): its later draws are its frozen state.
            On a network that contracts by rho a step its states are then within tol * rho / (1 - rho) of their
            limit. None runs every step; with jitter chains are never frozen.
        patience: checks in a row below ``tol`` before a chain is frozen.
        check_every: steps between checks.
        max_period: longest cycle looked for among chains that do not settle, found for certain in runs of four times as
            many steps; 1 looks for none.
        retire_cycles: run a chain found in a cycle no further; its later draws walk the cycle.
        precision: "fp32", "fp64" (reference only), "tf32", "fp16", "bf16".
        polish: with "tf32", "fp16" or "bf16", the last steps before the first draw, and all after it, run in fp32.
        engine: "auto", "triton", "cpu", "reference"; one asked for by name runs or raises.
        kernel: of engine "triton": "narrow", "stream", "wide" or "graph"; "auto" takes the one measured best on this
            GPU, else the first that fits. One asked for by name runs or raises.
        device: "cpu", "cuda" (the current one), "cuda:1"; None takes the model's own GPU, else the current one if there
            is one. A list of GPUs of one kind shares the chains out, with the bits of one of them; results lie on the
            first. A model in main memory is copied to where it is sampled; one on a GPU is sampled there.
        block_chains: chains at work at once, for less memory; None takes as many as are useful and fit. No bit
            depends on it.
        tile_chains: rows that a module which is no plain MLP gets at once; last bits of its chains may depend on it.
            None chooses by ``n_chains`` (`kaleido_fast.planning.plan.module_tile`) and reports it in
            ``result.request``.
        trace: chains and steps whose states are wanted besides the draws.
        callback: called with `SampleProgress` as the run goes on.
        progress: show a progress bar, on standard error if that is a terminal or below the cell of a notebook.
        dim, data_range: D and (low, high) of a module that is not an MLP, which its outputs must keep; ``z0`` can
            stand in for ``dim``.

    Raises:
        InputError: a value outside of what is said here, a run that does not fit the memory, or answers of a module
            that cannot be iterated.
        SamplingMemoryError: the memory ran out all the same; it says what to pass.
        SamplingInterruptedError: Ctrl-C; it says how many chains were complete.
    """
    if isinstance(z0, np.ndarray):
        z0 = torch.from_numpy(z0.copy())
    run = prepare_run(
        model,
        dim=dim,
        data_range=data_range,
        z0=z0,
        device=device,
        block_chains=block_chains,
        n_chains=n_chains,
        first_chain=first_chain,
        burn_in=burn_in,
        n_draws=n_draws,
        thin=thin,
        seed=seed,
        init=init,
        noise=noise,
        jitter=jitter,
        settle=settle,
        tol=tol,
        patience=patience,
        check_every=check_every,
        max_period=max_period,
        retire_cycles=retire_cycles,
        precision=precision,
        polish=polish,
        engine=engine,
        kernel=kernel,
        tile_chains=tile_chains,
        trace=trace,
    )
    if z0 is not None:
        _check_z0(z0, run.request, run.subject)
    if not progress:
        return execute(run, z0=z0, callback=callback)
    from kaleido_fast.progress import sampling_bar

    with sampling_bar(callback) as bar:
        return execute(run, z0=z0, callback=bar)


@neutral()
def prepare_run(
    model: nn.Module | str | Path,
    *,
    device: Device | Sequence[Device] = None,
    block_chains: int | None = None,
    dim: int | None = None,
    data_range: tuple[float, float] | None = None,
    z0: Tensor | None = None,
    streamed: bool = False,
    **options: Any,
) -> Run:
    """Everything that can be settled, and refused, before a run: see `fast_sample` for the options.

    Args:
        streamed: draws are written as they are made, so that not all need to fit the memory.

    Raises:
        InputError: as `fast_sample`.
    """
    refuse_capture(torch.device("cuda"))
    subject = resolve_subject(model, dim=dim, data_range=data_range, z0=z0)
    names = (*RECOMMENDABLE, "seed")
    explicit = {name: options[name] for name in RECOMMENDABLE if name != "tol" and options.get(name) is not None}
    if options.get("tol", "recommended") != "recommended":
        explicit["tol"] = options["tol"]
    merged = fit_to_noise(merge_options(explicit, subject.recommended), explicit, options.get("noise", "normal"))
    merged = _without_tol_where_jittered(merged, explicit)
    if "thin" not in explicit:
        known = {**subject.recommended, **merged}
        merged["thin"] = default_thin(known, options.get("n_draws", 1), options.get("noise", "normal"))
    seed = options.get("seed", 0)
    request = SampleRequest(
        seed=secrets.randbits(64) if seed is None else seed,
        **merged,
        **{name: value for name, value in options.items() if name not in names},
    )
    refuse_copies(request.n_draws, request.thin, request.settle, request.jitter, request.noise)
    first, *others = devices_for(subject.module, device, packable=subject.spec is not None)
    if streamed and others:
        raise InputError("draws written as they are made come from one device: start one process a GPU, with torchrun")
    facts = device_facts(first)
    if others:  # what fits the fullest of them fits all
        facts = replace(facts, memory=min(facts.memory, *(device_facts(other).memory for other in others)))
    plan = plan_here(
        request,
        subject.spec,
        facts,
        subject.dim,
        streamed=streamed,
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


def _without_tol_where_jittered(options: dict[str, Any], explicit: dict[str, Any]) -> dict[str, Any]:
    """A jittered chain never arrives: a default tolerance does not apply there, one that was passed is refused."""
    if not options.get("jitter"):
        return options
    refuse_tol_with_jitter(explicit.get("tol"), options["jitter"])
    return {**options, "tol": None}


def refuse_tol_with_jitter(tol: float | None, jitter: float) -> None:
    """Refuse a tolerance that was passed for jittered chains: `InputError`."""
    if tol is not None and jitter:
        raise InputError(
            f"tol {tol} with jitter {jitter}: a jittered chain never settles, so none can be "
            "frozen; pass jitter=0, or leave tol out (trace shows how chains move)"
        )


def resolve_subject(
    model: nn.Module | str | Path,
    *,
    dim: int | None = None,
    data_range: tuple[float, float] | None = None,
    z0: Tensor | None = None,
) -> Subject:
    """Find out what ``model`` is; see `fast_sample` for what it may be."""
    dim = None if dim is None else check_dim(dim)
    data_range = None if data_range is None else check_data_range(data_range)
    if isinstance(model, (str, Path)):
        checkpoint = load_checkpoint(model)
        card = checkpoint.card
        subject = _mlp_subject(checkpoint.model, recommended_options(card.sampling, card.diagnostics))
    elif not isinstance(model, nn.Module):
        raise InputError(
            f"model is a {type(model).__name__}: give a module, a checkpoint's path or a bundled model's name"
        )
    else:
        try:
            mlp = plain_mlp(model, data_range=data_range)
        except InputError as problem:
            reason = problem.reason if isinstance(problem, UnknownModuleError) else str(problem)
            return _general_subject(model, dim, data_range, z0, reason)
        subject = _mlp_subject(mlp, {})
    return _agreed(subject, dim, data_range)


def _agreed(subject: Subject, dim: int | None, data_range: tuple[float, float] | None) -> Subject:
    """The subject, if it is of the size and range that the caller named."""
    if dim not in (None, subject.dim):
        raise InputError(f"dim is {dim}, the model has {subject.dim}: leave dim out, the model says it")
    if data_range not in (None, subject.data_range):
        raise InputError(f"data_range is {data_range}, the model's is {subject.data_range}: leave it out")
    return subject


def _general_subject(
    model: nn.Module, dim: int | None, data_range: tuple[float, float] | None, z0: Tensor | None, reason: str
) -> Subject:
    """A module that is run as it is, and why it must be; a `KaleidoMLP` that was changed still knows its size."""
    inner = look_through(model)
    if isinstance(inner, KaleidoMLP):
        own_range = (inner.spec.low, inner.spec.high)
        return _agreed(_as_it_is(model, inner.spec.dim, own_range, reason), dim, data_range)
    if dim is None and isinstance(z0, Tensor) and z0.ndim == 2:
        dim = z0.shape[1]
    if dim is None or data_range is None:
        raise InputError(
            f"{reason}: it can only run as it is, and does not say its size and range: pass dim= and "
            "data_range=(low, high)"
        )
    return _as_it_is(model, dim, data_range, reason)


def _as_it_is(model: nn.Module, dim: int, data_range: tuple[float, float], reason: str) -> Subject:
    check_module(model)
    identity = identify(model)
    return Subject(model, None, dim, data_range, {}, identity.digest, why_general=reason, untold=identity.untold)


def _mlp_subject(model: KaleidoMLP, recommended: dict[str, Any]) -> Subject:
    spec = model.spec
    home_of(model)
    packed = PACKED.take(spec, *layers_of(model), may_wait=True)
    return Subject(model, spec, spec.dim, (spec.low, spec.high), recommended, packed.model_hash, packed)


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


def compute_chains(run: Run, phases: list[Phase], meter: Meter, z0: Tensor | None) -> tuple[ChainArrays, int]:
    """All chains of a run and the chain-steps that they took; waits for no GPU unless chains are frozen."""
    n = run.request.n_chains
    whole = ChainArrays.empty(n, run.request, run.subject.dim, run.device)
    if run.others:
        from kaleido_fast.running.sharing import run_shared

        return whole, run_shared(run, phases, meter, whole, z0)
    with on_device(run.device):
        blocks = run_blocks(run, phases, split(n, run.plan.block_chains), meter, whole=whole, z0=z0)
        return whole, sum(block.chain_steps for block in blocks)


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
    stats = SampleStats(
        n_chains=n,
        n_steps=request.schedule.n_steps,
        chain_steps=chain_steps,
        seconds=meter.seconds(),
        setup_seconds=meter.began - began,
        compile_seconds=sum(getattr(phase.engine, "compile_seconds", 0.0) for phase in phases),
        residual_quantiles=residual_quantiles(whole.residual),
        outcome_shares=outcome_shares(whole.outcome),
        steps_quantiles=quantiles(whole.steps.to(torch.float32)),
        steps_histogram=steps_histogram(whole.steps, whole.outcome) if request.freezes else {},
        mixing=measure_mixing(whole.draws),
        engine=plan.engine,
        device=", ".join(map(str, (device, *run.others))),
        precision=request.precision,
        versions=library_versions(),
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


def split(n_chains: int, size: int) -> Iterator[slice]:
    """0 .. n_chains in slices of ``size``, the last one shorter."""
    return (slice(first, min(first + size, n_chains)) for first in range(0, n_chains, size))


def run_blocks(
    run: Run,
    phases: list[Phase],
    spans: Iterable[slice],
    meter: Meter,
    *,
    whole: ChainArrays | None = None,
    z0: Tensor | None = None,
) -> Iterator[Block]:
    """Compute chains span by span, each as one `Block` when it is done; any split gives the same bits.

    Args:
        run: what to compute.
        phases: its engines, see `build_phases`.
        spans: places of chains in the run, taken one at a time, so that somebody else may take others.
        meter: counts progress.
        whole: arrays of the whole run to be filled, of which the blocks are views; None makes new ones for each span.
        z0: (n_chains, D) start states of the whole run, None for start noise.
    """
    request, device = run.request, run.device
    for span in spans:
        made = (
            ChainArrays.empty(span.stop - span.start, request, run.subject.dim, device)
            if whole is None
            else whole[span]
        )
        chain_steps = 0
        for part in split(span.stop - span.start, run.plan.block_chains):
            chains = made[part]
            first = span.start + part.start
            ids = torch.arange(first, first + len(chains), device=device) + request.first_chain
            start = None if z0 is None else z0[first : first + len(chains)].to(device)
            end = run_block(phases, request, ids, start, chains.draws, meter.add)
            chains.residual[:], chains.steps[:] = end.residual, end.steps
            chains.outcome[:], chains.period[:] = judge(chains.draws[:, -1], end.residual, end.period, request.tol)
            chain_steps += end.chain_steps
            meter.finish(len(chains))
        yield Block(span, made, chain_steps)


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


def _trace(
    phases: list[Phase], request: SampleRequest, trace: Trace, z0: Tensor | None, device: torch.device
) -> Tensor:
    """States of chosen chains at chosen steps: a run of just these chains, which have the same bits alone."""
    chains = torch.tensor(trace.chains, dtype=torch.int64, device=device)
    state = None if z0 is None else z0[chains - request.first_chain]
    wanted = sorted({0, *trace.steps, *(phase.first for phase in phases)})
    states: dict[int, Tensor] = {0: phases[0].engine.start(chains) if state is None else state}
    for first, last in itertools.pairwise(wanted):
        phase = next(phase for phase in phases if phase.first <= first < phase.last)
        before = states[first] if first > 0 else state  # the engine makes its own start noise
        states[last] = phase.engine.advance(chains, before, first, last, None, lambda _: None).state
    return torch.stack([states[step] for step in trace.steps], dim=1)


def check_z0_form(z0: Tensor, request: SampleRequest, dim: int) -> None:
    """Refuse start states of another type or shape; their values are not looked at."""
    if not isinstance(z0, Tensor) or not z0.is_floating_point():
        kind = z0.dtype if isinstance(z0, Tensor) else type(z0).__name__
        raise InputError(f"z0 is {kind}: give a floating-point torch tensor")
    if tuple(z0.shape) != (request.n_chains, dim):
        raise InputError(f"z0 has shape {tuple(z0.shape)}: (n_chains, dim) = ({request.n_chains}, {dim}) is needed")


def _check_z0(z0: Tensor, request: SampleRequest, subject: Subject) -> None:
    check_z0_form(z0, request, subject.dim)
    if not bool(torch.isfinite(z0).all()):
        raise InputError("z0 holds NaN or infinite values: every start state must be finite")
    low, high = subject.data_range
    if bool((z0 < low).any()) or bool((z0 > high).any()):
        raise InputError(f"z0 reaches from {float(z0.min()):g} to {float(z0.max()):g}: clamp it to [{low:g}, {high:g}]")


class Meter:
    """Counts chain-steps and tells the callback, at most ten times a second."""

    def __init__(self, n_chains: int, n_steps: int, callback: Callback | None, chains_done: int = 0) -> None:
        self.n_chains, self.n_steps, self.callback = n_chains, n_steps, callback
        self.total = n_chains * n_steps
        self.chains_done = chains_done
        self.done = chains_done * n_steps
        self.began = self.told = time.perf_counter()

    def add(self, chain_steps: int) -> None:
        self.done += chain_steps
        now = time.perf_counter()
        if self.callback is not None and (now - self.told > 0.1 or self.done >= self.total):
            self.told = now
            self.callback(SampleProgress(self.chains_done, self.n_chains, self.done, self.total, now - self.began))

    def finish(self, chains: int) -> None:
        """Count this many more chains as done, steps that they were spared included."""
        self.chains_done += chains
        self.add(self.chains_done * self.n_steps - self.done)

    def seconds(self) -> float:
        return time.perf_counter() - self.began
