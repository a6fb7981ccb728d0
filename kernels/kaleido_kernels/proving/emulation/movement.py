"""Instructions that move values: between registers, threads, and memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kaleido_kernels.proving.emulation.errors import EmulatorError
from kaleido_kernels.proving.emulation.kinds import HELD, U32, Array, Kind, held
from kaleido_kernels.proving.emulation.memory import SharedMemory, Tensor, byte_places
from kaleido_kernels.proving.emulation.ptx import Address, Instruction, Operand, Pair, Register, Symbol, Vector
from kaleido_kernels.proving.emulation.threads import Mask, all_of_their_warps, chosen
from kaleido_kernels.proving.emulation.warps import Handler, Rule, Target, Warps, kind_of, vector

MOVE = "Data Movement and Conversion Instructions"
SYNC = "Parallel Synchronization and Communication Instructions"


def build_mov(warps: Warps, instruction: Instruction) -> Handler:
    """mov: a value, the pieces of a word, or a word from pieces."""
    to, source = instruction.operands
    width = kind_of(instruction).width
    if isinstance(to, Vector):
        return _unpack(warps, to, warps.source(source, width), width)
    if isinstance(source, Vector):
        return _pack(warps, source, warps.target(to, width), width)
    put, value = warps.target(to, width), warps.source(source, width)
    return lambda mask: put(value(), mask)


def _unpack(warps: Warps, to: Vector, value: Callable[[], Array], width: str) -> Handler:
    bits = int(width[1:]) // len(to.items)
    piece, puts = HELD[f"b{bits}"], [warps.target(item, f"b{bits}") for item in to.items]

    def unpack(mask: Mask) -> None:
        word = value()
        for place, put in enumerate(puts):
            put((word >> word.dtype.type(place * bits)).astype(piece), mask)

    return unpack


def _pack(warps: Warps, source: Vector, put: Target, width: str) -> Handler:
    bits, word = int(width[1:]) // len(source.items), HELD[width]
    values = [warps.source(item, f"b{bits}") for item in source.items]

    def pack(mask: Mask) -> None:
        result = values[0]().astype(word)
        for place, value in enumerate(values[1:], 1):
            result |= value().astype(word) << word(place * bits)
        put(result, mask)

    return pack


def build_cvta(warps: Warps, instruction: Instruction) -> Handler:
    """cvta: addresses are generic here."""
    put, value = warps.target(instruction.operands[0], "b64"), warps.source(instruction.operands[1], "b64")
    return lambda mask: put(value(), mask)


def build_shfl(warps: Warps, instruction: Instruction) -> Handler:
    """shfl.sync: a value of another lane of the warp; out of range, one's own."""
    mode = instruction.parts[2]
    result, source, lane_operand, clamp_operand, members = instruction.operands
    put = warps.target(result.value if isinstance(result, Pair) else result, "b32")
    put_found = warps.target(result.predicate, "pred") if isinstance(result, Pair) else None
    value, by, clamp = (warps.source(item, "b32") for item in (source, lane_operand, clamp_operand))
    everyone = warps.source(members, "b32")
    lane = warps.lane.astype(np.int64)
    first_of_warp = warps.warp.astype(np.int64) * 32

    def shfl(mask: Mask) -> None:
        if not (everyone() == U32(0xFFFFFFFF)).all():
            raise EmulatorError("shfl.sync of part of a warp: no rule for it")
        offset, bounds = (by() & U32(31)).astype(np.int64), clamp().astype(np.int64)
        segment, most = (bounds >> 8) & 31, bounds & 31
        last, low = (lane & segment) | (most & ~segment), lane & segment
        if mode == "idx":
            other = low | (offset & ~segment)
        else:
            other = {"up": lane - offset, "down": lane + offset, "bfly": lane ^ offset}[mode]
        found = other >= last if mode == "up" else other <= last
        place = first_of_warp + np.where(found, other, lane)
        all_of_their_warps(mask, "shfl.sync")
        put(value()[place], mask)
        if put_found is not None:
            put_found(found, mask)

    return shfl


REDUCTIONS: dict[str, np.ufunc] = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def build_redux(warps: Warps, instruction: Instruction) -> Handler:
    """redux.sync: one value from those of all lanes of a warp."""
    kind, reduce = kind_of(instruction), REDUCTIONS[instruction.parts[2]].reduce
    result, source, members = instruction.operands
    put, value = warps.target(result, "b32"), warps.typed(source, kind)
    everyone = warps.source(members, "b32")

    def redux(mask: Mask) -> None:
        if not (everyone() == U32(0xFFFFFFFF)).all():
            raise EmulatorError("redux.sync of part of a warp: no rule for it")
        all_of_their_warps(mask, "redux.sync")
        found = reduce(value().reshape(-1, 32), axis=1, dtype=kind.seen)
        put(held(np.repeat(found, 32), kind), mask)

    return redux


def build_elect(warps: Warps, instruction: Instruction) -> Handler:
    """elect.sync: one lane of every warp, here the first."""
    pair = instruction.operands[0]
    assert isinstance(pair, Pair)
    put, put_elected = warps.target(pair.value, "b32"), warps.target(pair.predicate, "pred")
    leader, elected = warps.constant(0, "b32"), warps.lane == 0

    def elect(mask: Mask) -> None:
        all_of_their_warps(mask, "elect.sync")
        put(leader, mask)
        put_elected(elected, mask)

    return elect


def build_ld(warps: Warps, instruction: Instruction) -> Handler:
    """ld from parameters, global or shared memory; 8-bit values are widened."""
    kind, items = kind_of(instruction), vector(instruction.operands[0])
    space = instruction.parts[1].split("::")[0]
    if space == "param":
        return _load_parameter(warps, instruction, kind)
    puts = [warps.target(item, register_width(item)) for item in items]
    address = warps.addresses(instruction.operands[1])
    read = _shared_reader(warps) if space == "shared" else _global_reader(warps)
    size, n = kind.size, len(items)
    stored, widths = np.dtype(f"u{size}"), [register_width(item) for item in items]

    def load(mask: Mask) -> None:
        places, piece = read(chosen(address(), mask), size * n)
        data, first = piece.values(stored, places)
        for place, (put, width) in enumerate(zip(puts, widths, strict=True)):
            found = widened_to(width, data[first + place], kind)
            put(found if mask is None else _spread(found, mask), mask)

    return load


def register_width(operand: Operand) -> str:
    """How an operand that is a register is held."""
    assert isinstance(operand, Register), operand
    return operand.width


def widened_to(width: str, bits: Array, kind: Kind) -> Array:
    """Loaded bits in a register that may be wider: signed types keep their sign (section "Operand Size Exceeding
    Instruction-Type Size")."""
    register = HELD[width]
    if bits.dtype.type is register:
        return bits
    if kind.name[0] == "s":
        signed = bits.view(np.dtype(f"i{bits.dtype.itemsize}"))
        return signed.astype(np.dtype(f"i{np.dtype(register).itemsize}")).view(register)
    return bits.astype(register)


def _spread(values: Array, mask: Array) -> Array:
    """Values of the threads that take part, in the places of all."""
    everywhere = np.zeros(len(mask), values.dtype)
    everywhere[mask] = values
    return everywhere


Reader = Callable[[Array, int], tuple[Array, Tensor | SharedMemory]]
"""(addresses, bytes at each) -> byte numbers in what holds them, checked."""


def _global_reader(warps: Warps) -> Reader:
    memory = warps.block.memory

    def read(addresses: Array, n_bytes: int) -> tuple[Array, Tensor | SharedMemory]:
        tensor = memory.find(addresses, n_bytes)
        return addresses - tensor.start, tensor

    return read


def _shared_reader(warps: Warps) -> Reader:
    block = warps.block

    def read(addresses: Array, n_bytes: int) -> tuple[Array, Tensor | SharedMemory]:
        warps.unsynced = "a load of shared memory"
        block.shared.check(addresses, n_bytes, "a load of")
        if block.shared.in_flight:
            block.shared.refuse_in_flight(byte_places(addresses, n_bytes), "a load of")
        return addresses, block.shared

    return read


def _load_parameter(warps: Warps, instruction: Instruction, kind: Kind) -> Handler:
    address = instruction.operands[1]
    assert isinstance(address, Address) and isinstance(address.base, Symbol) and address.offset == 0
    value = warps.block.parameters[address.base.name]
    bits = int(np.float32(value).view(U32)) if isinstance(value, float) else value
    assert bits is not None and (kind.width == "b32" or not isinstance(value, float))
    cut = np.array([bits & ((1 << 8 * kind.size) - 1)], np.uint64).astype(np.dtype(f"u{kind.size}"))
    width = register_width(instruction.operands[0])
    put = warps.target(instruction.operands[0], width)
    constant = warps.constant(int(widened_to(width, cut, kind)[0]), width)
    return lambda mask: put(constant, mask)


def build_st(warps: Warps, instruction: Instruction) -> Handler:
    """st to global or shared memory."""
    kind, items = kind_of(instruction), vector(instruction.operands[1])
    space = instruction.parts[1].split("::")[0]
    address = warps.addresses(instruction.operands[0])
    values = [warps.source(item, kind.width, wider=True) for item in items]  # of which the low part is stored
    size, n = kind.size, len(items)
    stored = np.dtype(f"u{size}").type
    to_shared = space == "shared"
    block, number = warps.block, warps.number

    def store(mask: Mask) -> None:
        places = chosen(address(), mask)
        warps.unsynced = "a store"
        if to_shared:
            block.shared.check(places, size * n, "a store to")
            block.shared.stored(byte_places(places, size * n), number)
            data, first = block.shared.values(stored, places)
        else:
            tensor = block.memory.find(places, size * n)
            data, first = tensor.values(stored, places - tensor.start)
            block.memory.stored(tensor, places - tensor.start, size * n, number)
        for place, value in enumerate(values):
            data[first + place] = chosen(value(), mask).astype(stored, copy=False)

    return store


def build_nothing(warps: Warps, instruction: Instruction) -> Handler:
    """An instruction without effect here: order within a group of warps is the program's."""
    return lambda mask: None


TYPE = r"[bsu](8|16|32|64)|f(32|64)"
CACHED = r"(\.(ca|cg|cs|lu|cv|wb|wt|nc))?(\.L1::\w+)?(\.L2::\w+)?"
RULES: dict[str, Rule] = {
    "mov": Rule(f"{MOVE}: mov", r"mov\.(pred|[bsu](16|32|64)|f(32|64))", build_mov),
    "cvta": Rule(f"{MOVE}: cvta", r"cvta\.param\.u64|cvta(\.to)?\.global\.u64", build_cvta),
    "ld": Rule(f"{MOVE}: ld", rf"ld\.(param|global{CACHED}|shared(::cta)?)(\.v[24])?\.({TYPE})", build_ld),
    "st": Rule(f"{MOVE}: st", rf"st\.(global{CACHED}|shared(::cta)?)(\.v[24])?\.({TYPE})", build_st),
    "shfl.sync": Rule(f"{MOVE}: shfl.sync", r"shfl\.sync\.(up|down|bfly|idx)\.b32", build_shfl),
    "redux.sync": Rule(f"{SYNC}: redux.sync", r"redux\.sync\.((add|min|max)\.[su]32|(and|or|xor)\.b32)", build_redux),
    "elect.sync": Rule(f"{SYNC}: elect.sync", r"elect\.sync", build_elect),
    "bar.warp.sync": Rule(f"{SYNC}: bar.warp.sync", r"bar\.warp\.sync", build_nothing),
    "membar": Rule(f"{SYNC}: membar/fence", r"membar\.(cta|gl|sys)", build_nothing),
    "nanosleep": Rule("Miscellaneous Instructions: nanosleep", r"nanosleep\.u32", build_nothing),
    "griddepcontrol": Rule(f"{SYNC}: griddepcontrol", r"griddepcontrol\.(launch_dependents|wait)", build_nothing),
}
"""Instruction -> its rule."""
