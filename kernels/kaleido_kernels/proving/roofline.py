"""What a step should cost, from tile sizes, instruction counts and the order of copies and products in compiled code.

A model, never measured: no number here was timed by this package. An estimate is a range of two sets of assumptions,
`FAST` and `SLOW`; where published readings of a rate differ, one takes the best and the other the worst. Pieces:

- tensor: padded products over the dense fp16 rate of large products (tf32 at half of it, split fp32 three products);
- l2: bytes between L2 and one multiprocessor;
- hbm: what L2 does not hold until it is used again, at every use (`Reuse`);
- issue, alu, mufu: instructions over four warp schedulers, half-rate integer and conversion units, and 16 special
  function lanes a clock;
- chain: what a program does one after another (`Loop`: a copy is hidden only by what runs between its issue and its
  use), shared by the programs of a multiprocessor, which cover each other's waits.

The longest of them is a step of a tile; Python's time for each launch is added once. Not modelled: clocks above or
below `Gpu.clock`, bank conflicts, the latency from one product to the next that needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

from kaleido_kernels.proving.architectures import REGISTERS
from kaleido_kernels.shapes import NetShape, next_power_of_two
from kaleido_kernels.wide_plan import (
    STATE_COLS,
    WideLayer,
    WideTile,
    output_width,
    padded_products,
    scratch_bytes,
    state_width,
    step_bytes,
    wide_layers,
)

NOTE = "model, not a measurement"
PEAK_FLOPS = 790e12
"""fp16 FLOP/s that shares of the peak refer to: the best measured on large products of an H200."""
SCHEDULERS = 4
"""Warp instructions a clock and multiprocessor."""
ALU_LANES, MUFU_LANES, FMA_LANES = 64, 16, 128
"""Lanes a clock and multiprocessor: integer and conversion units, special functions, fp32 multiply-adds."""
WARPS, RESERVED_SHARED = 64, 1024
"""Of a multiprocessor: warps at once, and bytes of shared memory that the system takes of each program."""
ALU_KINDS = ("FMNMX", "F2FP", "PRMT", "LOP3", "ISETP", "FSETP", "SHF", "SEL", "FSEL", "IADD3", "LEA")
PRECISION_BYTES = {"fp32": 4, "ieee": 4, "fp16x3": 4, "tf32": 4, "fp16": 2, "bf16": 2}
"""Bytes of one operand value: split fp32 holds two fp16 values."""
L2_LOST = 1.5
"""Reuse over this many times the capacity of L2 finds nothing there. Read off the same curves as the capacities."""


@dataclass(frozen=True)
class Gpu:
    """Assumed rates of one GPU of the H100 and H200 class.

    Args:
        name: which assumptions these are.
        n_sm: multiprocessors.
        clock: Hz.
        tensor_flops: dense fp16 FLOP/s that large products sustain; power holds the clock down there.
        tensor_fma: fp16 multiply-adds a clock and multiprocessor while tensor cores run: what waiting kernels get.
        l2_bandwidth: bytes/s between L2 and all multiprocessors.
        l2_capacity: bytes that come back from L2 for certain.
        hbm_bandwidth: bytes/s of main memory.
        latency: cycles from a copy's issue to its first byte where it is used, with the barrier behind it.
        launch_seconds: Python's time for a launch, on a warm model.
        collisions: 0 where programs of a multiprocessor never want the same unit at once, 1 where they meet by chance
            (the bounds of a balanced closed network of queues).
    """

    name: str = "fast"
    n_sm: int = 132
    clock: float = 1.755e9
    tensor_flops: float = 790e12
    tensor_fma: float = 2048.0
    l2_bandwidth: float = 8.6e12
    l2_capacity: float = 44e6
    hbm_bandwidth: float = 4.8e12
    latency: float = 500.0
    launch_seconds: float = 25e-6
    collisions: float = 0.0

    @property
    def fma_per_cycle(self) -> float:
        """fp16 tensor multiply-adds a clock and SM at the sustained rate."""
        return self.tensor_flops / 2 / self.n_sm / self.clock

    @property
    def l2_per_cycle(self) -> float:
        """Bytes a clock and SM from L2."""
        return self.l2_bandwidth / self.n_sm / self.clock

    @property
    def hbm_per_cycle(self) -> float:
        """Bytes a clock and SM from main memory."""
        return self.hbm_bandwidth / self.n_sm / self.clock


# Published readings, none of them ours; dates as given or, for files, as stored in November 2026.
# L2: 5.5 TB/s for an H100 PCIe (ascribed to Chips and Cheese, July 2023; the article's own figure was not seen); 6.65
# TB/s for an H100 (openxla/xla, gpu_dot_fusion_cost_model.cc, 2025); reads of 8 to 33 MB at 6.8 to 7.1 TB/s on an H100
# PCIe, and of 8 to 40 MB at 9.5 to 10.3 TB/s on a card listed as H200 (te42kyfo/gpu-benches, gpu-l2-cache): 37 bytes a
# clock and multiprocessor at its 1.98 GHz, 8.6 TB/s at the clock here. Products draw nearly that: 672 TFLOP/s on an
# H100 without multicast (facebookexperimental/triton, pull request 1065, March 2026) are 7.9 TB/s in 128 x 256 tiles.
# Capacity: in the curves of gpu-l2-cache the card listed as H200 begins to miss at 44 MB, the H100 at 37 MB; from about
# 1.5 times that on nearly all is missed.
FAST = Gpu()
# tensor: 672 to 687 TFLOP/s for products with 1,024 inner values (the same pull request). hbm: 3.0 TB/s for transfers
# of some hundred MB on an H100 (the same cost model); the 4.8 above are an H200's nominal rate. latency, an assumption:
# idle L2 answers in 265 cycles (gpu-benches, gpu-latency, H100 PCIe); the cost model adds 400 ns, 700 cycles, to each
# round of copies by threads. launch: 24 (narrow) to 38 (wide) microseconds of Python on a quiet Xeon, the driver's few
# not in them (benchmarks/launch_overhead.py).
SLOW = Gpu(
    name="slow",
    tensor_flops=680e12,
    l2_bandwidth=5.5e12,
    l2_capacity=37e6,
    hbm_bandwidth=3.0e12,
    latency=900.0,
    launch_seconds=50e-6,
    collisions=1.0,
)


@dataclass(frozen=True)
class Overlap:
    """What hides a copy of a loop of products.

    Args:
        ahead: rounds from the issue of a copy to its use; with 1 the next round waits for it, with 0 the same does.
        products: share of a round's products between the issue and the end of the round (0: all done before).
        other: the same share of its other instructions.
    """

    ahead: int = 0
    products: float = 0.0
    other: float = 0.0


def stream_overlap(stages: int) -> Overlap:
    """What the stream kernel's stages mean: its copies are issued behind the products of a round.

    So the second buffer of two stages never fills while a product runs. Seen in every compiled variant.
    """
    return Overlap(max(0, stages - 1))


def wide_overlap(precision: str, stages: int) -> Overlap:
    """The same of the wide kernel: a round's copies are issued when the last of its products is under way."""
    return Overlap(max(0, stages - 1), 1 / 3 if precision == "fp16x3" else 1.0)


@dataclass(frozen=True)
class Loop:
    """A loop that loads, multiplies and computes, as one program runs it in one step of its tile.

    Args:
        rounds: of a step.
        starts: how often in a step it begins without anything loaded, at most ``rounds``.
        fma: multiply-adds of a round on tensor cores, each counted at the fp16 rate.
        other: cycles of a round's other instructions, which do not run beside the round's own products.
        loaded: bytes that a round loads.
        stored: bytes that leave meanwhile, of what was computed before.
        overlap: what hides the loads.
    """

    rounds: float
    starts: float = 0.0
    fma: float = 0.0
    other: float = 0.0
    loaded: float = 0.0
    stored: float = 0.0
    overlap: Overlap = Overlap()

    def work(self, gpu: Gpu) -> float:
        """Cycles of a round's products and other instructions."""
        return self.fma / gpu.tensor_fma + self.other

    def load(self, gpu: Gpu) -> float:
        """Cycles from the issue of a round's copy to its use."""
        return gpu.latency + self.loaded / gpu.l2_per_cycle if self.loaded else 0.0

    def round_cycles(self, gpu: Gpu) -> float:
        """Cycles of a round in the middle of the loop.

        A buffer is taken from the issue of its copy until the next issue for it: a load, and a round's work up to where
        copies are issued. There are `Overlap.ahead` of them besides the one in use.
        """
        work, load = self.work(gpu), self.load(gpu)
        behind = self.overlap.products * self.fma / gpu.tensor_fma + self.overlap.other * self.other
        held = load + work - behind if self.overlap.ahead else load + work
        waiting = held / max(1, self.overlap.ahead) if self.loaded else 0.0
        return max(work, waiting, (self.loaded + self.stored) / gpu.l2_per_cycle)

    def cycles(self, gpu: Gpu) -> float:
        """Cycles of all rounds; a start adds the load that nothing hides."""
        one = self.round_cycles(gpu)
        return self.rounds * one + self.starts * max(0.0, self.load(gpu) + self.work(gpu) - one)


@dataclass(frozen=True)
class Reuse:
    """Bytes that are used again in a step.

    Args:
        own: bytes that each program uses again, in a step of its tile.
        between: other bytes that each program has touched in between.
        common: bytes that all programs use again together, once a step: weights.
        beside: bytes common to all programs that were touched in between.
    """

    own: float = 0.0
    between: float = 0.0
    common: float = 0.0
    beside: float = 0.0

    def missed(self, gpu: Gpu) -> float:
        """Bytes of one program that come from main memory: none within the capacity, all from `L2_LOST` times it."""
        distance = self.between * gpu.n_sm + self.beside
        share = min(1.0, max(0.0, (distance / gpu.l2_capacity - 1) / (L2_LOST - 1)))
        return share * (self.own + self.common / gpu.n_sm)


@dataclass(frozen=True)
class TileWork:
    """What one tile of chains costs in one step.

    Args:
        chains: rows of the tile.
        exact_fma: multiply-adds of the network without padding, for one chain.
        tensor_fma: multiply-adds issued for the tile, padded, each counted at the fp16 rate (tf32 counts twice).
        scalar_fma: multiply-adds on the ordinary units (IEEE fp32 products).
        l2_bytes: bytes between L2 and the SM.
        instructions, alu, mufu: warp instructions issued, those of the half-rate units, those of the special units.
        loops: what a program does in loops, one after the other.
        serial: cycles of instructions outside of the loops.
        waits: how often outside of the loops a program waits for memory.
        drained: bytes outside of the loops that it waits for.
        reuses: what it needs again, and after how much else.
        programs: tiles that a multiprocessor works on at once.
    """

    chains: int
    exact_fma: int
    tensor_fma: float
    scalar_fma: float = 0.0
    l2_bytes: float = 0.0
    instructions: float = 0.0
    alu: float = 0.0
    mufu: float = 0.0
    loops: tuple[Loop, ...] = ()
    serial: float = 0.0
    waits: float = 0.0
    drained: float = 0.0
    reuses: tuple[Reuse, ...] = ()
    programs: int = 1


@dataclass(frozen=True)
class Bound:
    """One end of an estimate: cycles of one tile-step by unit under the assumptions ``gpu``, the longest, the time.

    ``milliseconds`` has the launches in it, ``launch_milliseconds`` says how much they are.
    """

    gpu: Gpu
    cycles: dict[str, float]
    limit: str
    milliseconds: float
    launch_milliseconds: float
    peak_share: float

    def to_json(self) -> dict[str, object]:
        return {
            "milliseconds": round(self.milliseconds, 4),
            "launch_milliseconds": round(self.launch_milliseconds, 4),
            "limit": self.limit,
            "share_of_tensor_peak": round(self.peak_share, 4),
            "cycles_per_tile_step": {unit: round(value, 1) for unit, value in self.cycles.items()},
            "assumed": asdict(self.gpu),
        }


@dataclass(frozen=True)
class Estimate:
    """A range of times: ``low`` under the assumptions `FAST`, ``high`` under `SLOW`.

    ``overlap`` is what hides the loads of the products; None for a kernel that loads none.
    """

    low: Bound
    high: Bound
    l2_bytes: float
    tile_rounds: int
    overlap: Overlap | None

    @property
    def milliseconds(self) -> float:
        """The middle of the range: for order and for arithmetic, no likelier than the rest."""
        return (self.low.milliseconds + self.high.milliseconds) / 2

    @property
    def limit(self) -> str:
        """The longest unit, at both ends where they differ."""
        return self.low.limit if self.low.limit == self.high.limit else f"{self.low.limit}/{self.high.limit}"

    def to_json(self) -> dict[str, object]:
        return {
            "note": NOTE,
            "milliseconds": round(self.milliseconds, 4),
            "low": self.low.to_json(),
            "high": self.high.to_json(),
            "overlap": asdict(self.overlap) if self.overlap else None,
            "l2_bytes_per_tile_step": round(self.l2_bytes),
            "tile_rounds": self.tile_rounds,
        }


def estimate(
    work: TileWork, n_chains: int, n_steps: int, n_launches: int = 1, fast: Gpu = FAST, slow: Gpu = SLOW
) -> Estimate:
    """Predicted time of ``n_chains`` x ``n_steps`` in ``n_launches`` launches, as a range, in whole rounds of tiles."""
    low, high = (_bound(work, n_chains, n_steps, n_launches, gpu) for gpu in (fast, slow))
    overlap = next((loop.overlap for loop in work.loops if loop.loaded), None)
    return Estimate(low, high, work.l2_bytes, _rounds(work, n_chains, fast), overlap)


def _rounds(work: TileWork, n_chains: int, gpu: Gpu) -> int:
    return -(-n_chains // (work.chains * gpu.n_sm))


def _bound(work: TileWork, n_chains: int, n_steps: int, n_launches: int, gpu: Gpu) -> Bound:
    rounds = _rounds(work, n_chains, gpu)
    cycles = unit_cycles(replace(work, programs=max(1, min(work.programs, rounds))), gpu)
    limit = max(cycles, key=cycles.__getitem__)
    launch = n_launches * gpu.launch_seconds
    seconds = cycles[limit] * rounds * n_steps / gpu.clock + launch
    ideal = 2.0 * work.exact_fma * n_chains * n_steps / PEAK_FLOPS
    return Bound(gpu, cycles, limit, 1e3 * seconds, 1e3 * launch, ideal / seconds if seconds else 0.0)


def unit_cycles(work: TileWork, gpu: Gpu) -> dict[str, float]:
    """Cycles that each unit of one SM is busy with one tile-step, and "chain": those between two tile-steps' ends.

    ``programs`` chains run side by side. One after the other they would take their sum; a unit that they share makes
    them wait for it, at most (``collisions``) once for each other program.
    """
    units = {
        "tensor": work.tensor_fma / gpu.fma_per_cycle,
        "fma": work.scalar_fma / FMA_LANES,
        "l2": work.l2_bytes / gpu.l2_per_cycle,
        "hbm": sum(reuse.missed(gpu) for reuse in work.reuses) / gpu.hbm_per_cycle,
        "issue": work.instructions / SCHEDULERS,
        "alu": work.alu * 32 / ALU_LANES,
        "mufu": work.mufu * 32 / MUFU_LANES,
    }
    others = (work.programs - 1) * gpu.collisions * max(units.values())
    return units | {"chain": (chain_cycles(work, gpu) + others) / work.programs}


def chain_cycles(work: TileWork, gpu: Gpu) -> float:
    """Cycles of a tile-step for a program that has a multiprocessor to itself."""
    outside = work.serial + work.waits * gpu.latency + work.drained / gpu.l2_per_cycle
    return sum(loop.cycles(gpu) for loop in work.loops) + outside


def resident_programs(shared: int, registers: int, warps: int, shared_limit: int) -> int:
    """Programs that a multiprocessor holds at once, at least 1.

    Args:
        shared: bytes of shared memory of a program.
        registers: of a thread.
        warps: of a program.
        shared_limit: most bytes that one program may have; a multiprocessor has `RESERVED_SHARED` more.
    """
    of_warp = 32 * (-(-registers // 8) * 8)  # registers are given to a warp in pieces of 256
    fitting = (
        (shared_limit + RESERVED_SHARED) // (shared + RESERVED_SHARED),
        REGISTERS // (max(of_warp, 1) * warps),
        WARPS // warps,
    )
    return max(1, min(fitting))


def exact_fma(widths: tuple[int, ...]) -> int:
    """Multiply-adds of one step of one chain, without padding."""
    return sum(a * b for a, b in pairwise(widths))


def tensor_factor(precision: str) -> float:
    """fp16-rate multiply-adds spent for one product: 3 for split fp32, 2 for tf32 (half rate)."""
    return {"fp32": 3.0, "fp16x3": 3.0, "tf32": 2.0, "ieee": 0.0}.get(precision, 1.0)


def counted_work(counts: Mapping[str, float], n_warps: int) -> dict[str, float]:
    """``instructions``, ``alu`` and ``mufu`` of a tile-step from the instructions that one warp issues in a step.

    ``counts`` holds instructions by kind, with their sum under "all".
    """
    return {
        "instructions": counts.get("all", 0) * n_warps,
        "alu": sum(counts.get(kind, 0) for kind in ALU_KINDS) * n_warps,
        "mufu": counts.get("MUFU", 0) * n_warps,
    }


def instruction_cycles(issued: Mapping[str, float]) -> float:
    """Cycles that a program needs for what `counted_work` counted: of the busiest of the units."""
    units = (issued["instructions"] / SCHEDULERS, issued["alu"] * 32 / ALU_LANES, issued["mufu"] * 32 / MUFU_LANES)
    return max(units)


def step_counts(common: Mapping[str, float], rare: Mapping[str, float], rounds: int, rare_rounds: int) -> Counter[str]:
    """Instructions of a step that takes ``rounds`` rounds of a loop, ``rare_rounds`` of them the rare way."""
    total: Counter[str] = Counter()
    for kind in {*common, *rare}:
        total[kind] = int(common.get(kind, 0) * (rounds - rare_rounds) + rare.get(kind, 0) * rare_rounds)
    return total


def narrow_work(
    shape: NetShape, rows: int, n_warps: int, precision: str, counts: Mapping[str, float], *, bias_rows: int = 0,
    programs: int = 1,
) -> TileWork:  # fmt: skip
    """A step of the narrow kernel, which loads nothing.

    ``bias_rows``: extra inner rows a layer of a bias added by a product of its own. ``programs`` fit one
    multiprocessor.
    """
    width, edge = next_power_of_two(max(shape.hidden, 1)), next_power_of_two(shape.dim)
    sides = [edge, *[width] * (shape.n_layers - 1), edge]
    products = sum(a * b * tensor_factor(precision) + bias_rows * b for a, b in pairwise(sides))
    scalar = rows * exact_fma(shape.widths) if precision == "ieee" else 0.0
    tensor = 0.0 if precision == "ieee" else rows * products
    issued = counted_work(counts, n_warps)
    step = Loop(1, fma=tensor, other=instruction_cycles(issued) + scalar / FMA_LANES)
    return TileWork(
        rows,
        exact_fma(shape.widths),
        tensor,
        scalar,
        instructions=issued["instructions"],
        alu=issued["alu"],
        mufu=issued["mufu"],
        loops=(step,),
        programs=programs,
    )


def stream_work(
    shape: NetShape, rows: int, n_warps: int, precision: str, counts: Mapping[str, float], *, n_tiles: int,
    programs: int, overlap: Overlap, starts: int = 0,
) -> TileWork:  # fmt: skip
    """A step of the stream kernel: ``n_tiles`` rounds of its loop; ``programs`` fit one multiprocessor.

    ``starts``: how often a step the loop begins anew, with nothing loaded.
    """
    width = next_power_of_two(max(shape.widths))
    tile = min(width, 128)
    issued = counted_work(counts, n_warps)
    weights = width * tile
    products = rows * weights * tensor_factor(precision)
    loaded = weights * PRECISION_BYTES[precision]
    loop = Loop(n_tiles, starts, products, instruction_cycles(issued) / n_tiles, loaded, 0.0, overlap)
    return TileWork(
        rows,
        exact_fma(shape.widths),
        n_tiles * products,
        l2_bytes=n_tiles * loaded,
        instructions=issued["instructions"],
        alu=issued["alu"],
        mufu=issued["mufu"],
        loops=(loop,),
        programs=programs,
    )


def typical_epilogue(tile: WideTile, precision: str) -> float:
    """Instructions a warp issues for a finished tile of outputs, as read from compiled tiles of 128 x 256."""
    return (1000 if precision == "fp16x3" else 460) * _share_of_a_warp(tile) * tile.cols / 256


def typical_state_block(tile: WideTile) -> float:
    """The same for a block of the pass over the state."""
    return 700 * _share_of_a_warp(tile)


def _share_of_a_warp(tile: WideTile) -> float:
    return tile.rows / tile.warps / (128 / 8)


def wide_work(
    shape: NetShape, tile: WideTile, precision: str, *, epilogue: float | None = None,
    state_block: float | None = None, overlap: Overlap | None = None,
) -> TileWork:  # fmt: skip
    """A step of the wide kernel, of which a multiprocessor runs one program.

    Args:
        shape: the network.
        tile: how it is cut.
        precision: a device precision.
        epilogue: instructions a warp issues for each finished tile of outputs; None for what is usual.
        state_block: instructions a warp issues for each block of the pass over the state; None likewise.
        overlap: what hides its loads, as read from machine code; None for what the number of stages means.
    """
    layers = list(_wide_layers(shape, tile, precision))
    epilogue = typical_epilogue(tile, precision) if epilogue is None else epilogue
    state_block = typical_state_block(tile) if state_block is None else state_block
    blocks = state_width(shape, tile) // STATE_COLS
    col_tiles = sum(layer.col_tiles for layer, _, _ in layers)
    item = PRECISION_BYTES[precision]
    overlap = wide_overlap(precision, tile.stages) if overlap is None else overlap
    loops = [layer_loop(layer, cols, out, tile, precision, overlap) for layer, cols, out in layers]
    # Blocks of the state: raw sums are loaded, bounded, and stored as operands while the next block loads.
    block = tile.rows * STATE_COLS
    stored = item * block * (blocks - 1) / blocks
    state = Loop(blocks, other=state_block * tile.warps / SCHEDULERS, loaded=4 * block, stored=stored)
    products = tile.rows * padded_products(shape, tile)
    # A layer begins with its row of the table, and ends when its last tile's stores have arrived.
    last_tiles = tile.rows * sum(cols * out for _, cols, out in layers)
    return TileWork(
        tile.rows,
        exact_fma(shape.widths),
        products * tensor_factor(precision),
        products if precision == "ieee" else 0.0,
        step_bytes(shape, tile, precision),
        instructions=(col_tiles * epilogue + blocks * state_block) * tile.warps,
        loops=(*loops, state),
        serial=col_tiles * epilogue * tile.warps / SCHEDULERS,
        waits=2 * len(layers) + 1,
        drained=last_tiles + item * block,
        reuses=wide_reuses(shape, tile, precision),
    )


def _wide_layers(shape: NetShape, tile: WideTile, precision: str) -> Iterator[tuple[WideLayer, int, int]]:
    """Each layer with the columns of its tiles of outputs and the bytes of an output value as it is stored."""
    *hidden, last = wide_layers(shape, tile)
    for layer in hidden:
        yield layer, tile.cols, PRECISION_BYTES[precision]
    yield last, tile.last_cols, 4


def layer_loop(layer: WideLayer, cols: int, out: int, tile: WideTile, precision: str, overlap: Overlap) -> Loop:
    """The loops of products of one layer. The stores of a tile leave while the next tile loads."""
    rounds = layer.col_tiles * layer.inner_blocks
    fma = tile.rows * cols * tile.inner
    return Loop(
        rounds,
        starts=layer.col_tiles,
        fma=fma * tensor_factor(precision),
        other=fma / FMA_LANES if precision == "ieee" else 0.0,
        loaded=(tile.rows + cols) * tile.inner * PRECISION_BYTES[precision],
        stored=tile.rows * cols * out * (layer.col_tiles - 1) / rounds,
        overlap=overlap,
    )


def wide_reuses(shape: NetShape, tile: WideTile, precision: str) -> tuple[Reuse, ...]:
    """What a step of the wide kernel uses again. What a program wrote goes to memory and comes back: twice."""
    item = PRECISION_BYTES[precision]
    raw, found = 4 * tile.rows * output_width(shape, tile), []
    beside, weights_before = raw, 0  # the pass over the state reads raw sums while it writes the first layer's input
    for layer, cols, out in _wide_layers(shape, tile, precision):
        inner = layer.inner_blocks * tile.inner
        read, weights = tile.rows * inner * item, inner * cols * item
        found.append(Reuse(own=2 * read, between=read + beside, beside=weights_before))
        found.append(Reuse(own=(layer.col_tiles - 1) * read, between=read + tile.rows * cols * out, beside=weights))
        beside, weights_before = read, weights * layer.col_tiles
    found.append(Reuse(own=2 * raw, between=raw + beside, beside=weights_before))
    every_weight = padded_products(shape, tile) * item
    found.append(Reuse(common=every_weight, between=scratch_bytes(shape, tile, precision), beside=every_weight))
    return tuple(found)
