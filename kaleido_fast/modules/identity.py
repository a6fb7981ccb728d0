"""What a module is, as one SHA-256: its code, its settings, its weights and buffers; the same in every process.

A record of draws names the model by it, so that no run goes on with another model. What is read is what runs: bytecode,
not source files, which may have changed since they were loaded. Objects are told by their contents, never by where
they lie in memory, and sets in an order of their own. Code of the standard library, of torch and of installed packages
counts by name and version. What cannot be told, such as an open file, leaves the module without an identity.
"""

from __future__ import annotations

import builtins
import copyreg
import dis
import functools
import hashlib
import io
import re
import site
import sys
import sysconfig
import types
import weakref
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented))
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
_LOCKS = ("lock", "RLock")
# Of a module: its mode (networks are sampled as in evaluation), hooks of gradients and state dictionaries, and hooks
# that are taken in order instead of under the numbers that a process gave them.
_NOT_OF_A_MODULE = {
    "training",
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_compiled_call_impl",
}
# Of a class: what Python and torch note about it, some of it only once it has been used.
_NOT_OF_A_CLASS = {
    "__annotate__",
    "__annotate_func__",
    "__annotations__",
    "__annotations_cache__",
    "__abstractmethods__",
    "__dataclass_fields__",
    "__dataclass_params__",
    "__dict__",
    "__doc__",
    "__firstlineno__",
    "__module__",
    "__orig_bases__",
    "__parameters__",
    "__qualname__",
    "__slotnames__",
    "__static_attributes__",
    "__weakref__",
    "_abc_impl",
    "_autograd_function_id",
    "_backward_cls",
}
_MANGLED = re.compile(rb"\.___torch_mangle_\d+")
_CLASS = re.compile(rb"^class ", re.MULTILINE)
_CONSTANT = re.compile(rb"^  \w+ : Final\[.*\n", re.MULTILINE)  # torch writes them in the order of a set


@dataclass(frozen=True)
class Identity:
    """What a module is.

    Args:
        digest: 64 hexadecimal digits; "" where it cannot be told.
        untold: what part cannot be told, and why; "" where all can.
    """

    digest: str
    untold: str = ""


def identify(module: nn.Module) -> Identity:
    """The identity of a module as it is now: equal for equal code, settings, parameters, buffers and forward hooks.

    Its mode (training or evaluation), gradients, devices and memory formats do not count.
    """
    walk = _Walk()
    try:
        hooks = nn.modules.module
        everywhere = [*hooks._global_forward_pre_hooks.values(), *hooks._global_forward_hooks.values()]
        parts = [walk.of(module), *map(walk.of, everywhere)]
    except _UntoldError as problem:
        place = ".".join(walk.path)
        return Identity("", f"{f'its {place}' if place else 'it'} is {problem}")
    except RecursionError:
        return Identity("", f"its {'.'.join(walk.path[:4])} is nested too deeply")
    return Identity(_hash("module", *parts).hex())


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
        walk = _Walk()
        return {
            (place, name): walk.of(tensor)
            for place, module in enumerate(self.modules)
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }


class _UntoldError(Exception):
    """Something whose contents cannot be told; says what it is."""


def _hash(kind: str, *parts: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(f"{kind}:{len(parts)}".encode())
    for part in parts:
        digest.update(f":{len(part)}:".encode())
        digest.update(part)
    return digest.digest()


class _Walk:
    """Digests of objects by their contents. An object within itself counts by how deep it lies there."""

    def __init__(self) -> None:
        self.path: list[str] = []  # of attributes, to say what could not be told
        self.known: dict[int, bytes] = {}
        self.open: dict[int, int] = {}
        self.held: list[Any] = []  # an id means nothing once its object is gone

    def of(self, value: Any) -> bytes:
        """32 bytes, equal for equal contents."""
        if type(value) in _PLAIN:
            return _hash(type(value).__name__, repr(value).encode(errors="surrogatepass"))
        key = id(value)
        if key in self.known:
            return self.known[key]
        if key in self.open:
            return _hash("within", str(self.open[key]).encode())
        self.open[key] = len(self.open)
        digest = self._compound(value)
        del self.open[key]
        self.held.append(value)
        self.known[key] = digest
        return digest

    def attribute(self, name: str, value: Any) -> bytes:
        """Digest of a named part."""
        self.path.append(name)
        digest = self.of(value)
        self.path.pop()
        return digest

    def all(self, values: Iterable[Any]) -> bytes:
        """Digest of values in order."""
        return _hash("sequence", *map(self.of, values))

    def mapping(self, values: Mapping[Any, Any]) -> bytes:
        """Digest of keys and values in order: a module may go through them."""
        pairs = []
        for key, value in values.items():
            pairs += [self.of(key), self.attribute(key, value) if isinstance(key, str) else self.of(value)]
        return _hash("mapping", *pairs)

    def named(self, values: Mapping[str, Any], without: set[str]) -> bytes:
        """Digest of attributes, whatever their order."""
        return self.mapping({name: values[name] for name in sorted(values) if name not in without})

    def _compound(self, value: Any) -> bytes:
        for kinds, tell in _TELL:
            if isinstance(value, kinds):
                return tell(self, value)
        if type(value).__module__ == "_thread" and type(value).__name__ in _LOCKS:
            return _hash("lock")
        return self._reduced(value)

    def _reduced(self, value: Any) -> bytes:
        """Any other object by what `copy` and `pickle` would make it of."""
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            told = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception as problem:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise _UntoldError(f"of type {kind}, whose contents cannot be read") from problem
        if isinstance(told, str):
            return _hash("global", type(value).__qualname__.encode(), told.encode())
        make, arguments, state, items, pairs = (*told, None, None, None)[:5]
        parts = [self.of(type(value)), self.of(make), self.of(arguments), self.of(state)]
        return _hash("object", *parts, self.all(items or ()), self.all(pairs or ()))


def _tell_module(walk: _Walk, module: nn.Module) -> bytes:
    if isinstance(module, torch.jit.ScriptModule):
        return _tell_script(module)
    if (type(module).__module__, type(module).__name__) == ("torch.export._unlift", "GuardsFn"):
        return _hash("guards")  # checks shapes, computes nothing
    own, skipped = vars(module), set(_NOT_OF_A_MODULE)
    parts = [walk.of(type(module))]
    if isinstance(module, torch.fx.GraphModule):  # its code is text; the rest is how it was found
        tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        own, parts = tensors, [_hash("graph", module.code.encode())]
    elif "_orig_mod" in module._modules and hasattr(module, "dynamo_ctx"):
        own, parts = {}, [_hash("compiled")]
    for hook in module._forward_pre_hooks.values():  # these compute a weight anew at each call
        if type(hook).__module__.startswith("torch.nn.utils."):
            skipped.add(str(getattr(hook, "_tensor_name", None) or getattr(hook, "name", "")))
    parts += [
        walk.named(module._parameters, set()),
        walk.named(module._buffers, set()),
        walk.mapping(module._modules),
        _tell_hooks(walk, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        _tell_hooks(walk, module._forward_hooks, module._forward_hooks_with_kwargs),
        walk.named(own, skipped),
    ]
    return _hash("nn.Module", *parts)


def _tell_hooks(walk: _Walk, hooks: Mapping[int, Any], with_kwargs: Mapping[int, bool]) -> bytes:
    return walk.all((hook, number in with_kwargs) for number, hook in hooks.items())


def _tell_script(module: torch.jit.ScriptModule) -> bytes:
    """A TorchScript module by the archive that it would be saved as, less what tells where its source was."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(module.save_to_buffer()))
    except RuntimeError as problem:
        raise _UntoldError("TorchScript that cannot be saved") from problem
    classes: list[bytes] = []
    members: list[bytes] = []
    with archive:
        for name in archive.namelist():
            if "/code/" in name and name.endswith(".py"):
                # Which classes share a file, and a part of their names, tells how many were compiled before.
                classes += _CLASS.split(_MANGLED.sub(b"", archive.read(name)))
            elif not name.endswith((".debug_pkl", "/serialization_id")):
                members.append(_hash("member", name.encode(), _MANGLED.sub(b"", archive.read(name))))
    return _hash("script", *sorted(map(_tell_script_class, filter(None, classes))), *members)


def _tell_script_class(text: bytes) -> bytes:
    return _hash("class", _CONSTANT.sub(b"", text), *sorted(_CONSTANT.findall(text)))


def _tell_tensor(walk: _Walk, tensor: Tensor) -> bytes:
    kind = type(tensor)
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        return _hash("tensors", walk.of(kind), walk.of(context), *(walk.of(getattr(tensor, name)) for name in names))
    if nn.parameter.is_lazy(tensor):
        raise _UntoldError("a parameter without values: run the module once")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        what = "quantized" if tensor.is_quantized else f"of layout {tensor.layout} on {tensor.device}"
        raise _UntoldError(f"a tensor {what}, whose bytes cannot be read")
    plain = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
    held = plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    parts: list[bytes | memoryview] = [str(tensor.dtype).encode(), str(tuple(tensor.shape)).encode(), held.data]
    if kind not in (Tensor, nn.Parameter, nn.Buffer):
        parts.append(walk.of(kind))
    return _hash("tensor", *parts)


def _tell_array(walk: _Walk, array: np.ndarray | np.generic) -> bytes:
    shape, values = str(array.shape).encode(), np.ascontiguousarray(array)
    if values.dtype.hasobject:
        return _hash("objects", shape, walk.all(values.ravel().tolist()))
    return _hash("array", str(values.dtype.descr).encode(), shape, values.tobytes())


def _tell_generator(walk: _Walk, generator: torch.Generator) -> bytes:
    return _hash("generator", walk.of(generator.get_state()))


def _tell_function(walk: _Walk, function: types.FunctionType) -> bytes:
    inner = vars(function).get("_torchdynamo_orig_callable")
    if inner is not None:  # it only says whether to compile
        return walk.of(inner)
    parts = [function.__qualname__.encode()]
    library = library_of(function.__globals__.get("__name__"))  # of the code, which a wrapper of another name may hold
    if library is not None:
        parts.append(f"{function.__module__} {library}".encode())
        if _finds(function):
            return _hash("function", *parts)
    code = function.__code__
    document = code.co_consts[:1] == (function.__doc__,) and function.__doc__ is not None
    parts += [
        _tell_code(walk, code, documented=document),
        walk.of(function.__defaults__),
        walk.of(function.__kwdefaults__),
        walk.all(map(_cell, function.__closure__ or ())),
        walk.named(vars(function), set()),
    ]
    if library is None:
        parts.append(walk.named(_used(code, function.__globals__), set()))
    return _hash("function", *parts)


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


def _tell_code(walk: _Walk, code: types.CodeType, *, documented: bool = False) -> bytes:
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    constants = code.co_consts[1:] if documented else code.co_consts
    exceptions = getattr(code, "co_exceptiontable", b"")  # Python 3.11
    return _hash("code", code.co_code, exceptions, walk.of(names), walk.of(counts), walk.all(constants))


def used_by(function: types.FunctionType) -> list[Any]:
    """What a function's code may mean by the names that it looks up outside of itself."""
    return list(_used(function.__code__, function.__globals__).values())


def _used(code: types.CodeType, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The globals that code names, and of modules among them the attributes that it may mean."""
    found: dict[str, Any] = {}
    for name, imported in sorted(_global_names(code)):
        value = sys.modules.get(name) if imported else namespace.get(name, vars(builtins).get(name))
        if isinstance(value, types.ModuleType):
            found |= _of_module(name, value, _attribute_names(code), set())
        else:
            found[name] = value
    return found


def _of_module(path: str, module: types.ModuleType, names: Iterable[str], above: set[int]) -> dict[str, Any]:
    """What code may mean by attributes of a module: of the person's own modules and packages the things themselves."""
    library = library_of(module.__name__)
    if library is not None or id(module) in above:
        return {path: f"{module.__name__} {library}"}
    found: dict[str, Any] = {}
    for name in names:
        value = vars(module).get(name)
        if isinstance(value, types.ModuleType):
            found |= _of_module(f"{path}.{name}", value, names, above | {id(module)})
        elif value is not None:
            found[f"{path}.{name}"] = value
    return found


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> frozenset[tuple[str, bool]]:
    """(name, whether it is imported) of what code, and code within it, looks up outside of itself."""
    found = set()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found.add((str(step.argval), False))
        elif step.opname == "IMPORT_NAME":
            found.add((str(step.argval), True))
    return frozenset(found.union(*map(_global_names, _inner(code))))


def _attribute_names(code: types.CodeType) -> list[str]:
    return sorted({*code.co_names, *(name for inner in _inner(code) for name in _attribute_names(inner))})


def _inner(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def _tell_class(walk: _Walk, kind: type) -> bytes:
    library = library_of(kind.__module__)
    if library is not None and _finds(kind):
        name = f"{kind.__module__}.{kind.__qualname__} {library}".encode()
        replaced = _set_from_outside(kind)
        return _hash("class", name, walk.named(replaced, set())) if replaced else _hash("class", name)
    if kind.__module__ == "torch.nn.utils.parametrize":
        # Made for a module, which its properties hold, also those of a copy; what they call are parts of the module.
        return _hash("parametrized", walk.all(kind.__bases__), walk.all(sorted(vars(kind))))
    parts = [kind.__qualname__.encode(), walk.all(kind.__bases__), walk.named(vars(kind), _NOT_OF_A_CLASS)]
    if type(kind) is not type:
        parts.append(walk.of(type(kind)))
    return _hash("class", *parts)


def _set_from_outside(kind: type) -> dict[str, Any]:
    """Methods of a library's class that are a person's own code, set on it or on one that it is derived from."""
    return {
        f"{owner.__qualname__}.{name}": value
        for owner in kind.__mro__
        for name, value in vars(owner).items()
        if isinstance(value, types.FunctionType) and library_of(value.__globals__.get("__name__")) is None
    }


def _finds(named: Any) -> bool:
    """Whether a class or function is what its name says, and not one made on the way for a single module."""
    found: Any = sys.modules.get(named.__module__)
    for name in named.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is named


@functools.cache
def library_of(name: str | None) -> str | None:
    """Version of the library that a module belongs to ("" for none known); None for a person's own code."""
    root = (name or "__main__").partition(".")[0]
    if root == "__main__":  # even where that is a program of a package
        return None
    if root in sys.stdlib_module_names:  # Python's version is in the records
        return ""
    found = sys.modules.get(root)
    file = getattr(found, "__file__", None) or next(iter(getattr(found, "__path__", ())), "")
    installed = any(file.startswith(folder) for folder in _installed_folders())
    if not installed and root not in ("torch", "numpy", "kaleido_fast", "kaleido_kernels"):
        return None
    version = getattr(found, "__version__", "")
    return str(version) if root not in ("kaleido_fast", "kaleido_kernels") else ""  # so are torch's and ours


@functools.cache
def _installed_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = {paths["purelib"], paths["platlib"], *site.getsitepackages(), site.getusersitepackages()}
    return tuple(sorted(folders))


def _tell_method(walk: _Walk, method: types.MethodType) -> bytes:
    return _hash("method", walk.of(method.__func__), walk.of(method.__self__))


def _tell_named(walk: _Walk, value: Any) -> bytes:
    owner = getattr(value, "__self__", None)
    bound = owner is not None and not isinstance(owner, (types.ModuleType, type))
    parts = [walk.of(owner)] if bound else []
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or str(value)
    place = getattr(value, "__module__", None) or getattr(getattr(value, "__objclass__", None), "__qualname__", "")
    return _hash("named", type(value).__name__.encode(), str(place).encode(), str(name).encode(), *parts)


def _tell_set(walk: _Walk, values: set[Any] | frozenset[Any]) -> bytes:
    return _hash("set", *sorted(map(walk.of, values)))


def _parts(kind: str, *names: str) -> Callable[[_Walk, Any], bytes]:
    """How to tell an object by some of its attributes."""
    return lambda walk, value: _hash(kind, *(walk.of(getattr(value, name)) for name in names))


def _exact(kind: type, tell: Callable[[_Walk, Any], bytes]) -> Callable[[_Walk, Any], bytes]:
    """For a container itself; one derived from it may hold more, and is told by what it would be made of."""
    return lambda walk, value: tell(walk, value) if type(value) is kind else walk._reduced(value)


_TELL: tuple[tuple[Any, Callable[[_Walk, Any], bytes]], ...] = (
    (nn.Module, _tell_module),
    (Tensor, _tell_tensor),
    ((np.ndarray, np.generic), _tell_array),
    (torch.Generator, _tell_generator),
    (_NAMED, _tell_named),
    (type, _tell_class),
    (types.FunctionType, _tell_function),
    (types.MethodType, _tell_method),
    (types.CodeType, _tell_code),
    (types.ModuleType, lambda _, value: _hash("module", f"{value.__name__} {library_of(value.__name__)}".encode())),
    (types.MappingProxyType, _Walk.mapping),
    (property, _parts("property", "fget", "fset", "fdel")),
    (staticmethod, _parts("static", "__func__")),
    (classmethod, _parts("class method", "__func__")),
    (functools.cached_property, _parts("cached property", "func")),
    (functools._lru_cache_wrapper, _parts("cached", "__wrapped__")),
    (weakref.ref, lambda walk, value: _hash("reference", walk.of(value()))),
    (dict, _exact(dict, _Walk.mapping)),
    (list, _exact(list, _Walk.all)),
    (tuple, _exact(tuple, _Walk.all)),
    (set, _exact(set, _tell_set)),
    (frozenset, _exact(frozenset, _tell_set)),
)
