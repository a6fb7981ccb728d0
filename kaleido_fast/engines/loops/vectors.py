"""Vector instructions written out: from loops, LLVM makes a third of the speed."""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils

from kaleido_fast.engines.loops.processor import VECTOR


class Emitter:
    """Vector instructions on byte addresses (64-bit integers); operands are fp32, or pairs of bf16 in 32 bits."""

    def __init__(self, builder: Any, paired: bool) -> None:
        self.builder, self.paired = builder, paired
        self.vector = ir.VectorType(ir.FloatType(), VECTOR)
        self.operand = ir.VectorType(ir.IntType(32), VECTOR) if paired else self.vector

    def shift(self, address: Any, n_bytes: int) -> Any:
        return self.builder.add(address, ir.Constant(ir.IntType(64), n_bytes)) if n_bytes else address

    def load(self, address: Any, kind: Any) -> Any:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=4)

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, self.builder.inttoptr(address, self.vector.as_pointer()), align=4)

    def prefetch(self, address: Any, cache: int) -> None:
        """Ask for the cache line at an address, into the first or the second level; any address will do."""
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, *[ir.IntType(32)] * 3])
        prefetch = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        read, locality, data = (ir.Constant(ir.IntType(32), value) for value in (0, 4 - cache, 1))
        self.builder.call(prefetch, [self.builder.inttoptr(address, byte), read, locality, data])

    def spread(self, scalar: Any) -> Any:
        empty = ir.Constant(ir.VectorType(scalar.type, VECTOR), ir.Undefined)
        first = self.builder.insert_element(empty, scalar, ir.Constant(ir.IntType(32), 0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), VECTOR), [0] * VECTOR)
        return self.builder.shuffle_vector(first, empty, lanes)

    def add_product(self, x: Any, w: Any, total: Any) -> Any:
        """total + x w in one rounding; of pairs, total + x0 w0 + x1 w1, by the instruction that LLVM 15 and 20 both
        know under one name only in assembler.
        """
        if not self.paired:
            kind = ir.FunctionType(self.vector, [self.vector] * 3)
            fma = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fmuladd.v{VECTOR}f32")
            return self.builder.call(fma, [x, w, total])
        kind = ir.FunctionType(self.vector, [self.operand, self.operand, self.vector])
        return self.assembler(kind, "vdpbf16ps $2, $1, $0", "=v,v,v,0", [x, w, total])

    def assembler(self, kind: Any, text: str, constraints: str, arguments: list[Any], effects: bool = False) -> Any:
        """Instructions in assembler; with ``effects`` none is dropped, and no access to memory moves across."""
        binding.initialize_native_asmparser()
        return self.builder.asm(kind, text, constraints, arguments, effects)

    def phi(self, kind: Any, first: Any, entry: Any) -> Any:
        phi = self.builder.phi(kind)
        phi.add_incoming(first, entry)
        return phi
