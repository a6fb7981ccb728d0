"""What is known of a compiled kernel, and what is judged of it. Plain Python, no Triton."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from kaleido_kernels.proving.sass.program import Instruction, Program
from kaleido_kernels.proving.ttgir.operations import Block, partitions, read_operations


@dataclass(frozen=True)
class Verdict:
    """One judgement: ``detail`` says what was found, whether it passed or not."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Evidence:
    """What is known of one compiled kernel.

    Args:
        kernel: its name in `kaleido_kernels.shapes.KERNELS`.
        precision: device precision: "fp16x3", "ieee", "tf32", "fp16" or "bf16".
        jitter: the kernel's JITTER.
        arch: such as "sm_90".
        warps, registers, stack, shared: resources; warps of the launch, those of all partitions included; registers a
            thread that it begins with, stack and shared memory in bytes.
        use_tma: whether loads go through the copy engine.
        ttir: Triton IR before lowering; of a Gluon kernel, which has none, its own IR with the layouts in it.
        ttgir: the IR after Triton's GPU passes.
        program: the machine code.
        warp_groups: whether the tile's rows and warps suit warp-group products.
        loads_ahead: rounds' copies that the tile promises to be under way while a product runs.
    """

    kernel: str
    precision: str
    jitter: str
    arch: str
    warps: int
    registers: int
    stack: int
    shared: int
    use_tma: bool
    ttir: str
    ttgir: str
    program: Program = field(repr=False)
    warp_groups: bool = True
    loads_ahead: int = 0

    @cached_property
    def module(self) -> Block:
        """``ttgir`` as a tree."""
        return read_operations(self.ttgir)

    @property
    def specialised(self) -> bool:
        """Whether the kernel's warps part into partitions with code of their own."""
        return bool(partitions(self.module))

    @property
    def written(self) -> str:
        """The IR that says what the kernel computes: a Gluon kernel's own is in functions that are not inlined yet."""
        return self.ttgir if self.specialised else self.ttir


def first_text(found: list[Instruction]) -> str:
    """The first instruction, for a verdict's detail; "" for none."""
    return first_line([item.text for item in found])


def first_line(found: list[str]) -> str:
    """The first fault, for a verdict's detail; "" for none."""
    return f", first {found[0]}" if found else ""
