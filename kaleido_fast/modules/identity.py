"""What a module is, as one SHA-256: its code, its settings, its weights and buffers; the same in every process.

A record of draws names the model by it, so that no run goes on with another model. What is read is what runs: bytecode,
not source files, which may have changed since they were loaded. Objects count by their contents, never by where
they lie in memory, and sets in a fixed order. Code of the standard library, of torch and of installed packages
counts by name and version. What cannot be read, such as an open file, leaves the module without an identity.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kaleido_fast.modules.bytecode import library_of, tell_class, tell_code, tell_function, tell_method, tell_named
from kaleido_fast.modules.contents import tell_array, tell_generator, tell_module, tell_tensor
from kaleido_fast.modules.walk import UntoldError, Walk, by_parts, exactly, hash_of

_NAMED = (  # found by name: they have no contents of their own
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    np.ufunc,
    torch.dtype,
    torch.layout,
    torch.memory_format,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
)


@dataclass(frozen=True)
class Identity:
    """What a module is.

    Args:
        digest: 64 hexadecimal digits; "" if it is not known.
        unidentified: what part cannot be read, and why; "" if all can.
    """

    digest: str
    unidentified: str = ""


def identify(module: nn.Module) -> Identity:
    """The identity of a module as it is now: equal for equal code, settings, parameters, buffers and forward hooks.

    Its mode (training or evaluation), gradients, devices and memory formats do not count.
    """
    walk = Walk(_DIGESTS)
    try:
        hooks = nn.modules.module
        everywhere = [*hooks._global_forward_pre_hooks.values(), *hooks._global_forward_hooks.values()]
        parts = [walk.of(module), *map(walk.of, everywhere)]
    except UntoldError as problem:
        place = ".".join(walk.path)
        return Identity("", f"{f'its {place}' if place else 'it'} is {problem}")
    except RecursionError:
        return Identity("", f"its {'.'.join(walk.path[:4])} is nested too deeply")
    return Identity(hash_of("module", *parts).hex())


class Watch:
    """Notices that parameters or buffers change: a run that reads them as it goes on would mix two models.

    Args:
        modules: what is run, as it is now.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.before = self._digests()

    def changed(self) -> str:
        """Name of a tensor that is not what it was; "" for none."""
        now = self._digests()
        keys = sorted(now.keys() | self.before.keys())
        return next((name for place, name in keys if now.get((place, name)) != self.before.get((place, name))), "")

    def _digests(self) -> dict[tuple[int, str], bytes]:
        walk = Walk(_DIGESTS)
        return {
            (place, name): walk.of(tensor)
            for place, module in enumerate(self.modules)
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }


def _tell_set(walk: Walk, values: set[Any] | frozenset[Any]) -> bytes:
    return hash_of("set", *sorted(map(walk.of, values)))


# How each kind of object is digested: the first that fits.
_DIGESTS: tuple[tuple[Any, Callable[[Walk, Any], bytes]], ...] = (
    (nn.Module, tell_module),
    (Tensor, tell_tensor),
    ((np.ndarray, np.generic), tell_array),
    (torch.Generator, tell_generator),
    (_NAMED, tell_named),
    (type, tell_class),
    (types.FunctionType, tell_function),
    (types.MethodType, tell_method),
    (types.CodeType, tell_code),
    (types.ModuleType, lambda _, value: hash_of("module", f"{value.__name__} {library_of(value.__name__)}".encode())),
    (types.MappingProxyType, Walk.mapping),
    (property, by_parts("property", "fget", "fset", "fdel")),
    (staticmethod, by_parts("static", "__func__")),
    (classmethod, by_parts("class method", "__func__")),
    (functools.cached_property, by_parts("cached property", "func")),
    (functools._lru_cache_wrapper, by_parts("cached", "__wrapped__")),
    (weakref.ref, lambda walk, value: hash_of("reference", walk.of(value()))),
    (dict, exactly(dict, Walk.mapping)),
    (list, exactly(list, Walk.all)),
    (tuple, exactly(tuple, Walk.all)),
    (set, exactly(set, _tell_set)),
    (frozenset, exactly(frozenset, _tell_set)),
)
