"""What is sampled: from whatever a caller gives to a module, its size and its packed weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kaleido_fast.checkpoint import Checkpoint, load_checkpoint
from kaleido_fast.errors import (
    InputError,
)
from kaleido_fast.model import KaleidoMLP, ModelSpec, plain_mlp
from kaleido_fast.modules.exactness import UnknownModuleError
from kaleido_fast.modules.general import check_data_range, check_dim, check_module
from kaleido_fast.modules.identity import identify
from kaleido_fast.modules.wrappers import look_through
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.planning.spacing import recommended_options
from kaleido_fast.running.packed import PACKED, PackedModel, layers_of
from kaleido_fast.system.devices import (
    home_of,
)
from kaleido_kernels.precision import USUAL, WeightsRange


@dataclass(frozen=True)
class Subject:
    """What is sampled: a module with all that the engines need to know of it.

    Args:
        module: the network.
        spec: of an MLP that is understood exactly; None for a module that is run as it is.
        dim, data_range: D and (low, high).
        recommended: options that its checkpoint recommends.
        model_hash: names it in records; "" for a module of which some part cannot be identified.
        packed: its weights as engines keep them, where it has a ``spec``.
        why_general: why it has none.
        unidentified: why it has no hash.
        has_card: whether it comes with a card, which may recommend a sampler.
    """

    module: nn.Module
    spec: ModelSpec | None
    dim: int
    data_range: tuple[float, float]
    recommended: dict[str, Any]
    model_hash: str
    packed: PackedModel | None = None
    why_general: str = ""
    unidentified: str = ""
    has_card: bool = False

    @property
    def weights_range(self) -> WeightsRange:
        """Sizes of its weights, where it has a ``spec``."""
        return USUAL if self.packed is None else self.packed.weights_range


def resolve_subject(
    model: nn.Module | Checkpoint | str | Path,
    *,
    dim: int | None = None,
    data_range: tuple[float, float] | None = None,
    z0: Tensor | None = None,
) -> Subject:
    """Find out what ``model`` is; see `fast_sample` for what it may be."""
    dim = None if dim is None else check_dim(dim)
    data_range = None if data_range is None else check_data_range(data_range)
    if isinstance(model, (str, Path)):
        model = load_checkpoint(model)
    if isinstance(model, Checkpoint):  # its own hash is that of the file: the weights may have changed since
        subject = _module_subject(model.model, dim, data_range, z0)
        recommended = recommended_options(model.card.sampling, model.card.diagnostics)
        return replace(subject, recommended=recommended, has_card=True)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is a {type(model).__name__}: give a module, a checkpoint or its path, or a bundled model's name"
        )
    return _module_subject(model, dim, data_range, z0)


def _module_subject(
    model: nn.Module, dim: int | None, data_range: tuple[float, float] | None, z0: Tensor | None
) -> Subject:
    """A module as it is now."""
    try:
        mlp = plain_mlp(model, data_range=data_range)
    except InputError as problem:
        reason = problem.reason if isinstance(problem, UnknownModuleError) else str(problem)
        return _general_subject(model, dim, data_range, z0, reason)
    return _agreed(_mlp_subject(mlp), dim, data_range)


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
    return Subject(
        model, None, dim, data_range, {}, identity.digest, why_general=reason, unidentified=identity.unidentified
    )


def _mlp_subject(model: KaleidoMLP) -> Subject:
    spec = model.spec
    home_of(model)
    packed = PACKED.take(spec, *layers_of(model), may_wait=True)
    return Subject(model, spec, spec.dim, (spec.low, spec.high), {}, packed.model_hash, packed)


def check_z0_form(z0: Tensor, request: SampleRequest, dim: int) -> None:
    """Refuse start states of another type or shape; their values are not looked at."""
    if not isinstance(z0, Tensor) or not z0.is_floating_point():
        kind = z0.dtype if isinstance(z0, Tensor) else type(z0).__name__
        raise InputError(f"z0 is {kind}: give a floating-point torch tensor")
    if tuple(z0.shape) != (request.n_chains, dim):
        raise InputError(f"z0 has shape {tuple(z0.shape)}: (n_chains, dim) = ({request.n_chains}, {dim}) is needed")


def check_z0(z0: Tensor, request: SampleRequest, subject: Subject) -> None:
    check_z0_form(z0, request, subject.dim)
    # One pass, which NaN and infinite values come through; `torch.isfinite` takes 50 ms for 3,000 chains of mnist.
    least, most = torch.aminmax(z0.detach())
    if not bool(torch.isfinite(least) & torch.isfinite(most)):
        raise InputError("z0 holds NaN or infinite values: every start state must be finite")
    if request.sampler == "flow":  # its own starts are not bounded either
        return
    low, high = subject.data_range
    if bool((least < low) | (most > high)):
        raise InputError(f"z0 reaches from {float(least):g} to {float(most):g}: clamp it to [{low:g}, {high:g}]")
