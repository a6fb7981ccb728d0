"""Matrix instructions: products of a warp and of a warp group, and the loads and stores of their fragments.

Sums are fp32, in the order of numpy's product; the machine's are cut where they are added and come in another order.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kaleido_kernels.proving.emulation.copies import swizzled
from kaleido_kernels.proving.emulation.errors import AccessError, EmulatorError, RaceError, UnknownInstructionError
from kaleido_kernels.proving.emulation.kinds import F32, U16, U32, Array, cut_tf32, widened
from kaleido_kernels.proving.emulation.movement import build_nothing
from kaleido_kernels.proving.emulation.ptx import Immediate, Instruction, Operand, registers_of
from kaleido_kernels.proving.emulation.threads import Mask, all_of_their_warps, only_together
from kaleido_kernels.proving.emulation.warps import Handler, Rule, Source, Warps, immediate, vector

WARP = "Warp Level Matrix Multiply-Accumulate Instructions"
GROUP = "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions"
LANE = np.arange(32)
SWIZZLE_BYTES = {1: 128, 2: 64, 3: 32}
"""Layout type in a matrix descriptor -> bytes of the swizzle (section "Matrix Descriptor Format")."""
MMA = r"mma\.sync\.aligned\.m16n8k(?P<inner>8|16)\.row\.col\.f32\.(?P<kind>f16|bf16|tf32)\.(?P=kind)\.f32"
WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k(8|16)\.f32\.(?P<kind>f16|bf16|tf32)\.(?P=kind)"
"""Products that have a rule: fp32 sums of 16-bit or TF32 operands."""
GROUP_THREADS = 128
_GROUP_LANE = np.arange(GROUP_THREADS)
GROUP_ROW = 16 * (_GROUP_LANE // 32) + (_GROUP_LANE % 32) // 4
GROUP_COL = 2 * (_GROUP_LANE % 4)
"""Row and column of a thread's first value in a fragment of a warp group (section "Register Fragments and Shared Memory
Matrix Layouts")."""


# ---- fragments between registers and shared memory


def _matrix_rows(warps: Warps, address: Callable[[], Array], n: int) -> Callable[[], Array]:
    """(warps, n, 8) addresses of the rows of ``n`` matrices, which lanes 8 i .. 8 i + 7 give."""
    return lambda: address().reshape(-1, 32)[:, : 8 * n].reshape(-1, n, 8)


def build_ldmatrix(warps: Warps, instruction: Instruction) -> Handler:
    """ldmatrix of 8 x 8 matrices of 16-bit values, transposed or not."""
    puts = [warps.target(item, "b32") for item in vector(instruction.operands[0])]
    rows_of = _matrix_rows(warps, warps.addresses(instruction.operands[1]), len(puts))
    transposed, block = "trans" in instruction.parts, warps.block

    def load(mask: Mask) -> None:
        only_together(mask, "ldmatrix")
        warps.unsynced = "a load of shared memory"
        rows = rows_of()
        block.shared.check(rows.ravel(), 16, "ldmatrix reads")
        if block.shared.in_flight:
            block.shared.refuse_in_flight((rows[..., None] + np.arange(16)).ravel(), "ldmatrix reads")
        for place, put in enumerate(puts):
            if transposed:
                pair = [rows[:, place, 2 * (LANE % 4) + i] + (LANE // 4) * 2 for i in range(2)]
                low, high = (block.shared.get(U16, at).astype(U32) for at in pair)
                put((low | high << U32(16)).ravel(), None)
            else:
                put(block.shared.get(U32, rows[:, place, LANE // 4] + (LANE % 4) * 4).ravel(), None)

    return load


def build_stmatrix(warps: Warps, instruction: Instruction) -> Handler:
    """stmatrix, by whole warps."""
    sources = [warps.source(item, "b32") for item in vector(instruction.operands[1])]
    rows_of = _matrix_rows(warps, warps.addresses(instruction.operands[0]), len(sources))
    transposed, block, number = "trans" in instruction.parts, warps.block, warps.number

    def store(mask: Mask) -> None:
        whole = all_of_their_warps(mask, "stmatrix")
        on = np.broadcast_to(whole, (warps.n_threads // 32,))
        warps.unsynced = "a store"
        rows = rows_of()[on]
        block.shared.check(rows.ravel(), 16, "stmatrix writes")
        block.shared.stored((rows[..., None] + np.arange(16)).ravel(), number)
        for place, source in enumerate(sources):
            values = source().reshape(-1, 32)[on]
            if transposed:
                for i, half in enumerate((values & U32(0xFFFF), values >> U32(16))):
                    at = rows[:, place, 2 * (LANE % 4) + i] + (LANE // 4) * 2
                    block.shared.put(U16, at, half.astype(U16))
            else:
                block.shared.put(U32, rows[:, place, LANE // 4] + (LANE % 4) * 4, values)

    return store


# ---- operands


def _decoder(kind: str) -> Callable[[Array], Array]:
    """Bits of 16-bit operands as fp32."""
    return widened if kind == "bf16" else lambda bits: bits.view(np.float16).astype(F32)


def fragment(registers: list[Array], kind: str, row: Array, col: Array, shape: tuple[int, int]) -> Array:
    """A matrix (..., rows, K) from the registers of operand A; ``row`` and ``col`` are a thread's place in it.

    16-bit types hold two values a register; register i lies 8 rows down for odd i, and 8 columns on for each pair.
    """
    matrix = np.zeros((*registers[0].shape[:-1], *shape), F32)
    if kind == "tf32":
        for i, bits in enumerate(registers):
            matrix[..., row + 8 * (i % 2), col // 2 + 4 * (i // 2)] = cut_tf32(bits)
        return matrix
    decode = _decoder(kind)
    for i, bits in enumerate(registers):
        for half in range(2):
            value = ((bits >> U32(16 * half)) & U32(0xFFFF)).astype(U16)
            matrix[..., row + 8 * (i % 2), col + 8 * (i // 2) + half] = decode(value)
    return matrix


# ---- products of a warp


def build_mma(warps: Warps, instruction: Instruction) -> Handler:
    """mma.sync of 16 x 8 results with fp32 sums."""
    found = re.fullmatch(MMA, instruction.opcode)
    assert found is not None
    inner, kind = int(found["inner"]), found["kind"]
    to, a, b, c = (vector(item) for item in instruction.operands[:4])
    puts = [warps.target(item, "b32") for item in to]
    a_bits, b_bits, c_bits = ([warps.source(item, "b32") for item in items] for items in (a, b, c))
    group, place = LANE // 4, LANE % 4

    def multiply(mask: Mask) -> None:
        only_together(mask, "mma.sync")
        left = fragment([bits().reshape(-1, 32) for bits in a_bits], kind, group, 2 * place, (16, inner))
        right = _right_fragment([bits().reshape(-1, 32) for bits in b_bits], kind, group, place, inner)
        product = left @ right
        pieces = [product[:, group + 8 * (i // 2), 2 * place + i % 2].ravel() for i in range(len(puts))]
        sums = [(piece + bits().view(F32)).view(U32) for piece, bits in zip(pieces, c_bits, strict=True)]
        for put, total in zip(puts, sums, strict=True):
            put(total, None)

    return multiply


def _right_fragment(registers: list[Array], kind: str, group: Array, place: Array, inner: int) -> Array:
    """(warps, K, 8) from the registers of operand B."""
    matrix = np.zeros((len(registers[0]), inner, 8), F32)
    for i, bits in enumerate(registers):
        if kind == "tf32":
            matrix[:, place + 4 * i, group] = cut_tf32(bits)
            continue
        for half in range(2):
            value = ((bits >> U32(16 * half)) & U32(0xFFFF)).astype(U16)
            matrix[:, 2 * place + 8 * i + half, group] = _decoder(kind)(value)
    return matrix


# ---- products of a warp group


def operand_places(descriptor: int, n: int, transposed: bool) -> Array:
    """(n, 16) byte numbers in shared memory of the 16-bit values of an operand that a matrix descriptor names.

    32 bytes of every row along the sum; section "Matrix Descriptor Format". ``transposed``: rows lie along the sum.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    layout = descriptor >> 62 & 3
    if descriptor >> 49 & 7 or layout not in SWIZZLE_BYTES:
        raise UnknownInstructionError(f"matrix descriptor {descriptor:#x}: no rule for its layout or base offset")
    width = SWIZZLE_BYTES[layout]
    row, k = np.arange(n)[:, None], np.arange(16)[None, :]
    if transposed:
        per = width // 2
        places = start + (row // per) * leading + (k // 8) * stride + (k % 8) * width + (row % per) * 2
    else:
        places = start + (row // 8) * stride + (row % 8) * width + k * 2
    return swizzled(places, width)


@dataclass
class ProductGroup:
    """Products that are committed together, while they are at work.

    Args:
        reads: byte numbers of operands in shared memory, and what was there when the products were issued.
        sums, operands: numbers of the registers that they fill and read.
    """

    reads: list[tuple[Array, Array]] = field(default_factory=list)
    sums: frozenset[int] = frozenset()
    operands: frozenset[int] = frozenset()


class _SharedOperand:
    """Reads operands of one product from shared memory, and keeps what was read until the product is done."""

    def __init__(self, warps: Warps, kind: str) -> None:
        self.warps, self.kind = warps, kind
        self.known: dict[tuple[int, int, bool], Array] = {}

    def read(self, descriptor: int, n: int, transposed: bool) -> Array:
        """(n, K) fp32."""
        block, key = self.warps.block, (descriptor, n, transposed)
        if key not in self.known:
            self.known[key] = operand_places(*key)
        places = self.known[key]
        shared = block.shared
        if int(places.max()) + 2 > shared.data.size:
            last = int(places.max()) + 1
            raise AccessError(f"a product reads byte {last} of shared memory, which has {shared.data.size}")
        if shared.states.states[places].any():
            shared.states.refuse_unseen(places.ravel(), "a product reads")
        bits = shared.get(U16, places)
        block.open_products[self.warps.number].reads.append((places, bits))
        if self.kind == "tf32":
            return cut_tf32(bits.view(U32))
        return _decoder(self.kind)(bits)


def build_wgmma(warps: Warps, instruction: Instruction) -> Handler:
    """wgmma.mma_async with fp32 sums: takes effect when issued; its operands may not change until it is waited for."""
    found = re.fullmatch(WGMMA, instruction.opcode)
    assert found is not None
    if warps.n_threads % GROUP_THREADS:
        return _refused  # warps of another partition, which have the whole program but take their own way through it
    n, kind = int(found["n"]), found["kind"]
    inner = 8 if kind == "tf32" else 16
    to, a, b, scale, *rest = instruction.operands
    flags = [item.bits for item in rest if isinstance(item, Immediate)]
    a_registers = [warps.source(item, "b32") for item in vector(a)] if len(vector(a)) > 1 else None
    if flags[:2] != [1, 1] or len(flags) != (2 if kind == "tf32" else 3 if a_registers else 4):
        raise UnknownInstructionError(f"{instruction.opcode} with flags {flags}: no rule for it")
    turned_b = bool(flags[-1]) if kind != "tf32" else False
    turned_a = bool(flags[2]) if kind != "tf32" and not a_registers else False
    left = _left_operand(warps, a, a_registers, kind, inner, turned_a)
    b_bits, keeps = warps.source(b, "b64"), warps.predicate(scale)
    read_b = _SharedOperand(warps, kind)
    numbers = [item.number for item in vector(to)]  # type: ignore[union-attr]
    sums, operands = registers_of(to), registers_of(a) if a_registers else frozenset()
    n_groups = warps.n_threads // GROUP_THREADS

    def multiply(mask: Mask) -> None:
        only_together(mask, "wgmma.mma_async")
        descriptors, keep = b_bits().reshape(n_groups, -1), keeps().reshape(n_groups, -1)
        if (keep != keep[:, :1]).any():
            raise EmulatorError("threads of a warp group keep their sums or not")
        product = np.empty((n_groups, GROUP_THREADS, n // 8, 4), F32)
        known: dict[int, Array] = {}
        for group in range(n_groups):
            at = _one(descriptors[group])
            if at not in known:
                known[at] = read_b.read(at, n, turned_b)
            whole = (left(group) @ known[at].T).reshape(64, n // 8, 8)
            for i in range(4):
                product[group, :, :, i] = whole[GROUP_ROW + 8 * (i // 2), :, GROUP_COL + i % 2]
        values = product.reshape(warps.n_threads, n // 2).T
        for number, value in zip(numbers, values, strict=True):
            before = warps.values[number].view(F32).reshape(n_groups, -1)
            total = np.where(keep, before, F32(0)).ravel() + value
            warps.values[number] = total.view(U32)
        work = warps.block.open_products[warps.number]
        work.sums, work.operands = work.sums | sums, work.operands | operands
        warps.sums_in_flight, warps.operands_in_flight = (
            warps.sums_in_flight | sums,
            warps.operands_in_flight | operands,
        )

    return multiply


def _refused(mask: Mask) -> None:
    raise EmulatorError("a product of a warp group by fewer warps than a group has")


def _left_operand(
    warps: Warps, a: Operand, registers: list[Source] | None, kind: str, inner: int, turned: bool
) -> Callable[[int], Array]:
    """A function of a warp group's number that gives its operand A, (64, K) fp32."""
    if registers is not None:

        def from_registers(group: int) -> Array:
            bits = [register().reshape(-1, GROUP_THREADS)[group] for register in registers]
            return fragment(bits, kind, GROUP_ROW, GROUP_COL, (64, inner))

        return from_registers
    descriptor, shared = warps.source(a, "b64"), _SharedOperand(warps, kind)
    return lambda group: shared.read(_one(descriptor().reshape(-1, GROUP_THREADS)[group]), 64, turned)


def _one(descriptors: Array) -> int:
    if not (descriptors == descriptors[0]).all():
        raise EmulatorError("threads of a warp group name different operands")
    return int(descriptors[0])


def build_wgmma_commit(warps: Warps, instruction: Instruction) -> Handler:
    """wgmma.commit_group."""
    block, number = warps.block, warps.number

    def commit(mask: Mask) -> None:
        block.product_groups[number].append(block.open_products[number])
        block.open_products[number] = ProductGroup()

    return commit


def build_wgmma_wait(warps: Warps, instruction: Instruction) -> Handler:
    """wgmma.wait_group: the operands of products that are done must still be what they were when issued."""
    block, number, keep = warps.block, warps.number, immediate(instruction.operands[0])

    def wait(mask: Mask) -> None:
        only_together(mask, "wgmma.wait_group")
        warps.unsynced = "a wait for products"
        while len(block.product_groups[number]) > keep:
            for places, bits in block.product_groups[number].pop(0).reads:
                if not np.array_equal(block.shared.get(U16, places), bits):
                    raise RaceError("an operand of a product was overwritten while the product was at work")
        at_work = [*block.product_groups[number], block.open_products[number]]
        warps.sums_in_flight = frozenset().union(*(group.sums for group in at_work))
        warps.operands_in_flight = frozenset().union(*(group.operands for group in at_work))

    return wait


MATRICES = r"matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared(::cta)?\.b16"
RULES: dict[str, Rule] = {
    "ldmatrix": Rule(f"{WARP}: ldmatrix", rf"ld{MATRICES}", build_ldmatrix),
    "stmatrix": Rule(f"{WARP}: stmatrix", rf"st{MATRICES}", build_stmatrix),
    "mma.sync": Rule(f"{WARP}: mma", MMA, build_mma),
    "wgmma.mma_async": Rule(f"{GROUP}: wgmma.mma_async", WGMMA, build_wgmma),
    "wgmma.fence": Rule(f"{GROUP}: wgmma.fence", r"wgmma\.fence\.sync\.aligned", build_nothing),
    "wgmma.commit_group": Rule(
        f"{GROUP}: wgmma.commit_group", r"wgmma\.commit_group\.sync\.aligned", build_wgmma_commit
    ),
    "wgmma.wait_group": Rule(f"{GROUP}: wgmma.wait_group", r"wgmma\.wait_group\.sync\.aligned", build_wgmma_wait),
}
"""Instruction -> its rule."""
