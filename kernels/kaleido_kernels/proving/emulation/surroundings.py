"""What groups of warps see of the block that they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from kaleido_kernels.proving.emulation.flow import Outline
from kaleido_kernels.proving.emulation.memory import GlobalMemory, SharedMemory
from kaleido_kernels.proving.emulation.ptx import Instruction, Kernel


class Surroundings(Protocol):
    """State of a block: see `kaleido_kernels.proving.emulation.block.Block`, which is one."""

    kernel: Kernel
    outline: Outline
    memory: GlobalMemory
    parameters: Any
    descriptors: Any
    shared: SharedMemory
    index: int
    n_blocks: int
    n_instructions: int
    last_instruction: int
    barriers: Any
    waits_for: Any
    open_products: Any
    product_groups: Any
    open_copies: Any
    copy_groups: Any
    conditions: Any

    def barrier_at(self, address: int, where: str) -> Any:
        """The barrier in shared memory at an address."""
        ...

    def publish(self, number: int) -> None:
        """Let the copy engine see what a group of warps stored."""
        ...

    def divide(self, group: Any, which: list[int], places: list[int]) -> None:
        """Let warps of a group go on apart, each in its partition."""
        ...

    def meet(self, group: Any, instruction: Instruction) -> Iterator[Any]:
        """A barrier of warps."""
        ...

    def change_registers(self, group: Any, instruction: Instruction) -> Iterator[Any]:
        """Take or give registers."""
        ...
