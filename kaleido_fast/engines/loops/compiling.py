"""How the loops are compiled: as entries, as parts of them, or pasted into their one caller."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.extending import intrinsic as _typed_intrinsic

from kaleido_fast.engines.code_cache import CodeCache, code_folders, config

intrinsic: Any = _typed_intrinsic  # its annotations count the typing context as an argument of the call
IS_COMPILED = not config.DISABLE_JIT

# Nothing is allocated here, so that arrays need no counts of references: each is an atomic operation that waits for all
# stores before it (a layer of 10 values: 2.1 ns a chain with them, 1.0 without).
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False, "no_cfunc_wrapper": True}
NO_WRAPPERS: dict[str, Any] = {"no_cpython_wrapper": True}  # Python calls no part: 4.3 s to compile all, 4.9 with them


def inner(function: Callable[..., Any]) -> Any:
    """Compile as a part of an `entry`."""
    return numba.njit(**OPTIONS, **NO_WRAPPERS)(function)


def pasted(function: Callable[..., Any]) -> Any:
    """Compile inside its one caller: each level of calls would optimise all code below it once more (11 s, not 5).

    What calls nothing large is better off as `inner`: numba copies what it pastes (4.7 s for all, 4.5).
    """
    return numba.njit(**OPTIONS, **NO_WRAPPERS, inline="always")(function)


def entry(function: Callable[..., Any]) -> Any:
    """Compile at the first call, to run without the interpreter's lock; keep the code on disk if there is a place."""
    dispatcher = numba.njit(**OPTIONS)(function)
    if IS_COMPILED and Path(__file__).is_file():  # the cache asks whether it has changed
        dispatcher._cache = CodeCache(function, code_folders)
    return dispatcher


@intrinsic
def apart(typingctx: Any) -> Any:
    """Let LLVM copy this function into none of its callers: what rarely runs, and would be optimised again in each."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def wide_vectors(typingctx: Any) -> Any:
    """Let LLVM make vectors of 512 bits, where there are any, of the loops of this function.

    By itself it makes half of that for most processors of Intel, for the clock's sake, which the products need anyway
    (tanh: 0.44 ns a value, 0.35 with it; gelu 0.73, 0.54).
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # llvmlite's own `add` takes only attributes that are one word
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), codegen
