"""Whether calling a module is just what its known class does: no method replaced, no hook, no property in the way."""

from __future__ import annotations

import sys
from collections.abc import Set as AbstractSet
from typing import Any

from torch import nn
from torch.nn.modules import module as module_globals
from torch.nn.utils import parametrize

from kaleido_fast.errors import InputError

AS_IT_IS = "fast_sample with dim= and data_range= runs the module as it is, by engine 'reference'"
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


# What runs when a module is called.
_CALLED = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "activate", "before_bound")
# What a forward reads of a module besides its registered parts: of a subclass it may be a property.
_READ = dict.fromkeys(
    ("weight", "bias", "negative_slope", "approximate", "start_dim", "end_dim", "layers", "spec", "training")
).keys()


def why_not_exactly(module: nn.Module, kind: type[nn.Module]) -> str:
    """Why calling ``module`` is not just what ``kind`` does on its attributes; empty if it is.

    A pre-hook that only sets a layer's weights counts too: see `linear_in_force`.
    """
    return why_other_class(module, kind) or why_hooked(module, module._forward_pre_hooks.values())


def why_other_class(module: nn.Module, kind: type[nn.Module]) -> str:
    """Why the class of a module, or what was set on the module itself, does something else than ``kind``."""
    cls = parametrize.type_before_parametrizations(module)
    if cls is not type(module) and type(module).__module__ != parametrize.__name__:
        return f"is {class_name(module)}, which has parametrisations that are not torch's"
    if not issubclass(cls, kind):
        return f"is {class_name(module)}, not {kind.__name__}"
    replaced = [name for name in _CALLED if _is_replaced(kind, name)]
    if replaced:
        return f"is {kind.__name__}, whose {replaced[0]} was replaced in the class itself"
    changed = _read_otherwise(cls) if cls is kind else _changed(cls, kind) + _read_otherwise(cls)
    if changed:
        return f"is {cls.__name__}, a {kind.__name__} with its own {changed[0]}"
    own = own_methods(module)
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
    for owner in kind.__mro__:
        if name in owner.__dict__:
            break
    else:
        return False
    # What `functools.wraps` has copied says nothing of where a function is from; its namespace does.
    namespace = getattr(owner.__dict__[name], "__globals__", {})
    if namespace is sys.modules[owner.__module__].__dict__:
        return False
    # Torch itself replaces how modules are called while it exports a program.
    return not (owner is nn.Module and str(namespace.get("__name__")).startswith("torch."))


def _read_otherwise(cls: type) -> list[str]:
    """What a forward reads that a class computes at each time, perhaps by the mode: properties and the like."""
    held = _names_held(cls, _READ)
    return [name for name in _READ if name in held and hasattr(type(_of_class(cls, name)), "__get__")]


def own_methods(module: nn.Module) -> list[str]:
    """Methods of a module's class that were replaced on the module itself."""
    cls = type(module)
    held = _names_held(cls, vars(module).keys())
    return [name for name in vars(module) if name in held and callable(_of_class(cls, name))]


def _names_held(cls: type, names: AbstractSet[str]) -> set[str]:
    """Those of some names that a class or one of its bases holds: mostly none, which is found out at once."""
    return {name for owner in cls.__mro__ for name in names & vars(owner).keys()}


def why_hooked(module: nn.Module, pre_hooks: Any) -> str:
    hooks = [*pre_hooks, *module._forward_hooks.values()]
    if hooks:
        return f"has a forward hook ({_name(hooks[0])}): it may change what passes"
    if global_hooks():
        return f"runs under a hook on all modules ({_name(global_hooks()[0])})"
    return ""


def is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or global_hooks())


def global_hooks() -> list[Any]:
    return [*module_globals._global_forward_pre_hooks.values(), *module_globals._global_forward_hooks.values()]


def _name(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)


def class_name(module: object) -> str:
    return type(module).__name__
