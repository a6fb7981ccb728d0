"""Which networks are understood exactly: read from a module without running it, or refused with the reason.

Fused engines compute a network from its weights alone. That is right only where nothing else takes part in the
module's own forward: every module must be of a known type, or of a subclass that changes no method of it, without
hooks, and with the weights that its forward would use.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import nn

from kaleido_fast.errors import unknown_name
from kaleido_fast.modules.exactness import UnknownModuleError, class_name, why_not_exactly
from kaleido_fast.modules.linear_layers import linear_in_force
from kaleido_fast.modules.wrappers import look_through
from kaleido_kernels.activations import ACTIVATIONS

ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    getattr(nn, each.module): name for name, each in ACTIVATIONS.items() if each.module
}
BOUND_MODULES: dict[type[nn.Module], str] = {nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # sampling is evaluation: they do nothing


@dataclass(frozen=True)
class Stack:
    """What a Sequential of Linear layers, activations and a bound says.

    Args:
        linears: its linear layers: the module's own, or new ones with the weights in force.
        activation, negative_slope: hidden activation.
        bound: output bound.
    """

    linears: tuple[nn.Linear, ...]
    activation: str
    negative_slope: float
    bound: str


def read_sequential(sequential: nn.Module) -> Stack:
    """Linear layers, one kind of activation between them and a bound at the end, read from a Sequential.

    Sequentials inside are opened. What changes nothing for (n, D) states in evaluation is passed over: Identity,
    dropout, Flatten.

    Raises:
        UnknownModuleError: anything else, named with its position.
    """
    if not isinstance(look_through(sequential), nn.Sequential):
        raise UnknownModuleError(f"{class_name(sequential)} is neither a KaleidoMLP nor a Sequential of Linear layers")
    modules = [(name, m) for name, m in _opened(sequential, "") if not _changes_nothing(m)]
    layers = [linear_in_force(m, f"module {name}") for name, m in _alternating(modules)]
    names = {_activation(name, m) for name, m in modules[1:-1:2]}
    if len(names) > 1:
        kinds = ", ".join(sorted(name for name, _ in names))
        raise UnknownModuleError(
            f"hidden activations are mixed ({kinds}): the engines take one kind in all hidden layers"
        )
    activation, slope = names.pop() if names else ("relu", 0.01)
    for i, (before, layer) in enumerate(itertools.pairwise(layers)):
        if before.out_features != layer.in_features:
            raise UnknownModuleError(
                f"linear layer {i + 1} takes {layer.in_features} values but gets {before.out_features} "
                "from the one before"
            )
    return Stack(tuple(layers), activation, slope, _bound(*modules[-1]))


def _opened(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """(position, module) of all that a Sequential calls, in order; positions as in `nn.Module.named_modules`."""
    module = look_through(module)
    if not isinstance(module, nn.Sequential):
        yield prefix or "itself", module
        return
    why = why_not_exactly(module, nn.Sequential)
    if why:
        raise UnknownModuleError(f"module {prefix} {why}" if prefix else f"the Sequential {why}")
    for name, child in module._modules.items():
        path = f"{prefix}.{name}" if prefix else name
        if child is None:
            raise UnknownModuleError(f"module {path} of the Sequential is None, which it cannot call")
        yield from _opened(child, path)


def _changes_nothing(module: nn.Module) -> bool:
    """Whether a module returns (n, D) states as they are, in evaluation."""
    if any(not why_not_exactly(module, kind) for kind in (nn.Identity, *DROPOUTS)):
        return True
    if why_not_exactly(module, nn.Flatten):
        return False
    flatten = cast(nn.Flatten, module)
    return flatten.start_dim in (1, -1) and flatten.end_dim in (1, -1)


def _alternating(modules: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Linear, activation, Linear, ..., bound: the layers of it; any other order is refused."""
    for i, (name, module) in enumerate(modules):
        if (i % 2 == 0) != isinstance(module, nn.Linear):
            wanted = "a Linear layer" if i % 2 == 0 else "an activation"
            raise UnknownModuleError(
                f"module {name} of the Sequential is {class_name(module)}, where {wanted} is expected"
            )
    if not modules or len(modules) % 2:
        raise UnknownModuleError("the Sequential does not end with a bound: append nn.Tanh() or nn.Sigmoid()")
    return modules[::2]


def _activation(name: str, module: nn.Module) -> tuple[str, float]:
    """(name, negative slope) of a hidden activation."""
    for kind, activation in ACTIVATION_MODULES.items():
        if isinstance(module, kind):
            why = why_not_exactly(module, kind)
            if why:
                raise UnknownModuleError(f"module {name} {why}")
            return _with_options(name, module, activation)
    known = [kind.__name__ for kind in ACTIVATION_MODULES]
    raise UnknownModuleError(str(unknown_name(f"activation at position {name}:", class_name(module), known)))


def _with_options(name: str, module: nn.Module, activation: str) -> tuple[str, float]:
    if activation == "gelu" and module.approximate in ("none", "tanh"):
        return ("gelu_tanh" if module.approximate == "tanh" else "gelu"), 0.01
    if activation == "leaky_relu":
        slope = module.negative_slope
        if isinstance(slope, (int, float)) and math.isfinite(slope):
            return activation, float(slope)
    elif activation != "gelu":
        return activation, 0.01
    raise UnknownModuleError(f"module {name} is {module}, whose option the engines do not know")


def _bound(name: str, module: nn.Module) -> str:
    for kind, bound in BOUND_MODULES.items():
        if isinstance(module, kind):
            why = why_not_exactly(module, kind)
            if why:
                raise UnknownModuleError(f"module {name} {why}")
            return bound
    raise UnknownModuleError(
        f"the Sequential ends with {class_name(module)}: the output must be bounded by nn.Tanh() or nn.Sigmoid()"
    )
