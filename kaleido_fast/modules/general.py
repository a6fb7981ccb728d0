"""Modules that are no plain MLP: what is asked of them, and the copy of one that is run as in evaluation."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import operator
import threading
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from kaleido_fast.errors import InputError
from kaleido_fast.modules.bytecode import library_of, used_by
from kaleido_fast.modules.linear_layers import uncached
from kaleido_fast.modules.wrappers import as_written, is_compiled, why_more_than_compiled

_MOST_ITEMS = 10_000  # of a list or dictionary that is searched for modules: longer ones hold data
_BORROWING = threading.RLock()  # one thread at a time runs a module of the caller's and restores its mode


def check_data_range(data_range: object) -> tuple[float, float]:
    """``data_range`` as two floats.

    Raises:
        InputError: anything but two finite numbers, ascending also in fp32.
    """
    wanted = "it must be two finite numbers (low, high), low below high, such as (-1.0, 1.0)"
    try:
        low, high = (_number(value) for value in data_range)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as problem:
        raise InputError(f"data_range is {data_range!r}: {wanted}") from problem
    ends = torch.tensor([low, high], dtype=torch.float32, device="cpu")
    if not bool(torch.isfinite(ends).all()) or not 0 < float(ends[1] - ends[0]) < math.inf:
        raise InputError(f"data_range is ({low!r}, {high!r}): {wanted}")
    return low, high


def check_dim(dim: object) -> int:
    """``dim`` as a whole number, at least 1; anything else is an `InputError`."""
    try:
        if isinstance(dim, bool):
            raise TypeError
        size = operator.index(dim)  # type: ignore[arg-type]
    except TypeError as problem:
        raise InputError(f"dim is {dim!r}: it must be a whole number, at least 1") from problem
    if size < 1:
        raise InputError(f"dim is {size}: it must be a whole number, at least 1")
    return size


def check_module(module: nn.Module) -> None:
    """Refuse a module whose weights are not there yet, or that cannot be evaluated: `InputError`."""
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise InputError(f"a {type(module).__name__} has no values yet for {name}: call it once on data before")
    for inner in filter(is_compiled, reached(module)):
        more = why_more_than_compiled(inner)
        if more:
            kind = type(inner._orig_mod).__name__
            raise InputError(
                f"{more} was set on what torch.compile returned for a {kind}: no copy has it; set it on the module "
                "itself, and compile after that"
            )
    for name, inner in module.named_modules():
        if isinstance(inner, _BatchNorm) and inner.running_mean is None:
            raise InputError(
                f"{type(inner).__name__} {name or 'itself'} of a {type(module).__name__} keeps no running statistics: "
                "a chain would depend on those beside it; make it with track_running_stats=True, or use GroupNorm"
            )


def damaged_weight(module: nn.Module) -> str | None:
    """The name of the first weight with NaN in it, or infinite values."""
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter.detach()).all()):
            return name
    return None


def weight_type(module: nn.Module) -> torch.dtype | None:
    """The type of the first weights (else buffers) that are floating, in which a module takes its input."""
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)


@dataclass(frozen=True)
class Evaluated:
    """A module in a form that can be run as in evaluation without a trace on the caller's.

    Args:
        module: what to call, inside of ``running``.
        borrowed: modules of the caller's that it calls: those that its code holds in a way that no copy can follow,
            or itself and all its parts where it cannot be copied.
    """

    module: nn.Module
    borrowed: tuple[nn.Module, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Evaluated:
        """The module as a copy with memory of its own; itself where it cannot be copied, or memory is too short.

        What torch compiled is left behind: the copy runs as its code is written. Attributes that Python cannot copy,
        such as locks, are shared with the original.
        """
        module = as_written(module)
        with torch.inference_mode(False):  # weights copied in it could not be used for gradients in a forward
            return cls._of(module)

    @classmethod
    def _of(cls, module: nn.Module) -> Evaluated:
        theirs = reached(module)
        copied = _copy(module)
        if copied is None:
            return cls(module, tuple(theirs))
        for inner in list(copied.modules()):
            for name, child in list(inner.named_children()):
                if as_written(child) is not child:
                    setattr(inner, name, as_written(child))
        known = set(map(id, theirs))
        parts = reached(copied)
        _to_evaluation([part for part in parts if id(part) not in known])
        return cls(copied, tuple(part for part in parts if id(part) in known))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What is borrowed is in evaluation mode; afterwards its modes and buffers are as before, whatever happened."""
        with _BORROWING if self.borrowed else contextlib.nullcontext(), uncached(), self._borrowing():
            yield

    @contextlib.contextmanager
    def _borrowing(self) -> Iterator[None]:
        modes = [(part, part.training) for part in self.borrowed]
        tensors = {id(buffer): buffer for part in self.borrowed for buffer in part.buffers(recurse=False)}
        before = [(buffer, buffer.detach().clone()) for buffer in tensors.values()]
        try:
            _to_evaluation(self.borrowed)
            yield
        finally:
            _restore_modes(modes)
            with torch.no_grad():
                for buffer, values in before:
                    if not torch.equal(buffer, values):
                        buffer.copy_(values)


def reached(module: nn.Module) -> list[nn.Module]:
    """A module and all that it can call: registered, or held in attributes, containers, methods, closures, globals."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    waiting: deque[Any] = deque([module])
    while waiting:
        item = waiting.popleft()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found[id(item)] = item
            waiting.extend(item.children())
        waiting.extend(_parts(item))
    return list(found.values())


def _parts(item: Any) -> Iterable[Any]:
    """What is held by something that may lead to a module."""
    if isinstance(item, nn.Module):
        return [*vars(item).values(), *_class_parts(type(item), ["forward"])]
    if isinstance(item, (dict, types.MappingProxyType)):
        return item.values() if len(item) <= _MOST_ITEMS else ()
    if isinstance(item, (list, tuple, set, frozenset, deque)):
        return item if len(item) <= _MOST_ITEMS else ()
    if isinstance(item, types.FunctionType):
        return _function_parts(item)
    for kind, names in _HOLDERS:
        if isinstance(item, kind):
            return [getattr(item, name) for name in names]
    if isinstance(item, weakref.ref):
        return [item()]
    if isinstance(item, (type, types.ModuleType, Tensor)) or not isinstance(getattr(item, "__dict__", None), dict):
        return ()
    return [*vars(item).values(), *_class_parts(type(item), dir(type(item)))]


_HOLDERS: tuple[tuple[type, tuple[str, ...]], ...] = (
    (types.MethodType, ("__self__", "__func__")),
    (functools.partial, ("func", "args", "keywords")),
    (staticmethod, ("__func__",)),
    (classmethod, ("__func__",)),
    (property, ("fget",)),
    (functools.cached_property, ("func",)),
)


def _function_parts(function: types.FunctionType) -> list[Any]:
    held: list[Any] = [function.__defaults__, function.__kwdefaults__, vars(function)]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    used = used_by(function)
    if library_of(function.__module__) is not None:  # whatever else it uses holds no state of the user's
        used = [value for value in used if isinstance(value, nn.Module)]
    return held + used


def _class_parts(cls: type, names: Iterable[str]) -> list[Any]:
    """What a class of the user's holds; of its methods those of these names and all that they name in turn."""
    own: dict[str, Any] = {}
    for kind in reversed(cls.__mro__):
        if kind.__module__ != "builtins" and library_of(kind.__module__) is None:
            own |= vars(kind)
    found = {name: value for name, value in own.items() if not isinstance(value, types.FunctionType)}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in own and name not in found:
            found[name] = own[name]
            waiting.extend(own[name].__code__.co_names)
    return list(found.values())


def _to_evaluation(modules: Sequence[nn.Module]) -> None:
    """Call ``eval`` of the outermost, which may do more than set flags, and then of what that did not reach."""
    for module in modules:
        if any(part.training for part in module.modules()):
            # What torch.export made refuses it: its mode was fixed when it was exported.
            with contextlib.suppress(NotImplementedError):
                module.eval()


def _restore_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        if module.training != training:
            with contextlib.suppress(NotImplementedError):
                module.train(training)  # adapters, for example, merge and split their weights here
    for module, training in modes:
        if module.training != training:
            module.training = training


def _copy(module: nn.Module) -> nn.Module | None:
    with contextlib.suppress(Exception):
        return copy.deepcopy(module, _tensors_of_graphs(module))
    with contextlib.suppress(Exception):  # it holds a lock, an open file ...
        return _copied_by_parts(module, _tensors_of_graphs(module))
    return None  # no memory, or what only its own code can make


def _tensors_of_graphs(module: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy, which refuses tensors with a history, such as the weights of old norms after a step."""
    memo: dict[int, Any] = {}
    for inner in module.modules():
        for value in (*vars(inner).values(), *inner._buffers.values(), *inner._parameters.values()):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return memo


def _copied_by_parts(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """As deepcopy, but attributes that cannot be copied are shared."""
    modules = list(module.modules())
    for inner in modules:
        memo[id(inner)] = type(inner).__new__(type(inner))
    for inner in modules:
        copied = {}
        for name, value in vars(inner).items():
            known = len(memo)
            try:
                copied[name] = copy.deepcopy(value, memo)
            except Exception:
                while len(memo) > known:  # half of a copy must not be found again
                    memo.popitem()
                copied[name] = value
        vars(memo[id(inner)]).update(copied)
    return memo[id(module)]


def _number(value: object) -> float:
    if isinstance(value, (bool, str)):
        raise TypeError
    return float(value)  # type: ignore[arg-type]
