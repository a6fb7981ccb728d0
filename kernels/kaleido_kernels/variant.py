"""What decides a kernel's machine code, in one place: launches, inspection and compiling ahead of time all go by it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

ALIGNMENT = 16
"""Bytes: pointers are compiled as multiples of this."""
SHARED_MODULES = ("kaleido_kernels.philox", "kaleido_kernels.steps", "kaleido_kernels.noise")
"""Device functions that kernels share, those that are called first."""


@dataclass(frozen=True, eq=False)
class Variant:
    """A kernel with all that is compiled into it.

    Every pointer starts at a multiple of `ALIGNMENT` bytes, as torch's allocations do; a launch with one that does not
    is another kernel, which Triton compiles for it. Integers are not specialised: the kernels say so themselves.

    Args:
        kernel: the ``triton.jit`` or ``gluon.jit`` function; its compile-time constants come last.
        signature: name -> type of each argument of a launch, in any order: "*fp16", "i64", "fp32", "none" for a tensor
            that is not there, or "tensordesc<fp16[128,64]>" for a copy descriptor; in Gluon its layout is part of the
            type, as its repr: "tensordesc<fp16[128,64],NVMMASharedLayout(swizzle_byte_width=128, ...)>".
        constants: name -> value of each compile-time constant.
        num_warps, num_stages: the compiler's options.
        max_registers: most registers of a thread, so that more programs fit a multiprocessor; None for what it takes.

    Raises:
        ValueError: names that are not the kernel's, or numbers whose type the kernel does not say itself: the first
            launch's values would decide it, and later ones be cut to it.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    _pointers: tuple[int, ...] = field(default=(), init=False, repr=False)
    _compiled: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        names = list(self.kernel.arg_names)
        signature = {name: self.signature[name] for name in names if name in self.signature}
        constants = {name: self.constants[name] for name in names if name in self.constants}
        odd = {*self.signature, *self.constants} ^ set(names)
        if odd or [*signature, *constants] != names:
            what = ", ".join(sorted(odd)) or "compile-time constants before other arguments"
            raise ValueError(f"{self.kernel.__name__}: {what}: give each argument once, the constants last")
        _refuse_untyped(self.kernel, signature)
        pointers = (place for place, kind in enumerate(signature.values()) if kind.startswith("*"))
        hash_in_order(self.kernel.__module__)
        for name, value in (("signature", signature), ("constants", constants), ("_pointers", tuple(pointers))):
            object.__setattr__(self, name, value)

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options by their names in Triton."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}

    def launch(self, n_programs: int, arguments: Sequence[Any]) -> None:
        """Run ``n_programs`` (at least 1) on the current device; the first launch there compiles.

        Args:
            n_programs: the grid.
            arguments: values of ``signature`` in the kernel's order, of these types.
        """
        if not _goes_unwatched(self.kernel):
            self._launch_by_jit(n_programs, arguments)
            return
        # Triton's own path looks a kernel up anew at every launch, which takes it 20 to 40 microseconds.
        place = (driver.active, driver.active.get_current_device())
        aligned = not any(arguments[number].data_ptr() % ALIGNMENT for number in self._pointers)
        compiled = self._compiled.get(place) if aligned else None
        if compiled is not None:
            compiled[n_programs, 1, 1](*arguments, *self.constants.values())
            return
        compiled = self._launch_by_jit(n_programs, arguments)
        # On AMD the sizes of tensors are compiled in as well.
        if aligned and isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
            self._compiled[place] = compiled

    def _launch_by_jit(self, n_programs: int, arguments: Sequence[Any]) -> Any:
        return self.kernel[(n_programs,)](*arguments, **self.constants, **self.options)


def _refuse_untyped(kernel: Any, signature: dict[str, str]) -> None:
    """Refuse numbers without the type of ``signature`` in the kernel's text, as Triton reads it (``tl.int64``)."""
    for parameter in getattr(kernel, "params", ()):  # the interpreter's functions have none, and take any number
        kind = signature.get(parameter.name, "none")
        if kind != "none" and not kind.startswith(("*", "tensordesc")) and parameter.annotation_type != kind:
            said = parameter.annotation_type or "nothing"
            raise ValueError(f"{kernel.__name__}: {parameter.name} is {kind}, the kernel says {said}: annotate it")


@functools.cache
def hash_in_order(module: str) -> None:
    """Let Triton hash device functions in one order, callees first, before it makes the first key of a kernel.

    A constant that a helper uses enters a caller's key only if the helper was hashed before, so that keys would depend
    on what else a process has launched, and kernels compiled beforehand would not be found.
    """
    functions = [value for value in vars(importlib.import_module(module)).values() if isinstance(value, JITFunction)]
    for name in dict.fromkeys((*SHARED_MODULES, *(function.__module__ for function in functions))):
        for value in list(vars(importlib.import_module(name)).values()):
            if isinstance(value, JITFunction) and value.__module__ == name:
                value.cache_key


def _goes_unwatched(kernel: Any) -> bool:
    """Whether launches may leave Triton's own path out: the kernel is compiled, and nothing replaces or hooks into it.

    Hooks on launches and on loading are called all the same.
    """
    if not isinstance(kernel, JITFunction):  # the interpreter's
        return False
    run = getattr(kernel.run, "__func__", None)
    replaced = run is None or run.__module__ != JITFunction.__module__ or hasattr(run, "__wrapped__")
    hooks = kernel.pre_run_hooks or getattr(knobs.runtime, "add_stages_inspection_hook", None)
    special = getattr(knobs.runtime, "debug", None) or getattr(knobs.compilation, "instrumentation_mode", None)
    return not (replaced or hooks or special)


def use_asm_on(device: torch.device) -> bool:
    """Whether NVIDIA instructions can be written by name: not in the interpreter, not on AMD.

    CPU tensors are for the interpreter, or for a driver that only compiles.
    """
    if device.type == "cuda":
        return torch.version.hip is None
    return not knobs.runtime.interpret and _backend(driver.active) == "cuda"


@functools.lru_cache(maxsize=16)
def _backend(active: Any) -> str:
    return str(active.get_current_target().backend)
