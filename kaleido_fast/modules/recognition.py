"""Which networks are understood exactly: read from a module without running it, or refused with the reason.

Fused engines compute a network from its weights alone. That is right only where nothing else takes part in the
module's own forward: every module must be of a known type, or of a subclass that changes no method of it, without
hooks, and with the weights that its forward would use.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals
from torch.nn.utils import parametrize, prune

from kaleido_fast.errors import InputError, unknown_name

AS_IT_IS = "fast_sample with dim= and data_range= runs the module as it is, by engine 'reference'"
ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
}
BOUND_MODULES: dict[type[nn.Module], str] = {nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # sampling is evaluation: they do nothing
WEIGHT_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Names that every class has of its own, and that no call of a module looks at.
_OF_EACH_CLASS = frozenset(vars(type("Empty", (), {}))) | {
    "__annotate__",
    "__annotate_func__",
    "__annotations__",
    "__class__",
    "__firstlineno__",
    "__init__",
    "__repr__",
    "__static_attributes__",
    "__subclasshook__",
    "_get_name",
    "extra_repr",
}


class UnknownModuleError(InputError):
    """A module that no `KaleidoMLP` can stand for, as far as is known for certain.

    Args:
        reason: which module and why, without what to do.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason} ({AS_IT_IS})")
        self.reason = reason


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


# What runs when a module is called.
_CALLED = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "activate")
# What a forward reads of a module besides its registered parts: of a subclass it may be a property.
_READ = ("weight", "bias", "negative_slope", "approximate", "start_dim", "end_dim", "layers", "spec", "training")


def look_through(module: nn.Module) -> nn.Module:
    """The module inside of wrappers that change nothing: `torch.compile`, data parallelism, averaged weights."""
    while (inner := _wrapped(module)) is not None:
        module = inner
    return module


def as_written(module: nn.Module) -> nn.Module:
    """The module inside of what ``torch.compile`` returned, where that does nothing else; any other one as it is."""
    while is_compiled(module) and not why_more_than_compiled(module) and not _global_hooks():
        module = cast(nn.Module, module._orig_mod)
    return module


def is_compiled(module: object) -> bool:
    """Whether it is what ``torch.compile`` returned for a module."""
    compiled = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    return compiled is not None and type(module) is compiled


def why_more_than_compiled(module: nn.Module) -> str:
    """What was added to that which ``torch.compile`` returned, which no copy of it has; empty for nothing."""
    forward = module.forward
    lazy = isinstance(forward, types.MethodType) and forward.__func__ in vars(type(module)).values()
    if not lazy and not hasattr(forward, "_torchdynamo_orig_callable"):  # dynamo's own has that mark
        return "a forward"
    return "a forward hook" if module._forward_hooks or module._forward_pre_hooks else ""


def why_not_exactly(module: nn.Module, kind: type[nn.Module]) -> str:
    """Why calling ``module`` is not just what ``kind`` does on its attributes; empty if it is.

    A pre-hook that only sets a layer's weights counts too: see `linear_in_force`.
    """
    return _why_other_class(module, kind) or _why_hooked(module, module._forward_pre_hooks.values())


def read_sequential(sequential: nn.Module) -> Stack:
    """Linear layers, one kind of activation between them and a bound at the end, read from a Sequential.

    Sequentials inside are opened. What changes nothing for (n, D) states in evaluation is passed over: Identity,
    dropout, Flatten.

    Raises:
        UnknownModuleError: anything else, named with its position.
    """
    if not isinstance(look_through(sequential), nn.Sequential):
        raise UnknownModuleError(f"{_class(sequential)} is neither a KaleidoMLP nor a Sequential of Linear layers")
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


def linear_in_force(layer: nn.Module, name: str) -> nn.Linear:
    """A layer as a plain Linear with the weights that its own forward would use in evaluation.

    The layer itself where it is plain. Parametrised, pruned, weight- and spectrally normed layers give a new one that
    holds a copy of the weights in force; nothing of the layer is written to, and no power iteration is done.

    Raises:
        UnknownModuleError: it is not exactly a Linear layer; ``name`` says which one it is.
    """
    why = _why_other_class(layer, nn.Linear) or _why_hooked(
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


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper wraps; None for a module that is none, or one that does more (hooks, a forward of its own)."""
    if (inner := as_written(module)) is not module:
        return inner
    if _hooked(module):
        return None
    averaged = getattr(sys.modules.get("torch.optim.swa_utils"), "AveragedModel", None)
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, averaged)
    if any(type(module) is wrapper for wrapper in wrappers) and not _own_methods(module):
        return cast(nn.Module, module.module)
    return None


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
    """Whether a module gives back (n, D) states as they are, in evaluation."""
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
            raise UnknownModuleError(f"module {name} of the Sequential is {_class(module)}, where {wanted} is expected")
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
    raise UnknownModuleError(str(unknown_name(f"activation at position {name}:", _class(module), known)))


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
        f"the Sequential ends with {_class(module)}: the output must be bounded by nn.Tanh() or nn.Sigmoid()"
    )


def _why_other_class(module: nn.Module, kind: type[nn.Module]) -> str:
    """Why the class of a module, or what was set on the module itself, does something else than ``kind``."""
    cls = parametrize.type_before_parametrizations(module)
    if cls is not type(module) and type(module).__module__ != parametrize.__name__:
        return f"is {_class(module)}, which has parametrisations that are not torch's"
    if not issubclass(cls, kind):
        return f"is {_class(module)}, not {kind.__name__}"
    replaced = [name for name in _CALLED if _is_replaced(kind, name)]
    if replaced:
        return f"is {kind.__name__}, whose {replaced[0]} was replaced in the class itself"
    changed = _read_otherwise(cls) if cls is kind else _changed(cls, kind) + _read_otherwise(cls)
    if changed:
        return f"is {cls.__name__}, a {kind.__name__} with its own {changed[0]}"
    own = _own_methods(module)
    return f"has its own {own[0]}, set on the {kind.__name__} itself" if own else ""


def _changed(cls: type, kind: type) -> list[str]:
    """Attributes of ``kind`` that its subclass ``cls`` replaces, forward first."""
    names = [name for name in dir(kind) if name not in _OF_EACH_CLASS]
    changed = [n for n in names if _of_class(cls, n) is not _of_class(kind, n)]
    return sorted(changed, key=lambda name: (name != "forward", name))


def _of_class(cls: type, name: str) -> Any:
    """What a class holds under a name, without computing it; as `inspect.getattr_static`, in a fifth of the time."""
    for owner in cls.__mro__:
        if name in owner.__dict__:
            return owner.__dict__[name]
    return None


def _is_replaced(kind: type[nn.Module], name: str) -> bool:
    """Whether a method is no longer the one that the class was written with: another was set on the class."""
    owner = next((cls for cls in kind.__mro__ if name in vars(cls)), None)
    if owner is None:
        return False
    # What `functools.wraps` has copied says nothing of where a function is from; its namespace does.
    namespace = getattr(vars(owner)[name], "__globals__", {})
    if namespace is vars(sys.modules[owner.__module__]):
        return False
    # Torch itself replaces how modules are called while it exports a program.
    return not (owner is nn.Module and str(namespace.get("__name__")).startswith("torch."))


def _read_otherwise(cls: type) -> list[str]:
    """What a forward reads that a class computes at each time, perhaps by the mode: properties and the like."""
    return [name for name in _READ if hasattr(type(_of_class(cls, name)), "__get__")]


def _own_methods(module: nn.Module) -> list[str]:
    """Methods of its class that were replaced on the module itself."""
    cls = type(module)
    return [name for name in vars(module) if callable(_of_class(cls, name))]


def _why_hooked(module: nn.Module, pre_hooks: Any) -> str:
    hooks = [*pre_hooks, *module._forward_hooks.values()]
    if hooks:
        return f"has a forward hook ({_name(hooks[0])}): it may change what passes"
    if _global_hooks():
        return f"runs under a hook on all modules ({_name(_global_hooks()[0])})"
    return ""


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or _global_hooks())


def _global_hooks() -> list[Any]:
    return [*module_globals._global_forward_pre_hooks.values(), *module_globals._global_forward_hooks.values()]


def _name(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)


def _class(module: object) -> str:
    return type(module).__name__


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
    """Let copies of modules compute their weights anew inside of `torch.nn.utils.parametrize.cached`.

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
            raise UnknownModuleError(f"{name} has a {what} of type {_class(tensor)}, not a plain tensor")
        assert isinstance(tensor, Tensor)
        if tensor.layout != torch.strided or tensor.dtype not in WEIGHT_TYPES:
            raise UnknownModuleError(f"{name} has a {what} in {tensor.dtype}, {tensor.layout}: no plain floating type")
    assert isinstance(weight, Tensor)
    if weight.ndim != 2 or (isinstance(bias, Tensor) and tuple(bias.shape) != (weight.shape[0],)):
        shapes = [tuple(tensor.shape) for tensor in (weight, bias) if isinstance(tensor, Tensor)]
        raise UnknownModuleError(f"{name} has weights of shapes {', '.join(map(str, shapes))}: no Linear layer's")
