"""What decides a kernel's machine code, in one place: launches, inspection and compiling ahead of time all go by it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver


@dataclass(frozen=True, eq=False)
class Variant:
    """A kernel with all that is compiled into it.

    Every pointer starts at a multiple of 16 bytes, as torch's allocations do; a launch with one that does not
    is another kernel, which Triton compiles for it. Integers are not specialised: the kernels say so themselves.

    Args:
        kernel: the ``triton.jit`` function; its compile-time constants come last.
        signature: name -> type of each argument of a launch, in any order: "*fp16", "i64", "fp32", or
            "tensordesc<fp16[128,64]>" for a copy descriptor.
        constants: name -> value of each compile-time constant.
        num_warps, num_stages: the compiler's options.

    Raises:
        ValueError: names that are not the kernel's.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        names = list(self.kernel.arg_names)
        signature = {name: self.signature[name] for name in names if name in self.signature}
        constants = {name: self.constants[name] for name in names if name in self.constants}
        odd = {*self.signature, *self.constants} ^ set(names)
        if odd or [*signature, *constants] != names:
            what = ", ".join(sorted(odd)) or "compile-time constants before other arguments"
            raise ValueError(f"{self.kernel.__name__}: {what}: give each argument once, the constants last")
        object.__setattr__(self, "signature", signature)
        object.__setattr__(self, "constants", constants)

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options by their names in Triton."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def launch(self, n_programs: int, arguments: Sequence[Any]) -> None:
        """Run ``n_programs`` (at least 1) on the current device; the first launch there compiles.

        Args:
            n_programs: the grid.
            arguments: values of ``signature`` in the kernel's order, of these types.
        """
        self.kernel[(n_programs,)](*arguments, **self.constants, **self.options)


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
