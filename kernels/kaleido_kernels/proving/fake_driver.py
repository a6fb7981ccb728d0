"""A device that is not there: kernels are compiled for it as a launch would compile them, and nothing runs.

Works where there is no GPU, and for other GPUs than the one that is there.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon import language as gluon_language
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia import hopper as gluon_hopper
from triton.runtime import JITFunction, driver
from triton.runtime.cache import get_cache_key
from triton.tools.tensor_descriptor import TensorDescriptor

from kaleido_kernels.variant import Variant

TORCH_TYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "i32": torch.int32,
    "i64": torch.int64,
}

Watcher = Callable[[Any, Any, dict[str, Any], Any], None]
"""Called with the ``triton.jit`` function, what was made of it, its arguments by name (constants too), and the grid."""


def gpu_target(arch: str) -> GPUTarget:
    """Triton's target for "sm_90" and its like, or for AMD's "gfx942"."""
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


class FakeDriver:
    """What Triton asks of a driver: a device that takes every kernel and runs none.

    Attributes:
        device: Triton keeps kernels by it; the driver itself, so that those made here are for no other device.
        launcher_cls: makes what is called in the place of a launch.
    """

    def __init__(self, arch: str) -> None:
        self.target = gpu_target(arch)
        self.device: object = self
        self.utils = _FakeUtils()
        self.launcher_cls: Callable[..., Callable[..., None]] = lambda source, metadata: _launch_nothing

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> object:
        return self.device

    def get_current_stream(self, device: object = None) -> int:
        return 0


class _FakeUtils:
    def get_device_properties(self, device: object) -> dict[str, int]:
        return {"max_shared_mem": 2**31 - 1}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: object
    ) -> tuple[object, object, int, int, int]:
        """(module, function, registers, spills, most threads)."""
        return object(), object(), 0, 0, 1024


def _launch_nothing(*arguments: object) -> None:
    pass


@contextmanager
def fake_device(arch: str = "sm_90") -> Iterator[FakeDriver]:
    """Make a device of ``arch`` that is not there the current one for Triton: launches compile, load and do nothing.

    For one thread at a time, as everything here.

    Raises:
        RuntimeError: kernels were loaded for the interpreter.
    """
    fake = FakeDriver(arch)
    with driven_by(fake):
        yield fake


@contextmanager
def driven_by(fake: FakeDriver) -> Iterator[None]:
    """Make a driver the current one for Triton.

    Raises:
        RuntimeError: kernels were loaded for the interpreter.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so nothing would be compiled: unset it and run again")
    before = current_driver()
    driver.set_active(fake)
    try:
        yield
    finally:
        driver.set_active(before)


def current_driver() -> Any:
    """The driver that is in use; None where Triton has not looked for one yet."""
    return getattr(driver, "_active", None)


@contextmanager
def compile_only(watch: Watcher, arch: str = "sm_90") -> Iterator[None]:
    """Launches inside compile for ``arch``, and nothing runs: tensors may lie in main memory and keep what they hold.

    Args:
        watch: gets the compiled kernel.
        arch: of the device that is not there.
    """
    with fake_device(arch), _watched_launches(watch):
        yield


@contextmanager
def keys_only(watch: Watcher, arch: str = "sm_90") -> Iterator[None]:
    """Launches inside neither compile nor run: ``watch`` gets the hash under which Triton's cache holds the kernel."""
    found: list[str] = []

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.append(_cache_hash(fn.jit_function, compile, gpu_target(arch)))
        return True  # "compiled already"

    with fake_device(arch), knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = hook
        with _watched_launches(lambda kernel, _, arguments, grid: watch(kernel, found.pop(), arguments, grid)):
            yield


def compile_variant(variant: Variant, arch: str = "sm_90") -> Any:
    """The kernel that a launch of ``variant`` on a device of ``arch`` would compile."""
    made: list[Any] = []
    with compile_only(lambda _, compiled, *rest: made.append(compiled), arch):
        variant.launch(1, _stand_ins(variant))
    return made[0]


def variant_key(variant: Variant, arch: str = "sm_90") -> str:
    """The hash under which Triton's cache holds ``variant`` compiled for ``arch``, without compiling it."""
    made: list[str] = []
    with keys_only(lambda _, key, *rest: made.append(key), arch):
        variant.launch(1, _stand_ins(variant))
    return made[0]


@contextmanager
def _watched_launches(watch: Watcher) -> Iterator[None]:
    run = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        made = run(self, *args, grid=grid, warmup=True, **kwargs)
        names = set(self.arg_names)
        arguments = dict(zip(self.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        watch(self, made, arguments, grid)
        return made

    JITFunction.run = warm_up
    try:
        yield
    finally:
        JITFunction.run = run


def _stand_ins(variant: Variant) -> list[Any]:
    """Arguments of the types of a variant's signature."""
    return [_stand_in(kind) for kind in variant.signature.values()]


def _stand_in(kind: str) -> Any:
    if kind == "none":
        return None
    if kind.startswith("*"):
        return torch.empty(1, dtype=TORCH_TYPES[kind[1:]])
    if found := re.fullmatch(r"tensordesc<(\w+)\[(\d+), ?(\d+)\](?:,NVMMASharedLayout\((.*)\))?>", kind):
        block = [int(found[2]), int(found[3])]
        tensor = torch.empty(block, dtype=TORCH_TYPES[found[1]])
        if found[4] is None:
            return TensorDescriptor.from_tensor(tensor, block)
        return gluon_hopper.TensorDescriptor.from_tensor(tensor, block, _layout(found[4]))
    return 0.0 if kind.startswith("fp") else 1


def _layout(text: str) -> gluon_language.NVMMASharedLayout:
    """The layout whose arguments are written as in its repr."""
    call = ast.parse(f"layout({text})", mode="eval").body
    assert isinstance(call, ast.Call)
    options = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg is not None}
    return gluon_language.NVMMASharedLayout(*map(ast.literal_eval, call.args), **options)


def _cache_hash(kernel: Any, request: dict[str, Any], target: GPUTarget) -> str:
    """The hash that ``triton.compile`` makes from what its hook gets."""
    made = GluonASTSource if kernel.is_gluon() else ASTSource
    source = made(kernel, request["signature"], request["constants"], request["configs"][0])
    told = json.loads(request["specialization_data"])["options"]  # tuples are lists there
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    backend = make_backend(target)
    key = get_cache_key(source, backend, backend.parse_options(options), get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()
