"""`sample_op`: sampling as one operator of torch, for programs that are compiled, exported, or must not wait for a GPU.

The operator ``torch.ops.kaleido_fast.sample`` takes weights, two texts and three numbers and returns tensors.
`torch.compile` and `torch.export` see one call; its answers are those of `kaleido_fast.fast_sample`, bit for bit. No
gradient goes through it.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from kaleido_fast.engines.available import plan_here
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP, ModelSpec, plain_mlp
from kaleido_fast.modules.linear_layers import check_weights
from kaleido_fast.modules.wrappers import look_through
from kaleido_fast.names import (
    DEFAULT_BURN_IN,
    DEFAULT_CHECK_EVERY,
    DEFAULT_JITTER,
    DEFAULT_MAX_PERIOD,
    DEFAULT_NOISE_FROM,
    DEFAULT_NOISE_TO,
    DEFAULT_PATIENCE,
    DEFAULT_SETTLE,
    DEFAULT_STEPS,
)
from kaleido_fast.planning.merging import refuse_tol_with_jitter
from kaleido_fast.planning.options import ADDED_LATER, OPTIONS
from kaleido_fast.planning.request import SampleRequest, foreign_option
from kaleido_fast.planning.spacing import default_thin, refuse_copies
from kaleido_fast.progress import Meter
from kaleido_fast.running.blocks import Run
from kaleido_fast.running.engine import build_phases
from kaleido_fast.running.execution import compute_chains, memory_advice
from kaleido_fast.running.packed import PACKED
from kaleido_fast.running.subject import Subject, check_z0_form
from kaleido_fast.scalars import json_number, plain_number, refuse_truth_values
from kaleido_fast.system.devices import device_facts, refuse_capture
from kaleido_fast.system.memory import is_lack_of_memory
from kaleido_fast.system.neutral import neutral

NUMBERS = ("n_chains", "first_chain", "seed")
"""Options that are numbers of the operator: compilers may leave them open."""
TEXT_OPTIONS = (*(name for name in OPTIONS if name not in (*NUMBERS, "tile_chains")), "block_chains")
"""All others: constants of a compiled program, one JSON object."""
SPEC_FIELDS = tuple(field.name for field in fields(ModelSpec))
ENCODER = json.JSONEncoder(default=json_number)


class SampledChains(NamedTuple):
    """What `sample_op` returns, on the device of the model; see `kaleido_fast.SampleResult`.

    Args:
        draws: (n_chains, n_draws, D) in fp32 (fp64 with that precision).
        residual: (n_chains,) fp32.
        steps, period: (n_chains,) int32.
        outcome: (n_chains,) int8 of `kaleido_fast.Outcome`.
    """

    draws: Tensor
    residual: Tensor
    steps: Tensor
    period: Tensor
    outcome: Tensor

    @property
    def final(self) -> Tensor:
        """(n_chains, D) last states, which are the last draws."""
        return self.draws[:, -1]


def sample_op(
    model: KaleidoMLP,
    *,
    n_chains: int | None = None,
    first_chain: int = 0,
    sampler: str = "kaleidoscope",
    burn_in: int = DEFAULT_BURN_IN,
    n_draws: int = 1,
    thin: int | None = None,
    seed: int = 0,
    z0: Tensor | None = None,
    init: str = "uniform",
    noise: str = "normal",
    jitter: float = DEFAULT_JITTER,
    settle: int = DEFAULT_SETTLE,
    steps: int = DEFAULT_STEPS,
    noise_from: float = DEFAULT_NOISE_FROM,
    noise_to: float = DEFAULT_NOISE_TO,
    tol: float | None = None,
    patience: int = DEFAULT_PATIENCE,
    check_every: int = DEFAULT_CHECK_EVERY,
    max_period: int = DEFAULT_MAX_PERIOD,
    retire_cycles: bool = False,
    precision: str = "fp32",
    polish: int = 0,
    engine: str = "auto",
    kernel: str = "auto",
    block_chains: int | None = None,
) -> SampledChains:
    """Sample a network on the device that holds it, as one operator on the caller's current stream.

    Options are those of `kaleido_fast.fast_sample`; what a checkpoint recommends is not asked for. On a GPU nothing is
    copied to the host and nothing waits, but for the first call on new weights, which packs them, and for ``tol``,
    which must look at residuals as it goes.

    Args:
        model: a `KaleidoMLP` (`KaleidoMLP.from_sequential` makes one of a plain Sequential, once). One with forward
            hooks or changed layers is refused; parametrised and normed layers are taken with the weights in force,
            but not inside of a compiled program, which also does not see hooks that are added after it was compiled.
        n_chains: number of chains; None for as many as ``z0`` has.
        z0: (n_chains, D) start states on the model's device, of any floating type and layout. Their values are not
            looked at: keep them inside the data range (of the sampler "flow": finite).
        sampler: "kaleidoscope" or "flow".
        steps, noise_from, noise_to: of the sampler "flow".
        settle: as in `fast_sample`, but not used with noise "upstream", which comes after every step.
        tol: None runs every step; a number freezes chains that have arrived, and does not go with jitter.

    Raises:
        InputError: a value outside of these ranges, or a call inside the capture of a CUDA graph.
        SamplingMemoryError: the memory ran out; it says what to pass.
    """
    model = _weights_known(model)
    if z0 is not None and not isinstance(z0, Tensor):
        raise InputError(
            f"z0 is a {type(z0).__name__}: give a tensor on the model's device, such as by torch.from_numpy"
        )
    if n_chains is None:
        if z0 is None:
            raise InputError("sample_op without n_chains and z0: pass one of them")
        n_chains = z0.shape[0]
    if sampler == "flow":
        _refuse_of_flow(thin=thin, tol=tol)
    if thin is None:
        thin = default_thin({"jitter": jitter, "settle": settle}, n_draws, noise)
    given = {  # not by `locals()`, which torch 2.11's compiler cannot trace
        "sampler": sampler,
        "burn_in": burn_in,
        "n_draws": n_draws,
        "thin": thin,
        "init": init,
        "noise": noise,
        "jitter": jitter,
        "settle": settle,
        "steps": steps,
        "noise_from": noise_from,
        "noise_to": noise_to,
        "tol": tol,
        "patience": patience,
        "check_every": check_every,
        "max_period": max_period,
        "retire_cycles": retire_cycles,
        "precision": precision,
        "polish": polish,
        "engine": engine,
        "kernel": kernel,
        "block_chains": block_chains,
    }
    return _call(model, z0, given, n_chains, first_chain, seed)


def _refuse_of_flow(**given: object) -> None:
    """Refuse options that a flow does not have and that are None where they are left out: `InputError`."""
    for name, value in given.items():
        if value is not None:
            raise foreign_option(name, value, "flow")


def _call(
    model: KaleidoMLP, z0: Tensor | None, given: Mapping[str, Any], n_chains: int, first_chain: int, seed: int
) -> SampledChains:
    """Call the operator: options and specification as texts, and the seed as a signed number."""
    compiling = torch.compiler.is_compiling()
    if not compiling:  # torch takes numpy's numbers for all others, and truth values too; compilers have their own
        refuse_truth_values(n_chains=n_chains, first_chain=first_chain, seed=seed)
        seed = plain_number(seed)
    if not 0 <= seed < 2**64:
        raise InputError(f"seed is {seed}: it must be a whole number from 0 to 2**64 - 1")
    layers = list(model.layers)
    # Compilers find by themselves that there is no gradient; elsewhere torch's bookkeeping for it would take time.
    with contextlib.nullcontext() if compiling else torch.no_grad():
        outputs = sample(
            [layer.weight for layer in layers],
            [layer.bias for layer in layers],
            z0,
            _traced_spec_text(model.spec) if compiling else _spec_text(model.spec),
            _text(TEXT_OPTIONS, *[_constant(given[name]) if compiling else given[name] for name in TEXT_OPTIONS]),
            n_chains,
            first_chain,
            seed if seed < 2**63 else seed - 2**64,
        )
    return SampledChains(*outputs)


def _text(names: tuple[str, ...], *values: Any) -> str:
    return ENCODER.encode(dict(zip(names, values, strict=True)))


# Compilers call it while they trace, as they do `KaleidoMLP._why_not_plain`.
_text._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache
def _spec_text(spec: ModelSpec) -> str:
    return spec.to_json()


def _traced_spec_text(spec: ModelSpec) -> str:
    """The same from the values of its fields: of what it reads here a compiler notices the change."""
    return _text(SPEC_FIELDS, *[_constant(getattr(spec, name)) for name in SPEC_FIELDS])


def _constant(value: Any) -> Any:
    """A value that a compiler may hold as a symbol, made a constant of the program: it is compiled for each value."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # loads the compiler

    if isinstance(value, tuple):
        return tuple(guard_scalar(entry) for entry in value)
    return guard_scalar(value) if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) else value


def _weights_known(model: nn.Module) -> KaleidoMLP:
    """The network as a `KaleidoMLP` that its weights describe in full; while compiling it must be one already."""
    compiling = torch.compiler.is_compiling()
    inner = model if compiling else look_through(model)
    if not isinstance(inner, KaleidoMLP):
        raise InputError(
            f"sample_op takes a KaleidoMLP, not a {type(model).__name__}: make one with KaleidoMLP.from_sequential, "
            "or call fast_sample"
        )
    if not compiling:
        return plain_mlp(inner)
    id(inner)  # a compiler then compiles for this very object, which is what the answer holds for
    why = inner._why_not_plain()
    if why:
        raise InputError(f"sample_op inside a compiled program takes a plain KaleidoMLP: {why}")
    return inner


def _sample(
    weights: Sequence[Tensor],
    biases: Sequence[Optional[Tensor]],  # noqa: UP045
    z0: Optional[Tensor],  # noqa: UP045
    spec: str,
    options: str,
    n_chains: int,
    first_chain: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator: (draws, residual, steps, period, outcome) as in `SampledChains`.

    Args:
        weights, biases: (out, in) and (out,) or None a layer, on one device, of any floating type.
        z0: start states as in `sample_op`, or None.
        spec: `kaleido_fast.ModelSpec.to_json` of the network.
        options: a JSON object of the options named in `TEXT_OPTIONS`, all of them, as in `sample_op`.
        n_chains, first_chain: as in `sample_op`.
        seed: as a signed number of 64 bits, whose bits are the seed.
    """
    given = _read_options(options)
    chosen = {name: value for name, value in given.items() if name != "block_chains"}
    request = SampleRequest(n_chains=n_chains, first_chain=first_chain, seed=seed % 2**64, **chosen)
    return _sample_chains(request, _read_spec(spec), weights, biases, z0, given["block_chains"])


_read_spec = functools.lru_cache(ModelSpec.from_json)


@functools.lru_cache
def _read_options(text: str) -> Mapping[str, Any]:
    given = json.loads(text)
    if not isinstance(given, dict) or (ADDED_LATER | given).keys() != set(TEXT_OPTIONS):
        raise InputError(f"the operator's options are {text}: give a JSON object of {', '.join(TEXT_OPTIONS)}")
    return ADDED_LATER | given


@neutral()
def _sample_chains(
    request: SampleRequest,
    spec: ModelSpec,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    z0: Tensor | None,
    block_chains: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    device = weights[0].device
    refuse_capture(device)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_weights(f"layer {i}", weight, bias)
    _check_layers(spec, weights, biases)
    refuse_tol_with_jitter(request.tol, request.jitter)
    refuse_copies(request.n_draws, request.thin, request.settle, request.jitter, request.noise)
    if z0 is not None:
        check_z0_form(z0, request, spec.dim)
        if z0.device != device:
            raise InputError(f"z0 is on {z0.device}, the model on {device}: move one of them")
        z0 = z0.detach().to(torch.float64 if request.precision == "fp64" else torch.float32)
    packed = PACKED.take(spec, weights, biases, may_wait=False)
    subject = Subject(packed.module, spec, spec.dim, (spec.low, spec.high), {}, "", packed)
    plan = plan_here(
        request, spec, device_facts(device), spec.dim, weights=packed.weights_range, block_chains=block_chains
    )
    run = Run(subject, request, plan, device)
    try:
        meter = Meter(request.n_chains, request.schedule.n_steps, None)
        chains, _ = compute_chains(run, build_phases(subject, request, plan, device), meter, z0)
        return chains.draws, chains.residual, chains.steps, chains.period, chains.outcome
    except (RuntimeError, MemoryError) as problem:
        if not is_lack_of_memory(problem):
            raise
    del z0
    raise memory_advice(run)  # see `kaleido_fast.running.execution.execute`


def _check_layers(spec: ModelSpec, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    """Refuse weights that are not those of the specification: `InputError`."""
    if len(weights) != spec.n_layers:
        raise InputError(f"{len(weights)} layers of weights, but the specification has {spec.n_layers}")
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        n_out, n_in = weight.shape
        if n_in != spec.widths[i]:
            raise InputError(f"layer {i} takes {n_in} values but gets {spec.widths[i]}")
        if n_out != spec.widths[i + 1] or (bias is not None) != spec.bias[i]:
            raise InputError(
                f"layer {i} gives {n_out} values {'without' if bias is None else 'with'} a bias: its specification has "
                f"{spec.widths[i + 1]} {'with' if spec.bias[i] else 'without'} one"
            )


# Left out of CUDA graphs: how many steps are run, and which weights are packed, is decided on the host.
sample = torch.library.custom_op(
    "kaleido_fast::sample", _sample, mutates_args=(), device_types=("cpu", "cuda"), tags=(torch.Tag.cudagraph_unsafe,)
)


@sample.register_fake
def _(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    z0: Tensor | None,
    spec: str,
    options: str,
    n_chains: int,
    first_chain: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given, like = _read_options(options), weights[0]
    draws = torch.float64 if given["precision"] == "fp64" else torch.float32
    return (
        like.new_empty(n_chains, given["n_draws"], like.shape[1], dtype=draws),
        like.new_empty(n_chains, dtype=torch.float32),
        like.new_empty(n_chains, dtype=torch.int32),
        like.new_empty(n_chains, dtype=torch.int32),
        like.new_empty(n_chains, dtype=torch.int8),
    )


def _no_gradient(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output)


def _backward(ctx: Any, *gradients: Tensor) -> Any:
    raise RuntimeError("kaleido_fast::sample has no gradient")


sample.register_autograd(_backward, setup_context=_no_gradient)
