"""Linear layers with the weights that their forward would use."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from kaleido_fast.modules.exactness import UnknownModuleError, class_name, why_hooked, why_other_class

WEIGHT_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def linear_in_force(layer: nn.Module, name: str) -> nn.Linear:
    """A layer as a plain Linear with the weights that its own forward would use in evaluation.

    The layer itself where it is plain. Parametrised, pruned, weight- and spectrally normed layers give a new one that
    holds a copy of the weights in force; nothing of the layer is written to, and no power iteration is done.

    Raises:
        UnknownModuleError: it is not exactly a Linear layer; ``name`` says which one it is.
    """
    why = why_other_class(layer, nn.Linear) or why_hooked(
        layer, [hook for hook in layer._forward_pre_hooks.values() if not _sets_weights(hook)]
    )
    if why:
        raise UnknownModuleError(f"{name} {why}")
    plain = not layer._forward_pre_hooks and not parametrize.is_parametrized(layer)
    weight, bias = _tensors(layer) if plain else _weights_in_force(layer, name)
    check_weights(name, weight, bias)
    own = layer._parameters
    if plain and own.get("weight") is weight and own.get("bias") is bias:
        linear = cast(nn.Linear, layer)
        if (linear.out_features, linear.in_features) == tuple(weight.shape):
            return linear
    return plain_linear(weight.detach().clone(), None if bias is None else bias.detach().clone())


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear layer around these very tensors, without torch's random initialisation; they take no gradient."""
    n_out, n_in = weight.shape
    layer = nn.Linear(n_in, n_out, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _sets_weights(hook: Any) -> bool:
    """Whether a pre-hook is one of torch's own that set a layer's weights from other tensors, and do nothing else."""
    if type(hook) in _norm_hooks():
        return True
    base = prune.BasePruningMethod
    return isinstance(hook, base) and all(
        getattr(type(hook), name) is getattr(base, name) for name in ("__call__", "apply_mask")
    )


def _norm_hooks() -> tuple[type, type]:
    """The hooks of torch's older norms, whose modules hide behind functions of the same name."""
    utils = [sys.modules[f"torch.nn.utils.{name}"] for name in ("weight_norm", "spectral_norm")]
    return utils[0].WeightNorm, utils[1].SpectralNorm


def _weights_in_force(layer: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) as the layer's forward would see them in evaluation, made on a stand-in for the layer."""
    stand_in = object.__new__(type(layer))
    state = dict(vars(layer))
    for registry in ("_parameters", "_buffers", "_modules"):  # what hooks assign must not reach the layer
        state[registry] = dict(state[registry])
    stand_in.__dict__.update(state, training=False)
    if parametrize.is_parametrized(layer):
        try:
            parametrizations = cast(nn.ModuleDict, layer.parametrizations)
            stand_in._modules["parametrizations"] = copy.deepcopy(parametrizations).eval()
        except Exception as problem:  # code of the caller's runs here
            raise UnknownModuleError(f"{name} has a parametrisation that cannot be copied: {problem}") from problem
    with torch.no_grad():
        for hook in layer._forward_pre_hooks.values():
            hook(stand_in, (None,))
        with uncached():
            weight, bias = _tensors(stand_in)
        with uncached():
            again = _tensors(stand_in)
        for first, second in zip((weight, bias), again, strict=True):
            if first is not None and second is not None and not torch.equal(first, second):
                raise UnknownModuleError(f"{name} has a parametrisation that gives other weights each time")
    return weight, bias


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Let copies of modules compute their own weights inside of `torch.nn.utils.parametrize.cached`.

    It keeps weights by where a module lies in memory, also those of a copy that is gone, whose place another one takes.
    """
    held, parametrize._cache = parametrize._cache, {}
    try:
        yield
    finally:
        parametrize._cache = held if parametrize._cache_enabled else {}


def _tensors(layer: Any) -> tuple[Tensor, Tensor | None]:
    return layer.weight, layer.bias


def check_weights(name: str, weight: object, bias: object) -> None:
    """Refuse weights that are not plain tensors of a layer called ``name``: `UnknownModuleError`."""
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None and what == "bias":
            continue
        if type(tensor) not in (Tensor, nn.Parameter):
            raise UnknownModuleError(f"{name} has a {what} of type {class_name(tensor)}, not a plain tensor")
        assert isinstance(tensor, Tensor)
        if tensor.layout != torch.strided or tensor.dtype not in WEIGHT_TYPES:
            raise UnknownModuleError(f"{name} has a {what} in {tensor.dtype}, {tensor.layout}: no plain floating type")
    assert isinstance(weight, Tensor)
    if weight.ndim != 2 or (isinstance(bias, Tensor) and tuple(bias.shape) != (weight.shape[0],)):
        shapes = [tuple(tensor.shape) for tensor in (weight, bias) if isinstance(tensor, Tensor)]
        raise UnknownModuleError(f"{name} has weights of shapes {', '.join(map(str, shapes))}: no Linear layer's")
