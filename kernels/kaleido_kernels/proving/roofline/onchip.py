"""What a step costs where activations stay on the chip: two groups of warps multiply, a third party copies weights.

Played event by event, for the steady state: both groups take the same tiles from a ring of slots, each for its own
half of the chains, and share the tensor cores; a slot is free when both are done with it; a copy waits for its slot,
then for L2. One group's products run while the other finishes a part (epilogue: bias, activation, storing), unless
both came to its end together: they take turns, and only waits for copies bring them out of step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kaleido_kernels.onchip.plan import CHUNK, GROUPS, SLOT_ROWS, OnchipTile, inner_slots, onchip_layout
from kaleido_kernels.proving.roofline.gpu import FAST, PEAK_FLOPS, SLOW, Gpu
from kaleido_kernels.proving.roofline.loops import Overlap
from kaleido_kernels.proving.roofline.model import Bound, Estimate
from kaleido_kernels.proving.roofline.work import exact_fma
from kaleido_kernels.shapes import NetShape

TILE_BYTES = 2 * CHUNK * SLOT_ROWS
HIDDEN_EPILOGUE, SPLIT_EPILOGUE, LAST_EPILOGUE = 650.0, 900.0, 1700.0
"""Cycles of a group behind a part's products: 64 chains and 256 outputs of a hidden layer, in split fp32, and 128 of
the last layer's. Counted in machine code of the first such kernel, which stored all of them in shared memory."""
FIRST_HALF = 0.6
"""The share of it where the other half of the outputs follows: they are stored together."""
AHEAD, ISSUE, RELEASE = 2, 27.0, 40.0
"""Tiles of a group that are queued at once; cycles to issue one's products; cycles from their end to a free slot."""
PIECES = 4
"""Pieces of a tile's products, by which the groups take turns on the tensor cores."""
STEPS = 3
"""Steps that are played; the first one fills the ring."""


@dataclass(frozen=True)
class Part:
    """Products between two epilogues: those of a layer, of half of it, or of a piece of the last.

    Args:
        tiles: of weights.
        fma: multiply-adds of one tile by one group.
        epilogue: cycles of a group behind them.
        beside: bytes that are copied beside each tile: inputs that were too wide to stay.
    """

    tiles: int
    fma: float
    epilogue: float
    beside: float = 0.0


@dataclass
class _Group:
    """One group of warps: when it is free, its next tile, and the tiles whose products are queued, by pieces."""

    time: float = 0.0
    next: int = 0
    queue: list[int] = field(default_factory=list)
    pieces: list[tuple[float, int]] = field(default_factory=list)


@dataclass
class _Player:
    """Plays `STEPS` steps. ``order`` holds (part, whether its first tile, whether its last) of a step's tiles."""

    parts: Sequence[Part]
    slots: int
    tile_bytes: float
    l2_per_cycle: float
    fma_per_cycle: float
    latency: float

    def __post_init__(self) -> None:
        self.order = [(part, tile == 0, tile == part.tiles - 1) for part in self.parts for tile in range(part.tiles)]
        self.number = STEPS * len(self.order)
        self.full: list[float] = []
        self.freed: list[list[float]] = [[] for _ in range(self.number)]
        self.ready: list[list[float]] = [[0.0] * GROUPS, *([] for _ in range(STEPS))]
        self.groups = [_Group() for _ in range(GROUPS)]
        self.link = self.tensor = 0.0
        self.last = 1

    def cycles(self) -> float:
        """Cycles of a step, without the first."""
        while any(group.next < self.number or group.pieces for group in self.groups):
            self._copy()
            issued = [self._issue(group) for group in self.groups]
            if not self._multiply() and not any(issued):
                raise RuntimeError(f"no tile can go on: {len(self.full)} of {self.number} are there")
        ends = [max(times) for times in self.ready[1:]]
        return (ends[-1] - ends[0]) / (STEPS - 1)

    def _copy(self) -> None:
        """Issues every copy whose slot, and whose inputs, are known to be free and there."""
        while len(self.full) < self.number:
            tile = len(self.full)
            part = self.order[tile % len(self.order)][0]
            free = self.freed[tile - self.slots] if tile >= self.slots else [0.0] * GROUPS
            inputs = self.ready[tile // len(self.order)] if part.beside else [0.0] * GROUPS
            if len(free) < GROUPS or len(inputs) < GROUPS:
                return
            self.link = max(max(free) + self.latency, self.link) + self.tile_bytes / self.l2_per_cycle
            if part.beside:
                begin = max(max(*free, *inputs) + self.latency, self.link)
                self.link = begin + part.beside / self.l2_per_cycle
            self.full.append(self.link)

    def _issue(self, group: _Group) -> bool:
        """Queues a group's next products; a part's first ones wait until the last part is done."""
        issued = False
        while group.next < len(self.full) and len(group.queue) < AHEAD:
            _, first, last = self.order[group.next % len(self.order)]
            if first and group.queue:
                break
            group.time = max(group.time, self.full[group.next]) + ISSUE
            group.pieces += [(group.time, group.next)] * PIECES
            group.queue.append(group.next)
            group.next += 1
            issued = True
            if last:
                break
        return issued

    def _multiply(self) -> bool:
        """Runs the piece of products that can begin first; of two the other group's."""
        waiting = [
            (max(group.pieces[0][0], self.tensor), number == self.last, number)
            for number, group in enumerate(self.groups)
            if group.pieces
        ]
        if not waiting:
            return False
        begin, _, self.last = min(waiting)
        group = self.groups[self.last]
        _, tile = group.pieces.pop(0)
        part, _, last = self.order[tile % len(self.order)]
        self.tensor = begin + part.fma / PIECES / self.fma_per_cycle
        if not group.pieces or group.pieces[0][1] != tile:
            group.queue.remove(tile)
            self.freed[tile].append(self.tensor + RELEASE)
            group.time = max(group.time, self.tensor)
            if last:
                group.time = self.tensor + part.epilogue
                if tile % len(self.order) == len(self.order) - 1:
                    self.ready[tile // len(self.order) + 1].append(group.time)
        return True


def step_cycles(
    parts: Sequence[Part], slots: int, *, l2_per_cycle: float, fma_per_cycle: float, latency: float,
    tile_bytes: float = TILE_BYTES,
) -> float:  # fmt: skip
    """Cycles of a step of a program that has a multiprocessor to itself.

    Args:
        parts: of a step.
        slots: of the ring.
        l2_per_cycle: bytes a clock from L2.
        fma_per_cycle: multiply-adds a clock of the tensor cores.
        latency: cycles from a free slot to the first byte of its copy.
        tile_bytes: of a slot.

    Raises:
        ValueError: a ring without slots.
    """
    if slots < 1:
        raise ValueError(f"slots is {slots}: a ring has one at least")
    return _Player(parts, slots, tile_bytes, l2_per_cycle, fma_per_cycle, latency).cycles()


def onchip_parts(shape: NetShape, tile: OnchipTile, precision: str) -> list[Part]:
    """The parts of a step of a network: hidden layers by halves of at most 256 outputs, the last by 64 or 128.

    Split fp32 ("fp16x3") has two slots, of high and low halves, for three products.
    """
    layout = onchip_layout(shape, tile, precision)
    split = layout.parts == 2
    chunk = layout.group * CHUNK * (1.5 if split else 1.0)
    rows = layout.group / 64
    epilogue = (SPLIT_EPILOGUE if split else HIDDEN_EPILOGUE) * rows * layout.cols / 256
    beside = 2.0 * GROUPS * layout.group * CHUNK if layout.through_memory else 0.0
    parts = []
    for layer, slots in enumerate(inner_slots(shape, tile)):
        used = layout.pieces if layer else layout.first_used
        for half in range(layout.halves):
            own = epilogue * (1.0 if half == layout.halves - 1 else FIRST_HALF)
            parts.append(Part(layout.parts * slots, chunk * used * layout.cols, own, 0.0 if layer else beside))
    fma = chunk * layout.last_used * layout.last
    last = Part(layout.parts * layout.last_slots, fma, LAST_EPILOGUE * rows * layout.last / 128)
    return parts + [last] * layout.last_tiles


def onchip_estimate(
    shape: NetShape, tile: OnchipTile, precision: str, n_chains: int, n_steps: int, n_launches: int = 1,
    fast: Gpu = FAST, slow: Gpu = SLOW,
) -> Estimate:  # fmt: skip
    """Predicted time of ``n_chains`` x ``n_steps``, as a range, in whole rounds of a program on each multiprocessor.

    The longest counts: the products at the rate that large ones sustain, the bytes, or a program's own waits ("chain").
    """
    parts = onchip_parts(shape, tile, precision)
    fma = GROUPS * sum(part.tiles * part.fma for part in parts)
    loaded = sum(part.tiles * (TILE_BYTES + part.beside) for part in parts)
    rounds = -(-n_chains // (tile.chains * fast.n_sm))
    ideal = 2.0 * exact_fma(shape.widths) * n_chains * n_steps / PEAK_FLOPS

    def bound(gpu: Gpu) -> Bound:
        chain = step_cycles(
            parts, tile.slots, l2_per_cycle=gpu.l2_per_cycle, fma_per_cycle=gpu.tensor_fma, latency=gpu.latency
        )
        cycles = {"tensor": fma / gpu.fma_per_cycle, "l2": loaded / gpu.l2_per_cycle, "chain": chain}
        limit = max(cycles, key=cycles.__getitem__)
        launch = n_launches * gpu.launch_seconds
        seconds = cycles[limit] * rounds * n_steps / gpu.clock + launch
        return Bound(gpu, cycles, limit, 1e3 * seconds, 1e3 * launch, ideal / seconds)

    return Estimate(bound(fast), bound(slow), loaded, rounds, Overlap(tile.loads_ahead, 1.0, 1.0))
