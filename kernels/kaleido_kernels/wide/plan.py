"""Tiles, layer table and memory of the wide kernel: plain Python, no torch, no Triton.

Global memory is measured in *blocks*: contiguous (rows, inner) pieces of activations or (cols, inner) pieces of
weights, so that one copy descriptor over all blocks of a kind serves every layer, and offsets are numbers of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kaleido_kernels.precision import OPERAND_BYTES, operand_parts
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.tile import GpuFacts, too_much_shared, too_much_tensor_memory

BY_DEFAULT, TAKES_CHECKS = True, True
VERDICTS = ("barrier order", "wide loads", "loads ahead")

STATE_COLS = 64
"""Columns of one block of the pass over the state."""
RESERVED_SHARED = 1024
"""Shared memory that the compiler adds for barriers and reductions, as seen in compiled kernels."""


@dataclass(frozen=True)
class WideTile:
    """How one program of the wide kernel works.

    Args:
        rows: chains of a tile.
        cols: outputs of a hidden layer made at once; their weights are loaded once per tile of chains.
        last_cols: the same for the last layer.
        inner: values of the sum loaded at once; 128 bytes of operands suit the copy engine.
        warps: warps of a program.
        stages: buffers for loads; with n of them n - 1 are on their way while a product runs.
        use_tma: loads by the copy engine (sm_90 on); otherwise by pointers.
    """

    rows: int = 128
    cols: int = 256
    last_cols: int = 256
    inner: int = 64
    warps: int = 8
    stages: int = 3
    use_tma: bool = True

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "last_cols", "inner"):
            value = getattr(self, name)
            if not 16 <= value <= 256 or value & (value - 1):
                raise ValueError(f"{name} is {value}: it must be a power of two from 16 to 256")
        for name in ("cols", "last_cols"):
            if getattr(self, name) % self.inner:
                what = f"{name} {getattr(self, name)} is no multiple of inner {self.inner}"
                raise ValueError(f"{what}: outputs must fill whole blocks")
        if self.warps not in (4, 8) or not 1 <= self.stages <= 8:
            raise ValueError(f"{self.warps} warps and {self.stages} stages: use 4 or 8 warps and 1 to 8 stages")

    @property
    def kernel(self) -> str:
        """See `kaleido_kernels.tile.AnyTile`."""
        return "wide"

    @property
    def loads_ahead(self) -> int:
        """Blocks whose copies are under way while a product runs, on tensor cores."""
        return self.stages - 1

    @property
    def chains(self) -> int:
        """See `kaleido_kernels.tile.AnyTile`."""
        return self.rows

    @property
    def name(self) -> str:
        """See `kaleido_kernels.tile.AnyTile`."""
        loads = "copy engine" if self.use_tma else "pointers"
        sizes = f"wide {self.rows}x{self.cols}x{self.inner}"
        return f"{sizes} ({self.warps} warps, {self.stages} stages, {loads}, last {self.last_cols})"

    @property
    def short_name(self) -> str:
        """See `kaleido_kernels.tile.AnyTile`."""
        path = "" if self.use_tma else " pointers"
        return f"{self.rows}x{self.cols}/{self.last_cols}x{self.inner} w{self.warps} s{self.stages}{path}"


tile_of = WideTile


@dataclass(frozen=True)
class WideLayer:
    """One layer in blocks: blocks summed over, tiles of outputs, and where its weights, biases and values lie."""

    inner_blocks: int
    col_tiles: int
    weight_block: int
    bias_tile: int
    in_block: int
    out_block: int

    def row(self) -> list[int]:
        """The layer as a row of the table that the kernel reads."""
        return [
            *(self.inner_blocks, self.col_tiles, self.weight_block),
            *(self.bias_tile, self.in_block, self.out_block),
        ]


def state_width(shape: NetShape, tile: WideTile) -> int:
    """Columns of the state as stored: whole blocks of the state pass and of the products."""
    return _round_up(shape.dim, max(STATE_COLS, tile.inner))


def wide_layers(shape: NetShape, tile: WideTile) -> list[WideLayer]:
    """The layer table. Values go from the state's blocks to two sections in turn; the last layer's leave as fp32."""
    state_blocks = state_width(shape, tile) // tile.inner
    section = section_blocks(shape, tile)
    layers, weight_block, bias_tile = [], 0, 0
    for number, (n_in, n_out) in enumerate(zip(shape.widths[:-1], shape.widths[1:], strict=True)):
        last = number == shape.n_layers - 1
        if last:  # weights and biases of the last layer lie apart, since its tiles may have another width
            weight_block, bias_tile = 0, 0
        inner = _blocks(n_in, tile.inner)
        tiles = _blocks(n_out, tile.last_cols if last else tile.cols)
        in_block = state_blocks + ((number + 1) % 2) * section if number else 0
        out_block = state_blocks + (number % 2) * section
        layers.append(WideLayer(inner, tiles, weight_block, bias_tile, in_block, out_block))
        weight_block += inner * tiles
        bias_tile += tiles
    return layers


def section_blocks(shape: NetShape, tile: WideTile) -> int:
    """Blocks of the widest hidden layer's outputs."""
    return max((_blocks(width, tile.cols) * tile.cols // tile.inner for width in shape.widths[1:-1]), default=0)


def program_blocks(shape: NetShape, tile: WideTile) -> int:
    """Activation blocks of one program, each counted once whatever its number of parts."""
    return state_width(shape, tile) // tile.inner + 2 * section_blocks(shape, tile)


def output_width(shape: NetShape, tile: WideTile) -> int:
    """Columns of the raw outputs as stored: what the state pass reads and what the last layer's tiles write."""
    return max(state_width(shape, tile), _round_up(shape.dim, tile.last_cols))


def program_bytes(shape: NetShape, tile: WideTile, precision: str) -> int:
    """Bytes of scratch of one program: activations, raw outputs, state."""
    blocks = program_blocks(shape, tile) * operand_parts(precision) * OPERAND_BYTES[precision]
    fp32 = 4 * (output_width(shape, tile) + state_width(shape, tile))
    return tile.rows * (blocks * tile.inner + fp32)


def shared_bytes(tile: WideTile, precision: str) -> int:
    """Shared memory of one program, estimated: the loads in flight, or the turning of a finished tile."""
    item = OPERAND_BYTES[precision] * operand_parts(precision)
    loads = tile.stages * (tile.rows + max(tile.cols, tile.last_cols)) * tile.inner * item
    turning = tile.rows * tile.cols * OPERAND_BYTES[precision]
    return max(loads, turning) + RESERVED_SHARED


def wide_candidates(shape: NetShape, precision: str, use_tma: bool = True) -> list[WideTile]:
    """Tiles worth trying, best first by the work they need (`padded_products`), ties to the larger tile."""
    inner = 64 if OPERAND_BYTES[precision] == 2 else 32
    if precision == "ieee":
        return [WideTile(64, 64, 64, 16, 4, 2, use_tma=False)]
    if not use_tma:
        return [WideTile(64, 64, 64, inner // 2, 4, 3, use_tma=False)]
    # Split fp32 fills shared memory with two stages; four of half the depth load three tiles ahead. An H200 measured
    # 1,185 ms for 1,437 (mnist), 129 for 140 (digits), when no step was quiet yet.
    inner, stages = (32, 4) if precision == "fp16x3" else (inner, 3)
    tiles = [WideTile(128, cols, last, inner, 8, stages) for cols in (256, 128, 64) for last in (256, 128, 64)]
    return sorted(tiles, key=lambda tile: (tile_cost(shape, tile), -tile.cols - tile.last_cols))


class WideLayout(NamedTuple):
    """Sizes that are compiled in: of the tile, and of what `state_width` and the functions beside it give."""

    n_layers: int
    rows: int
    cols: int
    last_cols: int
    inner: int
    parts: int
    stages: int
    program_blocks: int
    state_width: int
    output_width: int
    state_cols: int


def wide_layout(shape: NetShape, tile: WideTile, precision: str) -> WideLayout:
    """The sizes of a tile for a network in a device precision."""
    sizes = (tile.rows, tile.cols, tile.last_cols, tile.inner, operand_parts(precision), tile.stages)
    widths = (program_blocks(shape, tile), state_width(shape, tile), output_width(shape, tile))
    return WideLayout(shape.n_layers, *sizes, *widths, STATE_COLS)


def candidates(shape: NetShape, precision: str, facts: GpuFacts) -> list[WideTile]:
    """Tiles to choose from, best first: those of the copy engine where there is one, then those by pointers."""
    found = wide_candidates(shape, precision, facts.uses_tma)
    return found + wide_candidates(shape, precision, use_tma=False) if facts.uses_tma else found


def yields(shape: NetShape, precision: str) -> str | None:
    """Why another kernel shall run a network unless this one is asked for by name: never."""
    return None


def trials(shape: NetShape, precision: str, facts: GpuFacts) -> list[WideTile]:
    """Other tiles that are worth timing."""
    inner = 64 if precision in ("fp16", "bf16", "fp16x3") else 32
    if precision == "ieee":
        return []
    if not facts.uses_tma:
        return [WideTile(128, 128, 64, inner, 8, 3, use_tma=False)]
    # One load more in flight than the plan's tiles; in split fp32 two, of twice the depth.
    stages = 2 if precision == "fp16x3" else 4
    found = [WideTile(128, 256, last, inner, 8, stages) for last in (256, 128, 64)]
    found += [WideTile(128, 128, last, inner, 8, 4) for last in (128, 64)]
    return [*found, WideTile(64, 256, 128, inner, 8, 4), WideTile(64, 128, 64, inner, 4, 4)]


def refusal(shape: NetShape, precision: str, tile: WideTile, facts: GpuFacts) -> str | None:
    """Why a tile cannot run ``shape`` on a GPU: limit and need; None if it can."""
    # In split fp32 sm_100 compiled tiles of more outputs to a trap; 128 x 128 compile there.
    tensor_memory = too_much_tensor_memory(tile, precision, max(tile.cols, tile.last_cols) > 128, facts)
    if tensor_memory is not None:
        return tensor_memory
    if tile.use_tma and not facts.uses_tma:
        return f"{tile.name}: the GPU has no copy engine for it, which came with compute capability 9.0"
    if not tile.use_tma and precision != "ieee" and _reads_behind_a_fence(facts):
        return f"{tile.name}: not every release of Triton fences copies by pointers before this GPU's products"
    return too_much_shared(tile, shared_bytes(tile, precision), facts)


def _reads_behind_a_fence(facts: GpuFacts) -> bool:
    """GPUs whose products read shared memory as the copy engine does, so that copies by threads need a fence.

    Triton 3.6 leaves it out in this kernel (`verdicts.fenced_operands`); narrow and stream have it in all releases.
    """
    return facts.uses_tma and facts.capability[0] in (9, 10)


def scratch_bytes(shape: NetShape, precision: str, tile: WideTile, n_programs: int) -> int:
    """Bytes of memory besides weights and states: what its programs work in."""
    return n_programs * program_bytes(shape, tile, precision)


def tile_cost(shape: NetShape, tile: WideTile) -> float:
    """Relative time of a step: loads from L2 (the limiting unit here) plus a fixed cost a tile of outputs."""
    fill = 0.1  # of a 128 x 256 x 512 product: pipeline fill and drain against its loads
    cost = 0.0
    for number, layer in enumerate(wide_layers(shape, tile)):
        cols = tile.last_cols if number == shape.n_layers - 1 else tile.cols
        loads = layer.inner_blocks * tile.inner * (tile.rows + cols) / ((128 + 256) * 512)
        cost += layer.col_tiles * (loads + fill * cols / 256)
    return cost


def padded_products(shape: NetShape, tile: WideTile) -> int:
    """Multiply-adds of one chain's step with padding."""
    layers = wide_layers(shape, tile)
    inner = [layer.inner_blocks * tile.inner for layer in layers]
    cols = [layer.col_tiles * tile.cols for layer in layers[:-1]] + [layers[-1].col_tiles * tile.last_cols]
    return sum(k * n for k, n in zip(inner, cols, strict=True))


def step_bytes(shape: NetShape, tile: WideTile, precision: str) -> int:
    """Bytes between L2 and one SM in one step of one tile: operands loaded, activations and raw outputs stored."""
    item = OPERAND_BYTES[precision] * operand_parts(precision)
    total = 0
    for number, layer in enumerate(wide_layers(shape, tile)):
        last = number == shape.n_layers - 1
        cols = tile.last_cols if last else tile.cols
        total += layer.col_tiles * layer.inner_blocks * tile.inner * (tile.rows + cols) * item
        total += layer.col_tiles * cols * tile.rows * (4 if last else item)
    return total + state_width(shape, tile) * tile.rows * (4 + item)


def _blocks(width: int, size: int) -> int:
    return -(-width // size)


def _round_up(width: int, multiple: int) -> int:
    return _blocks(width, multiple) * multiple
