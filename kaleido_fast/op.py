"""`sample_op`: sampling as one operator of torch, for programs that are compiled, exported, or must not wait for a GPU.

The operator ``torch.ops.kaleido_fast.sample`` takes weights, numbers and names and gives tensors. `torch.compile` and
`torch.export` see one call; its answers are those of `kaleido_fast.fast_sample`, bit for bit. No gradient goes through
it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from kaleido_fast.engines.available import plan_here
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP, ModelSpec, plain_mlp, why_not_plain
from kaleido_fast.modules.linear_layers import check_weights
from kaleido_fast.modules.wrappers import look_through
from kaleido_fast.names import (
    DEFAULT_BURN_IN,
    DEFAULT_CHECK_EVERY,
    DEFAULT_JITTER,
    DEFAULT_MAX_PERIOD,
    DEFAULT_PATIENCE,
    DEFAULT_SETTLE,
)
from kaleido_fast.planning.merging import refuse_tol_with_jitter
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.planning.spacing import default_thin, refuse_copies
from kaleido_fast.progress import Meter
from kaleido_fast.running.blocks import Run
from kaleido_fast.running.engine import build_phases
from kaleido_fast.running.execution import compute_chains, memory_advice
from kaleido_fast.running.packed import PACKED
from kaleido_fast.running.subject import Subject, check_z0_form
from kaleido_fast.scalars import plain_number, refuse_truth_values
from kaleido_fast.system.devices import device_facts, refuse_capture
from kaleido_fast.system.memory import is_lack_of_memory
from kaleido_fast.system.neutral import neutral


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
    burn_in: int = DEFAULT_BURN_IN,
    n_draws: int = 1,
    thin: int | None = None,
    seed: int = 0,
    z0: Tensor | None = None,
    init: str = "uniform",
    noise: str = "normal",
    jitter: float = DEFAULT_JITTER,
    settle: int = DEFAULT_SETTLE,
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
            looked at: keep them inside the data range.
        settle: as there, but not used with noise "upstream", which comes after every step.
        tol: None runs every step; a number freezes chains that have arrived, and does not go with jitter.

    Raises:
        InputError: a value outside of what is said, or a call inside the capture of a CUDA graph.
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
    if thin is None:
        thin = default_thin({"jitter": jitter, "settle": settle}, n_draws, noise)
    if not torch.compiler.is_compiling():  # compilers have numbers of their own
        seed, jitter = plain_number(seed), plain_number(jitter)  # torch takes numpy's numbers for all others,
        refuse_truth_values(  # and truth values too
            n_chains=n_chains,
            first_chain=first_chain,
            burn_in=burn_in,
            n_draws=n_draws,
            thin=thin,
            seed=seed,
            jitter=jitter,
            settle=settle,
            tol=tol,
            patience=patience,
            check_every=check_every,
            max_period=max_period,
            polish=polish,
            block_chains=block_chains,
        )
    if not 0 <= seed < 2**64:
        raise InputError(f"seed is {seed}: it must be a whole number from 0 to 2**64 - 1")
    spec = model.spec
    layers = list(model.layers)
    # Compilers find by themselves that there is no gradient; elsewhere torch's bookkeeping for it would take time.
    with contextlib.nullcontext() if torch.compiler.is_compiling() else torch.no_grad():
        outputs = sample(
            [layer.weight for layer in layers],
            [layer.bias for layer in layers],
            z0,
            spec.activation,
            spec.negative_slope,
            spec.bound,
            spec.low,
            spec.high,
            n_chains,
            first_chain,
            burn_in,
            n_draws,
            thin,
            seed if seed < 2**63 else seed - 2**64,
            init,
            noise,
            float(jitter),
            settle,
            tol,
            patience,
            check_every,
            max_period,
            retire_cycles,
            precision,
            polish,
            engine,
            kernel,
            block_chains,
        )
    return SampledChains(*outputs)


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
    why = why_not_plain(inner)
    if why:
        raise InputError(f"sample_op inside a compiled program takes a plain KaleidoMLP: {why}")
    return inner


def _sample(
    weights: Sequence[Tensor],
    biases: Sequence[Optional[Tensor]],  # noqa: UP045
    z0: Optional[Tensor],  # noqa: UP045
    activation: str,
    negative_slope: float,
    bound: str,
    low: float,
    high: float,
    n_chains: int,
    first_chain: int,
    burn_in: int,
    n_draws: int,
    thin: int,
    seed: int,
    init: str,
    noise: str,
    jitter: float,
    settle: int,
    tol: Optional[float],  # noqa: UP045
    patience: int,
    check_every: int,
    max_period: int,
    retire_cycles: bool,
    precision: str,
    polish: int,
    engine: str,
    kernel: str,
    block_chains: Optional[int],  # noqa: UP045
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator: (draws, residual, steps, period, outcome) as in `SampledChains`.

    Args:
        weights, biases: (out, in) and (out,) or None a layer, on one device, of any floating type.
        activation, negative_slope, bound, low, high: see `kaleido_fast.ModelSpec`.
        seed: as a signed number of 64 bits, whose bits are the seed.

    The others are as in `sample_op`.
    """
    request = SampleRequest(
        n_chains=n_chains,
        first_chain=first_chain,
        burn_in=burn_in,
        n_draws=n_draws,
        thin=thin,
        seed=seed % 2**64,
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
    )
    spec = ModelSpec(
        widths=(weights[0].shape[1], *(len(weight) for weight in weights)),
        activation=activation,
        bound=bound,
        low=low,
        high=high,
        bias=tuple(bias is not None for bias in biases),
        negative_slope=negative_slope,
    )
    return _sample_chains(request, spec, weights, biases, z0, block_chains)


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
        if weight.shape[1] != spec.widths[i]:
            raise InputError(f"layer {i} takes {weight.shape[1]} values but gets {spec.widths[i]}")
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


# Left out of CUDA graphs: how many steps are run, and which weights are packed, is decided on the host.
sample = torch.library.custom_op(
    "kaleido_fast::sample", _sample, mutates_args=(), device_types=("cpu", "cuda"), tags=(torch.Tag.cudagraph_unsafe,)
)
_SIGNATURE = inspect.signature(_sample)


@sample.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = _SIGNATURE.bind(*arguments).arguments
    like, n = given["weights"][0], given["n_chains"]
    draws = torch.float64 if given["precision"] == "fp64" else torch.float32
    return (
        like.new_empty(n, given["n_draws"], like.shape[1], dtype=draws),
        like.new_empty(n, dtype=torch.float32),
        like.new_empty(n, dtype=torch.int32),
        like.new_empty(n, dtype=torch.int32),
        like.new_empty(n, dtype=torch.int8),
    )


def _no_gradient(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output)


def _backward(ctx: Any, *gradients: Tensor) -> Any:
    raise RuntimeError("kaleido_fast::sample has no gradient")


sample.register_autograd(_backward, setup_context=_no_gradient)
