"""Asynchronous copies, and what tells that they are done: groups of a thread's copies, mbarriers, proxy fences.

Copies take effect as late as the program allows, or at once: results must not differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kaleido_kernels.proving.emulation.errors import AccessError, EmulatorError, RaceError
from kaleido_kernels.proving.emulation.kinds import Array
from kaleido_kernels.proving.emulation.memory import Tensor, byte_places
from kaleido_kernels.proving.emulation.ptx import Address, Immediate, Instruction
from kaleido_kernels.proving.emulation.threads import Mask, chosen, only_together
from kaleido_kernels.proving.emulation.warps import Handler, Rule, Warps, immediate

SYNC = "Parallel Synchronization and Communication Instructions"
COPY = "Data Movement and Conversion Instructions"
SWIZZLES = {0: 0, 32: 1, 64: 3, 128: 7}
"""Bytes of a swizzle's period -> the bits of a row's number that move 16-byte pieces (section "Swizzling Modes")."""
Copy = Callable[[], None]


@dataclass
class MBarrier:
    """An mbarrier (section "mbarrier"): a phase ends when all arrivals and all expected bytes have come.

    Args:
        count: arrivals of a phase.
        pending: arrivals that are still to come.
        bytes_due: bytes expected and not come yet.
        phase: number of the phase.
        copies: what will bring bytes, in the order of issue.
    """

    count: int
    pending: int
    bytes_due: int = 0
    phase: int = 0
    copies: list[Copy] = field(default_factory=list)

    def __str__(self) -> str:
        return f"phase {self.phase}, {self.pending} of {self.count} arrivals and {self.bytes_due:,} bytes to come"

    def settle(self) -> None:
        """Begin the next phase if this one is over."""
        if self.pending < 0:
            raise RaceError("more arrivals at an mbarrier than it counts")
        if self.bytes_due < 0 and self.pending == 0:
            raise RaceError(f"{-self.bytes_due} bytes more came to an mbarrier than were expected")
        if self.pending == 0 and self.bytes_due == 0:
            self.phase += 1
            self.pending = self.count


@dataclass(frozen=True)
class CopyDescriptor:
    """A tensor of two dimensions as the copy engine sees it (chapter "Tensors").

    Args:
        tensor: where it lies.
        rows, cols: its size in values.
        block: (rows, cols) of one copy.
        item: bytes of a value.
        swizzle: bytes of the period in which pieces of rows are exchanged in shared memory; 0 for none.
    """

    tensor: Tensor
    rows: int
    cols: int
    block: tuple[int, int]
    item: int
    swizzle: int

    @property
    def n_bytes(self) -> int:
        """Bytes of one copy, what lies outside of the tensor included."""
        return self.block[0] * self.block[1] * self.item

    def read(self, row: int, col: int) -> Array:
        """One block as (rows, bytes); zeros where the tensor ends."""
        if row < 0 or col < 0:
            raise AccessError(f"a copy from row {row}, column {col} of {self.tensor.name}")
        data = self.tensor.data[: self.rows * self.cols * self.item].reshape(self.rows, self.cols * self.item)
        piece = data[row : row + self.block[0], col * self.item : (col + self.block[1]) * self.item]
        block = np.zeros((self.block[0], self.block[1] * self.item), np.uint8)
        block[: piece.shape[0], : piece.shape[1]] = piece
        if self.tensor.states is not None:
            states = self.tensor.states.states[: data.size].reshape(data.shape)
            rows, cols = slice(row, row + self.block[0]), slice(col * self.item, (col + self.block[1]) * self.item)
            if states[rows, cols].any():
                places = np.arange(data.size).reshape(data.shape)[rows, cols].ravel()
                self.tensor.states.refuse_unseen(places, f"the copy engine reads {self.tensor.name}:")
        return block

    def places(self, start: int) -> Array:
        """Byte numbers of a block in shared memory, row by row."""
        line = self.block[1] * self.item
        places = start + np.arange(self.block[0])[:, None] * line + np.arange(line)[None, :]
        return swizzled(places, self.swizzle).ravel()


def swizzled(places: Array, swizzle: int) -> Array:
    """Byte numbers after the exchange of 16-byte pieces."""
    return places ^ (((places >> 7) & SWIZZLES[swizzle]) << 4) if swizzle else places


# ---- copies of a thread


def build_cp_async(warps: Warps, instruction: Instruction) -> Handler:
    """cp.async of 4 to 16 bytes a thread; bytes beyond the source's size become zeros."""
    target, source, size, *rest = instruction.operands
    assert isinstance(size, Immediate) and len(rest) < 2
    to, start, n = warps.addresses(target), warps.addresses(source), size.bits
    taken = warps.source(rest[0], "b32") if rest else None
    block = warps.block

    def copy(mask: Mask) -> None:
        places, addresses = chosen(to(), mask), chosen(start(), mask)
        counts = np.full(len(places), n) if taken is None else chosen(taken(), mask).astype(np.int64)
        if not np.isin(counts, (0, n)).all():
            raise EmulatorError("cp.async of part of its bytes: no rule for it")
        block.shared.check(places, n, "a copy to")
        everywhere = byte_places(places, n)
        full = counts == n
        tensor = block.memory.find(addresses[full], n) if full.any() else None

        def take() -> None:
            data = np.zeros((len(places), n), np.uint8)
            if tensor is not None:
                data[full] = tensor.data[(addresses[full] - tensor.start)[:, None] + np.arange(n)]
            block.shared.take_copy(everywhere, data.ravel())
            block.shared.stored(everywhere, warps.number)  # not by the asynchronous proxy: a product needs a fence

        block.shared.refuse_in_flight(everywhere, "a copy to")
        block.shared.expect_copy(everywhere)
        if block.conditions.early_copies:
            take()
        else:
            block.open_copies[warps.number].append(take)

    return copy


def build_commit(warps: Warps, instruction: Instruction) -> Handler:
    """cp.async.commit_group: the copies since the last one are a group."""
    block, number = warps.block, warps.number

    def commit(mask: Mask) -> None:
        only_together(mask, "cp.async.commit_group")
        block.copy_groups[number].append(block.open_copies[number])
        block.open_copies[number] = []

    return commit


def build_wait_group(warps: Warps, instruction: Instruction) -> Handler:
    """cp.async.wait_group: all but the last ``n`` groups are done; wait_all: all copies are, committed or not."""
    waits_for_all = "wait_all" in instruction.parts
    block, number, keep = warps.block, warps.number, 0 if waits_for_all else immediate(instruction.operands[0])
    commit = build_commit(warps, instruction)

    def wait(mask: Mask) -> None:
        only_together(mask, "cp.async.wait_group")
        if waits_for_all:
            commit(mask)
        while len(block.copy_groups[number]) > keep:
            for take in block.copy_groups[number].pop(0):
                take()

    return wait


# ---- the copy engine


def build_tensor_copy(warps: Warps, instruction: Instruction) -> Handler:
    """cp.async.bulk.tensor.2d from global to shared memory, its bytes counted by an mbarrier."""
    target, source, signal = instruction.operands
    assert isinstance(source, Address) and len(source.coordinates) == 2
    to, at = warps.addresses(target), warps.addresses(signal)
    descriptor = warps.source(source.base, "b64")
    col, row = (warps.source(item, "b32") for item in source.coordinates)

    def copy(mask: Mask) -> None:
        for thread in range(warps.n_threads) if mask is None else np.nonzero(mask)[0]:
            found = warps.block.descriptors.get(int(descriptor()[thread]))
            if found is None:
                raise AccessError("a copy by a descriptor that is none of the kernel's arguments")
            where = (int(row().view(np.int32)[thread]), int(col().view(np.int32)[thread]))
            _start_copy(warps, found, where, int(to()[thread]), int(at()[thread]))

    return copy


def _start_copy(warps: Warps, descriptor: CopyDescriptor, where: tuple[int, int], start: int, signal: int) -> None:
    block = warps.block
    block.shared.check(np.array([start]), descriptor.n_bytes, "a copy to")
    if start % 128 or (descriptor.swizzle and start % (8 * descriptor.swizzle)):
        raise AccessError(f"a copy to byte {start} of shared memory, which its swizzle does not allow")
    places = descriptor.places(start)
    block.shared.states.refuse_unseen(places, "the copy engine writes over")
    block.shared.expect_copy(places)
    barrier = block.barrier_at(signal, warps.where())

    def take() -> None:
        block.shared.take_copy(places, descriptor.read(*where).ravel())
        barrier.bytes_due -= descriptor.n_bytes
        barrier.settle()

    if block.conditions.early_copies:
        take()
    else:
        barrier.copies.append(take)


# ---- mbarriers and fences


def build_mbarrier_init(warps: Warps, instruction: Instruction) -> Handler:
    """mbarrier.init."""
    at, count = warps.addresses(instruction.operands[0]), immediate(instruction.operands[1])

    def init(mask: Mask) -> None:
        for address in np.unique(chosen(at(), mask)):
            warps.block.shared.check(np.array([address]), 8, "an mbarrier in")
            warps.block.barriers[int(address)] = MBarrier(count, count)

    return init


def build_mbarrier_inval(warps: Warps, instruction: Instruction) -> Handler:
    """mbarrier.inval."""
    at = warps.addresses(instruction.operands[0])

    def inval(mask: Mask) -> None:
        for address in np.unique(chosen(at(), mask)):
            if warps.block.barrier_at(int(address), warps.where()).copies:
                raise RaceError("an mbarrier is ended while copies signal to it")
            del warps.block.barriers[int(address)]

    return inval


def build_mbarrier_arrive(warps: Warps, instruction: Instruction) -> Handler:
    """mbarrier.arrive, with bytes to expect or without."""
    expects = "expect_tx" in instruction.parts
    n_bytes = immediate(instruction.operands[2]) if expects else 0
    count = immediate(instruction.operands[2]) if len(instruction.operands) > 2 and not expects else 1
    at = warps.addresses(instruction.operands[1])

    def arrive(mask: Mask) -> None:
        if not expects:  # an arrival that only expects bytes tells others of no work
            if warps.n_threads > 32 and warps.unsynced:
                raise RaceError(f"one thread announces {warps.unsynced} of its group without a barrier since")
            warps.block.publish(warps.number)
        for address in chosen(at(), mask):
            barrier = warps.block.barrier_at(int(address), warps.where())
            barrier.bytes_due += n_bytes
            barrier.pending -= count
            barrier.settle()

    return arrive


def build_fence(warps: Warps, instruction: Instruction) -> Handler:
    """fence and fence.proxy.async; ordinary fences change nothing here."""
    if "proxy" not in instruction.parts:
        return lambda mask: None
    shared = "global" not in instruction.parts
    tensors = not any(part.startswith("shared") for part in instruction.parts)

    def fence(mask: Mask) -> None:
        only_together(mask, instruction.opcode)
        warps.unsynced = "a fence"
        if shared:
            warps.block.shared.states.fence(warps.number)
        if tensors:
            for states in warps.block.memory.watched():
                states.fence(warps.number)

    return fence


AT = r"(\.shared(::cta)?)?\.b64"
RULES: dict[str, Rule] = {
    "cp.async": Rule(f"{COPY}: cp.async", r"cp\.async\.(ca|cg)\.shared(::cta)?\.global(\.L2::\w+)*", build_cp_async),
    "cp.async.commit_group": Rule(f"{COPY}: cp.async.commit_group", r"cp\.async\.commit_group", build_commit),
    "cp.async.wait_group": Rule(
        f"{COPY}: cp.async.wait_group/cp.async.wait_all", r"cp\.async\.wait_group", build_wait_group
    ),
    "cp.async.wait_all": Rule(
        f"{COPY}: cp.async.wait_group/cp.async.wait_all", r"cp\.async\.wait_all", build_wait_group
    ),
    "cp.async.bulk.tensor": Rule(
        f"{COPY}: cp.async.bulk.tensor",
        r"cp\.async\.bulk\.tensor\.2d\.shared::(cta|cluster)\.global\.mbarrier::complete_tx::bytes",
        build_tensor_copy,
    ),
    "mbarrier.init": Rule(f"{SYNC}: mbarrier.init", rf"mbarrier\.init{AT}", build_mbarrier_init),
    "mbarrier.inval": Rule(f"{SYNC}: mbarrier.inval", rf"mbarrier\.inval{AT}", build_mbarrier_inval),
    "mbarrier.arrive": Rule(
        f"{SYNC}: mbarrier.arrive", rf"mbarrier\.arrive(\.expect_tx)?(\.release\.cta)?{AT}", build_mbarrier_arrive
    ),
    "fence": Rule(
        f"{SYNC}: membar/fence",
        r"fence(\.(sc|acq_rel))?\.(cta|cluster|gpu|sys)|fence\.mbarrier_init\.release\.cluster"
        r"|fence\.proxy\.async(\.(global|shared::(cta|cluster)))?",
        build_fence,
    ),
}
"""Instruction -> its rule."""
