"""The onchip kernel as a `kaleido_kernels.kernels.Plan`: tiles, sizes, memory. Plain Python: no torch, no Triton."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from kaleido_kernels.precision import OPERAND_BYTES, operand_parts
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.stream.plan import stream_layout
from kaleido_kernels.tile import GpuFacts, too_much_shared
from kaleido_kernels.wide import plan as wide

BY_DEFAULT, TAKES_CHECKS = True, True
VERDICTS = ("few spills", "paired barriers", "fenced layers", "fenced scratch", "register shares", "loads ahead")

CHUNK = 64
"""Columns of a chunk: what one swizzled row of 128 bytes of the copy engine and the products holds."""
SLOT_ROWS = 256
"""Rows of a slot of weights: (256, 64) operands, 32 KB."""
GROUPS = 2
"""Groups of warps that multiply; each has chains of its own."""
SLOTS = (4, 3, 2, 5, 6)
"""Slots of weights that a tile may have, best first: with 5 and 6 digits and deep128 took an H200 as long as with 4."""
RESERVED_SHARED = 512
"""Shared memory of barriers, flags and the compiler's reductions, as seen in compiled kernels, rounded up."""
MOST_PADDING = {64: 1.4, 128: 1.0}
"""Most products, with padding, for each of the kernel that else would run a network, by chains of a group: in the time
of one there an H200 made 1.5 (mnist) to 1.6 of them (digits), but 1.1 at width 128 (deep128)."""


@dataclass(frozen=True)
class OnchipTile:
    """How one program of the onchip kernel works.

    Args:
        slots: pieces of weights of 32 KB in shared memory: one is multiplied, the others are on their way.
        group_chains: chains of a group of warps, 64 or 128; a program has two groups.
        in_turns: one group multiplies at a time, layer by layer, so that the other's activations fall into that time;
            else they may multiply at once, and may come into step.
    """

    slots: int
    group_chains: int = 64
    in_turns: bool = False

    def __post_init__(self) -> None:
        if self.slots not in SLOTS or self.group_chains not in (64, 128):
            raise ValueError(
                f"{self.slots} slots and {self.group_chains} chains a group: "
                f"choose {min(SLOTS)} to {max(SLOTS)} slots, and 64 or 128 chains"
            )

    @property
    def kernel(self) -> str:
        """See `kaleido_kernels.tile.AnyTile`."""
        return "onchip"

    @property
    def chains(self) -> int:
        """See `kaleido_kernels.tile.AnyTile`."""
        return GROUPS * self.group_chains

    @property
    def name(self) -> str:
        """See `kaleido_kernels.tile.AnyTile`."""
        return f"onchip {self.chains} chains ({self.slots} slots{', in turns' if self.in_turns else ''})"

    @property
    def short_name(self) -> str:
        """See `kaleido_kernels.tile.AnyTile`."""
        return f"{self.chains} s{self.slots}{' turns' if self.in_turns else ''}"

    @property
    def loads_ahead(self) -> int:
        """Slots whose copies are under way while a product runs."""
        return self.slots - 1

    @property
    def use_tma(self) -> bool:
        """See `kaleido_kernels.tile.AnyTile`."""
        return True


tile_of = OnchipTile


class OnchipLayout(NamedTuple):
    """Sizes that are compiled in.

    Args:
        n_layers: linear layers, at least 2.
        group: chains of a group.
        cols: outputs of a hidden layer that are made at once: 128 or 256.
        halves: how often that is to make all of a padded hidden layer.
        chunks: chunks of a padded hidden layer.
        in_chunks: chunks of a state.
        last: outputs of the last layer that are made at once: 64 or 128.
        last_tiles: how often that is.
        parts: operands that hold one value: 2 in split fp32.
        slots: of the tile.
        held: whether a thread holds its chains' activations in registers; else they are in shared memory.
        through_memory: whether inputs of steps go through memory: states do not fit one accumulator.
        in_turns: of the tile.
        pieces, last_pieces: chunks of inputs that fit a slot in a hidden layer, and in the last one.
        first_used, last_used: how many of them the first and the last layer multiply; other hidden layers take all.
        first_slots, last_slots: slots of one half of the first layer, and of ``last`` outputs of the last one.
        hidden_slots: slots of one half of each other hidden layer where all have as many, else 0; all three without the
            parts of split fp32.
        n_slots: slots of weights that a step takes.
    """

    n_layers: int
    group: int
    cols: int
    halves: int
    chunks: int
    in_chunks: int
    last: int
    last_tiles: int
    parts: int
    slots: int
    held: bool
    through_memory: bool
    in_turns: bool
    pieces: int
    last_pieces: int
    first_used: int
    last_used: int
    first_slots: int
    hidden_slots: int
    last_slots: int
    n_slots: int


def padded_width(shape: NetShape, group_chains: int) -> int:
    """Padded width of all hidden layers: 128 for 128 chains a group, else 256 or 512."""
    if group_chains == 128:
        return 128
    return 256 if shape.hidden <= 256 else 512


def inner_slots(shape: NetShape, tile: OnchipTile) -> list[int]:
    """For each hidden layer the slots that one half of its outputs takes, without the parts of split fp32."""
    width = padded_width(shape, tile.group_chains)
    pieces = SLOT_ROWS // min(width, SLOT_ROWS)
    first = _chunks(shape.dim)
    return [-(-first // pieces), *(-(-_chunks(inputs) // pieces) for inputs in shape.widths[1:-2])]


def last_slots(shape: NetShape, tile: OnchipTile) -> int:
    """Slots that ``last`` outputs of the last layer take."""
    return -(-_chunks(shape.widths[-2]) // (SLOT_ROWS // _last(shape)))


def turn_slots(shape: NetShape, tile: OnchipTile, precision: str) -> int:
    """Most slots of a group's turn, where groups take turns: those of the outputs that it makes at once."""
    return operand_parts(precision) * max(*inner_slots(shape, tile), last_slots(shape, tile))


def too_long_turn(shape: NetShape, precision: str, tile: OnchipTile) -> str | None:
    """Why a launch would never end: a group's turn takes more slots than there are, and the other frees none before its
    own. None if it ends."""
    turn = turn_slots(shape, tile, precision)
    if not tile.in_turns or turn <= tile.slots:
        return None
    return f"a turn takes {turn} slots, and there are {tile.slots}"


def onchip_layout(shape: NetShape, tile: OnchipTile, precision: str) -> OnchipLayout:
    """The sizes of a tile for a network in a device precision."""
    width, last, parts = padded_width(shape, tile.group_chains), _last(shape), operand_parts(precision)
    cols = min(width, SLOT_ROWS)
    halves, pieces, in_chunks = width // cols, SLOT_ROWS // cols, _chunks(shape.dim)
    last_tiles = -(-shape.dim // last)
    first_slots, *hidden_slots = inner_slots(shape, tile)
    hidden = halves * (first_slots + sum(hidden_slots))
    return OnchipLayout(
        n_layers=shape.n_layers,
        group=tile.group_chains,
        cols=cols,
        halves=halves,
        chunks=width // CHUNK,
        in_chunks=in_chunks,
        last=last,
        last_tiles=last_tiles,
        parts=parts,
        slots=tile.slots,
        held=is_held(shape, tile, precision),
        through_memory=shape.dim > last,
        in_turns=tile.in_turns,
        pieces=pieces,
        last_pieces=SLOT_ROWS // last,
        first_used=min(pieces, in_chunks),
        last_used=min(SLOT_ROWS // last, width // CHUNK),
        first_slots=first_slots,
        hidden_slots=hidden_slots[0] if len(set(hidden_slots)) == 1 else 0,
        last_slots=last_slots(shape, tile),
        n_slots=parts * (hidden + last_tiles * last_slots(shape, tile)),
    )


def is_held(shape: NetShape, tile: OnchipTile, precision: str) -> bool:
    """Whether activations stay in registers: 64 of a thread, beside 128 for sums.

    Split fp32 and width 512 would take twice as many; and where layers take different numbers of slots, which the
    compiler must know, they are in shared memory.
    """
    width = padded_width(shape, tile.group_chains)
    alike = len(set(inner_slots(shape, tile)[1:])) <= 1
    return operand_parts(precision) == 1 and width <= SLOT_ROWS and shape.dim <= 128 and alike


def shared_bytes(shape: NetShape, tile: OnchipTile, precision: str) -> int:
    """Shared memory of a program: activations of its chains where it has them, and slots."""
    item = OPERAND_BYTES[precision]
    held = is_held(shape, tile, precision)
    values = 0 if held else tile.chains * padded_width(shape, tile.group_chains)
    activations = values * item * operand_parts(precision)
    return activations + tile.slots * SLOT_ROWS * CHUNK * item + RESERVED_SHARED


def padded_products(shape: NetShape, tile: OnchipTile) -> int:
    """Multiply-adds of one chain's step with padding; of split fp32 each is three."""
    layout = onchip_layout(shape, tile, "fp16")
    first, *others = inner_slots(shape, tile)
    chunks = layout.halves * (first * layout.first_used + sum(others) * layout.pieces)
    last = layout.last_tiles * last_slots(shape, tile) * layout.last_used
    return CHUNK * (chunks * layout.cols + last * layout.last)


def step_bytes(shape: NetShape, tile: OnchipTile, precision: str) -> int:
    """Bytes between L2 and one multiprocessor in one step: weights, and inputs where they go through memory."""
    layout = onchip_layout(shape, tile, precision)
    chunk = tile.chains * CHUNK * OPERAND_BYTES[precision]
    inputs = layout.in_chunks * chunk * (1 + layout.halves) if layout.through_memory else 0
    return layout.n_slots * SLOT_ROWS * CHUNK * OPERAND_BYTES[precision] + inputs


def candidates(shape: NetShape, precision: str, facts: GpuFacts) -> list[OnchipTile]:
    """Tiles to choose from, best first; one that says why where none can run the network."""
    if OPERAND_BYTES[precision] != 2:
        return []
    groups = [128, 64] if shape.hidden <= 128 and shape.dim <= 128 else [64]
    tiles = [_in_best_order(shape, precision, OnchipTile(slots, group)) for group in groups for slots in SLOTS]
    return [tile for tile in tiles if _misfit(shape, precision, tile) is None] or tiles[:1]


def yields(shape: NetShape, precision: str) -> str | None:
    """Why another kernel shall run a network unless this one is asked for by name: padding makes too many products."""
    for tile in candidates(shape, precision, GpuFacts())[:1]:
        if _misfit(shape, precision, tile) is None:
            padding = padded_products(shape, tile) / _other_products(shape, precision)
            if padding > MOST_PADDING[tile.group_chains]:
                return f"{tile.name}: padding makes {padding:.1f} times the products of another kernel"
    return None


def trials(shape: NetShape, precision: str, facts: GpuFacts) -> list[OnchipTile]:
    """Other tiles that are worth timing."""
    others = (replace(tile, in_turns=not tile.in_turns) for tile in candidates(shape, precision, facts))
    return [tile for tile in others if _misfit(shape, precision, tile) is None]


def refusal(shape: NetShape, precision: str, tile: OnchipTile, facts: GpuFacts) -> str | None:
    """Why a tile cannot run ``shape`` on a GPU: limit and need; None if it can."""
    if facts.capability != (9, 0):
        have = ".".join(map(str, facts.capability))
        return f"onchip: it is written for compute capability 9.0, the GPU has {have}"
    if not facts.uses_tma:
        return "onchip: it needs a copy engine, which neither this GPU nor Triton's interpreter has"
    misfit = _misfit(shape, precision, tile)
    if misfit is not None:
        return f"{tile.name}: {misfit}"
    return too_much_shared(tile, shared_bytes(shape, tile, precision), facts)


def _in_best_order(shape: NetShape, precision: str, tile: OnchipTile) -> OnchipTile:
    """A tile whose groups take turns where activations stay in registers: deep128 took an H200 12.2 ms for 13.6; digits
    gained between 16 and -4 %. Elsewhere slots are too few for a turn, or nothing was gained (deep128 in fp32)."""
    turns = replace(tile, in_turns=True)
    fits = is_held(shape, turns, precision) and turn_slots(shape, turns, precision) <= tile.slots
    return turns if fits else tile


def _misfit(shape: NetShape, precision: str, tile: OnchipTile) -> str | None:
    """Why a tile runs a network on no GPU."""
    if OPERAND_BYTES[precision] != 2:
        return f"it multiplies operands of 16 bits, those of {precision} have 32"
    if shape.n_layers < 2:
        return "the network has no hidden layer"
    split = operand_parts(precision) == 2
    most = 128 if tile.group_chains == 128 else 256 if split else 512
    if shape.hidden > most:
        return f"a hidden layer is {shape.hidden} wide, at most {most}"
    if shape.dim > 128 and (split or tile.group_chains == 128):
        what = "split fp32" if split else "128 chains a group"
        return f"states have {shape.dim} values, at most 128 with {what}"
    layout = onchip_layout(shape, tile, precision)
    turn = too_long_turn(shape, precision, tile)
    if turn is not None:
        return turn
    if layout.through_memory and tile.slots > layout.chunks:
        return f"inputs from memory go where {layout.chunks} slots can be ahead, not {tile.slots}"
    return None


def _other_products(shape: NetShape, precision: str) -> int:
    """Multiply-adds of one chain's step with padding in the kernel that else would run it, stream or wide."""
    if max(shape.widths) <= 256 // operand_parts(precision):
        layout = stream_layout(shape)
        return layout.n_tiles * layout.width * layout.tile
    return wide.padded_products(shape, wide.wide_candidates(shape, precision)[0])


def scratch_bytes(shape: NetShape, precision: str, tile: OnchipTile, n_programs: int) -> int:
    """Bytes of memory besides weights and states: inputs of steps in fp32, and as operands where they go through it."""
    layout = onchip_layout(shape, tile, precision)
    item = 4 + (OPERAND_BYTES[precision] if layout.through_memory else 0)
    return n_programs * tile.chains * layout.in_chunks * CHUNK * item


def _chunks(width: int) -> int:
    return -(-width // CHUNK)


def _last(shape: NetShape) -> int:
    return 64 if shape.dim <= 64 else 128
