"""A driver for Triton whose device is the emulator: launches on CPU tensors compile for sm_90 and run here.

The launch path is Triton's own, so what runs is what a launch on such a GPU would run: the same variant, options and
cache key. Only the last step, handing the binary to the GPU, is another.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kaleido_kernels.proving.architectures import FACTS
from kaleido_kernels.proving.emulation.block import Block, Conditions
from kaleido_kernels.proving.emulation.copies import CopyDescriptor
from kaleido_kernels.proving.emulation.errors import AccessError, EmulatorError, UnknownInstructionError
from kaleido_kernels.proving.emulation.kinds import Array
from kaleido_kernels.proving.emulation.memory import PARAMETER_SPACING, PARAMETERS, GlobalMemory
from kaleido_kernels.proving.emulation.memory import Tensor as Piece
from kaleido_kernels.proving.emulation.ptx import Kernel, parse_kernel
from kaleido_kernels.proving.fake_driver import FakeDriver, current_driver, driven_by

SWIZZLE_BYTES = {0: 0, 1: 32, 2: 64, 3: 128}
"""Swizzle mode in Triton's account of a descriptor -> bytes of its period."""


@dataclass(frozen=True)
class Launched:
    """One launch: the kernel, the hash of its variant, blocks of threads, instructions that were run, seconds."""

    kernel: str
    hash: str
    n_blocks: int
    n_instructions: int
    seconds: float


@dataclass
class Emulator:
    """Runs launches.

    Args:
        conditions: what the machine may choose.
        change: the PTX that is run in place of the compiled one, for faults planted in tests.
        launches: what was run so far.
    """

    conditions: Conditions = field(default_factory=Conditions)
    change: Callable[[str], str] | None = None
    launches: list[Launched] = field(default_factory=list)
    _parsed: dict[str, Kernel] = field(default_factory=dict)

    def run(self, source: Any, metadata: Any, arguments: Sequence[Any], n_blocks: int) -> None:
        """Run a launch of ``n_blocks`` blocks; ``arguments`` are the kernel's, constants included.

        Raises:
            EmulatorError: what it runs is wrong, or unknown to the emulator.
        """
        began = time.perf_counter()
        if metadata.hash not in self._parsed:
            text = ptx_of(source, metadata)
            self._parsed[metadata.hash] = _parsed(self.change(text) if self.change else text)
        kernel = self._parsed[metadata.hash]
        given = _Arguments(source.signature, list(getattr(metadata, "tensordesc_meta", None) or []))
        given.add_all(source.fn.arg_names, arguments)
        n_hidden = len(kernel.parameters) - len(given.values)  # pointers to scratch that Triton adds, unused here
        if not 0 <= n_hidden <= 2:
            raise EmulatorError(
                f"{kernel.name} takes {len(kernel.parameters)} parameters, {len(given.values)} arguments were given"
            )
        values = [*given.values, *[0] * n_hidden]
        parameters = dict(zip(kernel.parameters, values, strict=True))
        block = Block(kernel, given.memory, parameters, given.descriptors, metadata.shared, self.conditions)
        with np.errstate(all="ignore"):
            for index in range(n_blocks):
                block.run(index, n_blocks)
        self.launches.append(
            Launched(kernel.name, metadata.hash, n_blocks, block.n_instructions, time.perf_counter() - began)
        )


_parsed = functools.lru_cache(maxsize=16)(parse_kernel)  # the same text runs under many conditions


class CompileOnly(Emulator):
    """Runs nothing: launches compile, and what they would fill stays as it is."""

    def run(self, source: Any, metadata: Any, arguments: Sequence[Any], n_blocks: int) -> None:
        """Note the launch."""
        self.launches.append(Launched(source.name, metadata.hash, n_blocks, 0, 0.0))


def ptx_of(source: Any, metadata: Any) -> str:
    """The PTX of a compiled kernel, from Triton's cache."""
    from triton.runtime.cache import get_cache_manager

    name = source.name[:150]
    group = get_cache_manager(metadata.hash).get_group(f"{name}.json") or {}
    path = group.get(f"{name}.ptx")
    if path is None:
        raise UnknownInstructionError(
            f"{name}: no PTX in Triton's cache: unset TRITON_STORE_BINARY_ONLY, and use another TRITON_CACHE_DIR"
        )
    return Path(path).read_text()


class _Arguments:
    """A launch's arguments as parameters of the machine program, and the memory behind them."""

    def __init__(self, signature: dict[str, Any], metas: list[Any]) -> None:
        self.signature, self.metas = signature, metas
        self.memory = GlobalMemory()
        self.values: list[int | float | None] = []
        self.descriptors: dict[int, CopyDescriptor] = {}
        self._pieces: dict[int, Piece] = {}  # by the address of the storage
        self._keep: list[Any] = []

    def add_all(self, names: Sequence[str], arguments: Sequence[Any]) -> None:
        for name, argument in zip(names, arguments, strict=True):
            if self.signature.get(name) == "constexpr":  # also what was specialised to 1
                continue
            if isinstance(argument, Tensor):
                self.values.append(self._address(name, argument))
            elif hasattr(argument, "base"):
                self._descriptor(name, argument)
            elif isinstance(argument, bool | int | float):
                self.values.append(argument)
            else:
                raise EmulatorError(f"argument {name} is a {type(argument).__name__}: no rule for it")

    def _address(self, name: str, tensor: Tensor) -> int:
        piece = self._piece(name, tensor)
        return piece.start + tensor.data_ptr() - tensor.untyped_storage().data_ptr()

    def _piece(self, name: str, tensor: Tensor) -> Piece:
        """The tensor's storage, added to memory when it is first seen."""
        if tensor.device.type != "cpu":
            raise EmulatorError(f"argument {name} is on {tensor.device}: the emulator takes tensors in main memory")
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._pieces:
            self._keep.append(storage)
            self._pieces[address] = self.memory.add(name, storage_bytes(tensor), address)
        return self._pieces[address]

    def _descriptor(self, name: str, argument: Any) -> None:
        """A copy descriptor becomes three parameters or more: itself, its shape and its strides."""
        if not self.metas:
            raise EmulatorError(f"descriptor {name} is not for the copy engine: no rule for it")
        base, meta = argument.base, self.metas.pop(0)
        if argument.padding != "zero" or getattr(argument, "round_f32_to_tf32", False) or meta["fp4_padded"]:
            raise EmulatorError(f"descriptor {name} pads with NaN or converts what is copied: no rule for it")
        rows, cols = (int(size) for size in argument.shape)
        if base.storage_offset() or not base.is_contiguous():
            raise AccessError(f"descriptor {name}: its tensor is a view")
        if tuple(argument.strides) != (cols, 1) or rows * cols > base.numel():
            raise AccessError(f"descriptor {name}: its rows are not all of its tensor's memory, one after the other")
        piece = self._piece(name, base)
        piece.watched = True
        block_rows, block_cols = meta["block_size"]
        swizzle = SWIZZLE_BYTES[int(meta["swizzle"])]
        descriptor = CopyDescriptor(piece, rows, cols, (block_rows, block_cols), base.element_size(), swizzle)
        self.descriptors[PARAMETERS + PARAMETER_SPACING * len(self.values)] = descriptor
        self.values += [None, *(int(size) for size in argument.shape), *(int(size) for size in argument.strides)]


def storage_bytes(tensor: Tensor) -> Array:
    """The bytes of a tensor's storage, shared with it."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return np.zeros(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()))


class EmulatedDriver(FakeDriver):
    """A device that is not there, whose launches ``emulator`` runs."""

    def __init__(self, emulator: Emulator) -> None:
        super().__init__("sm_90")
        self.emulator = emulator
        self.device = "emulator"  # the same for every emulator: Triton keeps loaded kernels by it
        self.launcher_cls = _launcher


def _launcher(source: Any, metadata: Any) -> Callable[..., None]:
    """What runs a compiled kernel; Triton calls it with grid, stream, handles, hooks, then the arguments."""

    def launch(x: int, y: int, z: int, *rest: Any) -> None:
        if (y, z) != (1, 1):
            raise EmulatorError(f"a grid of {x} x {y} x {z} blocks: the emulator takes one dimension")
        if metadata.shared > FACTS["sm_90"].shared_memory:
            raise EmulatorError(f"{source.name} takes {metadata.shared:,} bytes of shared memory, sm_90 has fewer")
        current = current_driver()  # Triton keeps this function, also for the next emulator
        assert isinstance(current, EmulatedDriver)
        current.emulator.run(source, metadata, rest[-len(source.fn.arg_names) :], x)

    return launch


def is_active() -> bool:
    """Whether launches run in an emulator now."""
    return isinstance(current_driver(), EmulatedDriver)


@contextlib.contextmanager
def emulated(emulator: Emulator) -> Iterator[Emulator]:
    """Within it, launches of compiled kernels on CPU tensors run in ``emulator``.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, which replaces the compiler.
    """
    with driven_by(EmulatedDriver(emulator)):
        yield emulator
