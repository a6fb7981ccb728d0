"""The network: a deep MLP whose output is bounded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.modules.exactness import UnknownModuleError, why_not_exactly
from kaleido_fast.modules.linear_layers import linear_in_force
from kaleido_fast.modules.recognition import read_sequential
from kaleido_fast.modules.wrappers import look_through
from kaleido_fast.scalars import plain_fields
from kaleido_kernels import shapes
from kaleido_kernels.activations import torch_function
from kaleido_kernels.shapes import BOUNDS as BOUND_RANGES
from kaleido_kernels.shapes import NetShape

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {name: torch_function(name) for name in shapes.ACTIVATIONS}
BOUNDS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}
MAX_WIDTH = 1 << 20


@dataclass(frozen=True)
class ModelSpec(NetShape):
    """Everything about a network but its weights.

    Args:
        widths: ``(D, H1, ..., D)``: sizes between the linear layers; first and last are equal.
        activation: hidden activation: relu, leaky_relu, gelu (erf), gelu_tanh, silu or tanh.
        bound: output bound: tanh or sigmoid.
        low, high: range of the data; by default, and at most, the range of the bound.
        sample_shape: shape of one sample, such as (28, 28) or (32, 32, 3); its product is D.
        bias: one flag per linear layer (a single bool stands for all).
        negative_slope: of leaky_relu.

    Raises:
        InputError: a value outside of these ranges.
    """

    widths: tuple[int, ...]
    activation: str = "relu"
    bound: str = "tanh"
    low: float = cast("float", None)
    high: float = cast("float", None)
    sample_shape: tuple[int, ...] = ()
    bias: tuple[bool, ...] = field(default=cast("tuple[bool, ...]", True), kw_only=True)

    def __post_init__(self) -> None:
        plain_fields(self)
        _check_widths(self.widths)
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)
        if self.bound not in BOUNDS:
            raise unknown_name("bound", self.bound, BOUNDS)
        set_field = partial(object.__setattr__, self)
        set_field("widths", tuple(self.widths))
        set_field("sample_shape", tuple(self.sample_shape) or (self.dim,))
        set_field("bias", (self.bias,) * self.n_layers if isinstance(self.bias, bool) else tuple(self.bias))
        default_low, default_high = BOUND_RANGES[self.bound]
        set_field("low", default_low if self.low is None else float(self.low))
        set_field("high", default_high if self.high is None else float(self.high))
        self._check_consistent()

    def _check_consistent(self) -> None:
        if any(not isinstance(n, int) or n < 1 for n in self.sample_shape) or math.prod(self.sample_shape) != self.dim:
            raise InputError(f"sample shape {self.sample_shape} does not hold {self.dim} values: its product must be D")
        if len(self.bias) != self.n_layers or any(not isinstance(flag, bool) for flag in self.bias):
            raise InputError(
                f"{len(self.bias)} bias flags for {self.n_layers} layers: give one true or false per layer"
            )
        bound_low, bound_high = BOUND_RANGES[self.bound]
        if not bound_low <= self.low < self.high <= bound_high:
            raise InputError(
                f"data range [{self.low}, {self.high}] with a {self.bound} bound: "
                f"it must lie inside [{bound_low}, {bound_high}]"
            )
        if not (isinstance(self.negative_slope, float) and math.isfinite(self.negative_slope)):
            raise InputError(f"negative slope {self.negative_slope!r}: a finite float is needed")

    def __getstate__(self) -> dict[str, Any]:
        """Fields in the order of earlier versions: the identity of a module that holds a network depends on it."""
        first = ("widths", "activation", "bound", "low", "high", "sample_shape")
        return {name: self.__dict__[name] for name in (*first, *(n for n in self.__dict__ if n not in first))}

    def to_json(self) -> str:
        """The specification as canonical JSON text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Read back `to_json`; unknown or missing fields raise `InputError`."""
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise InputError("model specification is not a JSON object")
        for name in ("widths", "sample_shape", "bias"):
            value = fields.get(name, ())
            if not isinstance(value, list):
                raise InputError(f"model specification: {name} must be a list")
            fields[name] = tuple(value)
        try:
            return cls(**fields)
        except TypeError as problem:
            raise InputError(f"model specification does not fit this version: {problem}") from problem


def _check_widths(widths: Sequence[int]) -> None:
    if len(widths) < 2 or any(isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_WIDTH for n in widths):
        raise InputError(f"layer widths {tuple(widths)}: give at least two whole numbers from 1 to {MAX_WIDTH:,}")
    if widths[0] != widths[-1]:
        raise InputError(
            f"layer widths start with {widths[0]} and end with {widths[-1]}: "
            "a network that is iterated needs both equal"
        )


class KaleidoMLP(nn.Module):
    """A deep MLP ``f: R^D -> R^D`` with a bounded output.

    Args:
        spec: its shape, activation and bound.
        layers: linear layers to take over (they are shared, not copied); new ones in torch's default
            initialisation otherwise.
    """

    def __init__(self, spec: ModelSpec, layers: Sequence[nn.Linear] | None = None) -> None:
        super().__init__()
        self.spec = spec
        if layers is None:
            triples = zip(spec.widths, spec.widths[1:], spec.bias, strict=False)
            layers = [nn.Linear(n_in, n_out, bias=bias) for n_in, n_out, bias in triples]
        self.layers = nn.ModuleList(layers)

    @property
    def linears(self) -> list[nn.Linear]:
        """The linear layers, in order."""
        return cast("list[nn.Linear]", list(self.layers))

    def activate(self, x: Tensor) -> Tensor:
        """The hidden activation."""
        if self.spec.activation == "leaky_relu":
            return F.leaky_relu(x, self.spec.negative_slope)
        return ACTIVATIONS[self.spec.activation](x)

    def forward(self, x: Tensor) -> Tensor:
        """One step of the recursion, ``(..., D) -> (..., D)``, without noise."""
        return BOUNDS[self.spec.bound](self.before_bound(x))

    def before_bound(self, x: Tensor) -> Tensor:
        """What `forward` applies the bound to, ``(..., D) -> (..., D)``."""
        *hidden, last = self.linears
        for layer in hidden:
            x = self.activate(layer(x))
        return last(x)

    def _why_not_plain(self) -> str:
        """`why_not_plain` as a method: torch 2.11's compiler gives no object to a constant function."""
        return why_not_plain(self)

    # Compilers call it while they trace, and take its answer as a constant: what
    # `torch.compiler.assume_constant_result` says of a function, without loading the compiler (1 s).
    _why_not_plain._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{'-'.join(map(str, spec.widths))}, {spec.activation}, bound={spec.bound}"

    @classmethod
    def from_sequential(
        cls,
        sequential: nn.Module,
        *,
        sample_shape: tuple[int, ...] = (),
        data_range: tuple[float, float] | None = None,
    ) -> KaleidoMLP:
        """Take over a plain ``nn.Sequential`` of Linear layers, one kind of activation between, and a bound at the end.

        Dropout, Identity and Flatten are passed over (sampling is inference). Parameters are shared, not copied; layers
        whose weights torch makes from other tensors (parametrised, pruned, normed ones) give copies of the weights in
        force.

        Raises:
            UnknownModuleError: a module or an order that the engines cannot take, named with its position: also a
                subclass with a forward of its own and a module with a forward hook.
            InputError: sizes or a data range that do not fit.
        """
        stack = read_sequential(sequential)
        spec = ModelSpec(
            widths=(stack.linears[0].in_features, *(layer.out_features for layer in stack.linears)),
            activation=stack.activation,
            bound=stack.bound,
            sample_shape=sample_shape,
            bias=tuple(layer.bias is not None for layer in stack.linears),
            negative_slope=stack.negative_slope,
        )
        if data_range is not None:
            spec = replace(spec, low=data_range[0], high=data_range[1])
        return cls(spec, stack.linears)


def plain_mlp(model: nn.Module, *, data_range: tuple[float, float] | None = None) -> KaleidoMLP:
    """The `KaleidoMLP` that computes exactly what a module computes in evaluation, read from it without running it.

    Wrappers that change nothing are looked through: `torch.compile`, ``DataParallel``, ``AveragedModel``. Layers whose
    weights torch makes from other tensors (parametrised, pruned, normed ones) are taken with the weights in force.

    Args:
        model: a `KaleidoMLP`, returned as it is where its layers are plain; or a Sequential, as in
            `KaleidoMLP.from_sequential`.
        data_range: (low, high) for a Sequential; None for the range of its bound.

    Raises:
        UnknownModuleError: a module that is not understood exactly; what and why.
        InputError: a data range that does not lie inside the bound's.
    """
    model = look_through(model)
    if not isinstance(model, KaleidoMLP):
        return KaleidoMLP.from_sequential(model, data_range=data_range)
    why = why_not_exactly(model, KaleidoMLP)
    if why:
        raise UnknownModuleError(f"the model {why}")
    layers = [linear_in_force(layer, f"layer {i}") for i, layer in enumerate(model.layers)]
    spec = model.spec
    shapes = [(layer.in_features, layer.out_features, layer.bias is not None) for layer in layers]
    if shapes != list(zip(spec.widths, spec.widths[1:], spec.bias, strict=False)):
        raise UnknownModuleError(f"the model's layers ({shapes}) are not those of its specification")
    if all(mine is theirs for mine, theirs in zip(layers, model.layers, strict=True)):
        return model
    return KaleidoMLP(spec, layers)


def why_not_plain(model: KaleidoMLP) -> str:
    """Why a `KaleidoMLP` is not described by the weights of its layers as they lie; empty if it is."""
    for name, module, kind in (
        ("the model", model, KaleidoMLP),
        *((f"layer {i}", layer, nn.Linear) for i, layer in enumerate(model.layers)),
    ):
        why = why_not_exactly(module, kind) or ("is parametrised" if is_parametrized(module) else "")
        if why:
            return f"{name} {why}"
    return ""


def named_weights(model: KaleidoMLP) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a plain model, as ``state_dict()`` has them where no hook changes it."""
    for i, layer in enumerate(model.linears):
        yield f"layers.{i}.weight", layer.weight.detach()
        if layer.bias is not None:
            yield f"layers.{i}.bias", layer.bias.detach()


def model_hash(model: KaleidoMLP) -> str:
    """SHA-256 over the specification and the weights, see `weights_hash`: names a model in records of runs."""
    return weights_hash(model.spec, named_weights(model))


def weights_hash(spec: ModelSpec, weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over a specification and its weights (name, tensor) as fp32 bytes; fp64 ones where fp32 rounds them."""
    digest = hashlib.sha256(spec.to_json().encode())
    for name, tensor in weights:
        exact = tensor.to("cpu")
        rounded = exact.to(torch.float32)
        held = exact if exact.dtype == torch.float64 and not torch.equal(rounded.double(), exact) else rounded
        digest.update(name.encode())
        digest.update(held.contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_finite(model: KaleidoMLP) -> None:
    """Refuse a model whose weights are NaN or infinite, also where fp32 makes them so, naming the first such tensor."""
    for name, tensor in named_weights(model):
        bad = int((~torch.isfinite(tensor.to(torch.float32))).sum())
        if bad:
            raise InputError(f"model weight {name} holds {bad} NaN or infinite values: every weight must be finite")
