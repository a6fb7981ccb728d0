"""Digests of code: functions and classes by their bytecode, those of libraries by name and version."""

from __future__ import annotations

import builtins
import dis
import functools
import site
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping
from typing import Any

from kaleido_fast.modules.walk import Walk, hash_of

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


def tell_function(walk: Walk, function: types.FunctionType) -> bytes:
    """A function by its bytecode, defaults, closure and globals; one of a library by its name and version."""
    inner = vars(function).get("_torchdynamo_orig_callable")
    if inner is not None:  # it only says whether to compile
        return walk.of(inner)
    parts = [function.__qualname__.encode()]
    library = library_of(function.__globals__.get("__name__"))  # of the code, which a wrapper of another name may hold
    if library is not None:
        parts.append(f"{function.__module__} {library}".encode())
        if _finds(function):
            return hash_of("function", *parts)
    code = function.__code__
    document = code.co_consts[:1] == (function.__doc__,) and function.__doc__ is not None
    parts += [
        tell_code(walk, code, documented=document),
        walk.of(function.__defaults__),
        walk.of(function.__kwdefaults__),
        walk.all(map(_cell, function.__closure__ or ())),
        walk.named(vars(function), set()),
    ]
    if library is None:
        parts.append(walk.named(_used(code, function.__globals__), set()))
    return hash_of("function", *parts)


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


def tell_code(walk: Walk, code: types.CodeType, *, documented: bool = False) -> bytes:
    """Bytecode with its names, counts and constants, less the text of its documentation."""
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    constants = code.co_consts[1:] if documented else code.co_consts
    exceptions = getattr(code, "co_exceptiontable", b"")  # Python 3.11
    return hash_of("code", code.co_code, exceptions, walk.of(names), walk.of(counts), walk.all(constants))


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
    """What code may mean by attributes of a module: of the user's own modules and packages the things themselves."""
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


def tell_class(walk: Walk, kind: type) -> bytes:
    """A class by its bases and attributes; one of a library by its name and version."""
    library = library_of(kind.__module__)
    if library is not None and _finds(kind):
        name = f"{kind.__module__}.{kind.__qualname__} {library}".encode()
        replaced = _set_from_outside(kind)
        return hash_of("class", name, walk.named(replaced, set())) if replaced else hash_of("class", name)
    if kind.__module__ == "torch.nn.utils.parametrize":
        # Made for a module, which its properties hold, also those of a copy; what they call are parts of the module.
        return hash_of("parametrized", walk.all(kind.__bases__), walk.all(sorted(vars(kind))))
    parts = [kind.__qualname__.encode(), walk.all(kind.__bases__), walk.named(vars(kind), _NOT_OF_A_CLASS)]
    if type(kind) is not type:
        parts.append(walk.of(type(kind)))
    return hash_of("class", *parts)


def _set_from_outside(kind: type) -> dict[str, Any]:
    """Methods of a library's class that are the user's own code, set on it or on a class it is derived from."""
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
    """Version of the library that a module belongs to ("" for none known); None for the user's own code."""
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


def tell_method(walk: Walk, method: types.MethodType) -> bytes:
    """A method by its function and what it is bound to."""
    return hash_of("method", walk.of(method.__func__), walk.of(method.__self__))


def tell_named(walk: Walk, value: Any) -> bytes:
    """A built-in by its name, and by what it is bound to."""
    owner = getattr(value, "__self__", None)
    bound = owner is not None and not isinstance(owner, (types.ModuleType, type))
    parts = [walk.of(owner)] if bound else []
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or str(value)
    place = getattr(value, "__module__", None) or getattr(getattr(value, "__objclass__", None), "__qualname__", "")
    return hash_of("named", type(value).__name__.encode(), str(place).encode(), str(name).encode(), *parts)
