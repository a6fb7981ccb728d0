"""Which kernel with which tile, and why not another: plain Python, no torch, no Triton.

A tile is refused before a launch if its shared memory or its registers do not fit; compilation would not complain. The
estimates were fitted to compiled kernels (sm_90); `kaleido_kernels.inspect` shows what a configuration really takes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kaleido_kernels.graph_plan import GRAPH_BLOCKS, GRAPH_FORMS, GraphTile, graph_candidates
from kaleido_kernels.precision import OPERAND_BYTES, operand_parts, usual_precision
from kaleido_kernels.shapes import NetShape, next_power_of_two
from kaleido_kernels.wide_plan import WideTile, shared_bytes, wide_candidates

REGISTERS = 65_536
"""32-bit registers of a multiprocessor."""
MAX_REGISTERS = 255
"""Registers of a thread."""
STREAM_TILE = 128
"""Columns of a weight tile of the stream kernel."""
STREAM_EDGE = 16
"""Most columns of states that the stream kernel handles at once, outside of its loop: more take more registers."""
BIAS_COLUMNS = 2
"""Spare columns that a folded bias takes: high and low part."""


@dataclass(frozen=True)
class Tile:
    """How one program of the narrow or the stream kernel works.

    Args:
        kernel: "narrow" or "stream".
        block_chains: chains of a program, 16 to 256.
        num_warps: warps of a program.
        num_stages: buffers for weight tiles (stream, where two load no tile ahead; narrow has nothing to pipeline).
    """

    kernel: str
    block_chains: int
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        if self.kernel not in ("narrow", "stream"):
            raise ValueError(f"kernel is {self.kernel!r}: a Tile is for 'narrow' or 'stream', a WideTile for 'wide'")
        if self.block_chains not in (16, 32, 64, 128, 256):
            raise ValueError(f"block_chains is {self.block_chains}: choose 16, 32, 64, 128 or 256")
        if self.num_warps not in (1, 2, 4, 8) or not 1 <= self.num_stages <= 8:
            raise ValueError(
                f"{self.num_warps} warps and {self.num_stages} stages: choose 1, 2, 4 or 8 warps and 1 to 8 stages"
            )


AnyTile = Tile | WideTile | GraphTile


@dataclass(frozen=True)
class GpuFacts:
    """What the choice needs to know of a GPU.

    Args:
        shared_memory: bytes one program may use (opt-in maximum).
        capability: CUDA compute capability such as (9, 0).
        has_tma: whether it has the bulk tensor copy engine; None for what the capability says.
        graph_block: most chains of a block of the graph path.
        n_sm: streaming multiprocessors.
    """

    shared_memory: int = 232_448
    capability: tuple[int, int] = (9, 0)
    has_tma: bool | None = None
    graph_block: int = GRAPH_BLOCKS[0]
    n_sm: int = 132

    @property
    def uses_tma(self) -> bool:
        """Whether the wide kernel may load by the copy engine."""
        return self.capability[0] >= 9 if self.has_tma is None else self.has_tma


@dataclass(frozen=True)
class NarrowLayout:
    """Sizes of the narrow kernel's operands, from the shape alone.

    Args:
        width: padded width of the hidden layers, a power of two from 16.
        dim_padded: padded D, likewise.
        bias: "fold" (constant-1 columns carry the bias inside the products), "mma" (a product of its own) or "none".
    """

    width: int
    dim_padded: int
    bias: str


def narrow_layout(shape: NetShape) -> NarrowLayout:
    """Padded sizes of ``shape``, and how its bias is added.

    Folding needs two spare columns everywhere and an activation that keeps 1 at 1. It takes no instruction at all;
    a product of its own costs 16 more inner rows a layer (25 % at width 64, 14 % at 128).
    """
    width, dim_padded = next_power_of_two(max(shape.hidden, 1)), next_power_of_two(shape.dim)
    if not any(shape.bias):
        return NarrowLayout(width, dim_padded, "none")
    spare = shape.hidden + BIAS_COLUMNS <= width and shape.dim + BIAS_COLUMNS <= dim_padded
    folds = spare and shape.activation in ("relu", "leaky_relu")
    return NarrowLayout(width, dim_padded, "fold" if folds else "mma")


@dataclass(frozen=True)
class StreamLayout:
    """Sizes of the stream kernel's operands, from the shape alone.

    Args:
        width: padded width of every layer, first and last included: a power of two from 16 to 256.
        tile: columns of one weight tile: ``width``, or half of it at 256.
        edge: columns of outputs that are handled at once outside of the loop.
        n_tiles: weight tiles of a step.
        last_tiles: how many of them belong to the last layer.
    """

    width: int
    tile: int
    edge: int
    n_tiles: int
    last_tiles: int


def stream_layout(shape: NetShape) -> StreamLayout:
    """Padded sizes of ``shape``.

    Raises:
        ValueError: a layer wider than 256.
    """
    width = next_power_of_two(max(shape.widths))
    if width > 2 * STREAM_TILE:
        raise ValueError(f"a layer is {max(shape.widths)} wide: the stream kernel takes up to 256; use the wide kernel")
    tile = min(width, STREAM_TILE)
    last_tiles = -(-shape.dim // tile)
    n_tiles = (shape.n_layers - 1) * (width // tile) + last_tiles
    return StreamLayout(width, tile, min(next_power_of_two(shape.dim), STREAM_EDGE), n_tiles, last_tiles)


def narrow_sizes(n_layers: int, layout: NarrowLayout) -> list[tuple[int, int]]:
    """Padded (in, out) of each layer of the narrow kernel."""
    inner = [layout.width] * (n_layers - 1)
    edges = [layout.dim_padded, *inner, layout.dim_padded]
    return [(edges[i], edges[i + 1]) for i in range(n_layers)]


def narrow_shared(shape: NetShape, precision: str, tile: Tile) -> int:
    """Shared memory of a narrow program in bytes: all matrices, bias rows that are apart, a layout change of states.

    Exact for the reference networks on sm_90.
    """
    layout, item = narrow_layout(shape), OPERAND_BYTES[precision]
    sizes = narrow_sizes(shape.n_layers, layout)
    weights = sum(rows * cols for rows, cols in sizes) * operand_parts(precision)
    bias = 16 * sum(cols for _, cols in sizes) if layout.bias == "mma" else 0
    return (weights + bias) * item + 4 * tile.block_chains * layout.dim_padded


def stream_shared(shape: NetShape, precision: str, tile: Tile) -> int:
    """Shared memory of a stream program in bytes, estimated: weight tiles in flight and the operand of the product."""
    layout, item = stream_layout(shape), OPERAND_BYTES[precision] * operand_parts(precision)
    return (tile.num_stages * layout.width * layout.tile + tile.block_chains * layout.width) * item


def register_estimate(shape: NetShape, precision: str, tile: Tile) -> int:
    """Registers of a thread, estimated from what it holds at once; from 256 on it would spill inside the loop.

    Narrow: accumulator, operand, state and its change. Stream: accumulator, operand, the half that waits. Split
    operands and smooth activations need more on the way. Fitted to sm_90, where the compiler takes up to 60 more
    without need: points2d 92 (compiled 95), deep128 126 (126), digits 190 (207).
    """
    parts, smooth = (
        operand_parts(precision) * OPERAND_BYTES[precision] / 4,
        shape.activation not in ("relu", "leaky_relu"),
    )
    if tile.kernel == "narrow":
        layout = narrow_layout(shape)
        held, rest = layout.width * (1 + parts) + 2 * layout.dim_padded, 28
        rest += 40 if precision == "fp16x3" else 0
        rest += layout.width * 70 // 128 if smooth and shape.activation != "tanh" else 0
    else:
        stream = stream_layout(shape)
        two = stream.width > stream.tile
        held, rest = stream.tile + stream.width * parts + (stream.tile * parts if two else 0), 30
        rest += 70 if smooth and two else 0
    return int(tile.block_chains * held / (32 * tile.num_warps)) + rest


def refusal(shape: NetShape, precision: str, tile: AnyTile, facts: GpuFacts) -> str | None:
    """Why a tile cannot run ``shape`` on a GPU: limit and need; None if it can. ``precision`` is a device precision."""
    if isinstance(tile, GraphTile):
        if precision in GRAPH_FORMS:
            return None
        return f"graph: precision {precision!r} is not offered there: use fp32, fp16 or bf16, or another kernel"
    if isinstance(tile, WideTile):
        need = shared_bytes(tile, precision)
    elif max(shape.widths) > (128 if tile.kernel == "narrow" else 256):
        return f"{tile.kernel}: a layer is {max(shape.widths)} wide, at most {128 if tile.kernel == 'narrow' else 256}"
    elif tile.kernel == "narrow":
        need = narrow_shared(shape, precision, tile)
    else:
        need = stream_shared(shape, precision, tile)
    name = tile_name(tile)
    if facts.capability[0] == 10 and precision == "fp16x3" and _fills_tensor_memory(tile):
        return f"{name}: split fp32 needs more than the 512 columns of this GPU's tensor memory"
    if (
        isinstance(tile, Tile)
        and tile.kernel == "stream"
        and facts.capability[0] == 8
        and stream_layout(shape).width > 128
    ):
        # In every tile tried: Triton's prefetch pass, which runs for these GPUs alone, stops with an error.
        return f"{name}: Triton cannot compile widths over 128 with jitter for compute capability 8"
    if isinstance(tile, WideTile) and tile.use_tma and not facts.uses_tma:
        return f"{name}: the GPU has no copy engine for it, which came with compute capability 9.0"
    if isinstance(tile, WideTile) and not tile.use_tma and precision != "ieee" and _reads_behind_a_fence(facts):
        return f"{name}: not every release of Triton fences copies by pointers before this GPU's products"
    if need > facts.shared_memory:
        return f"{name}: needs {need:,} bytes of shared memory, the GPU has {facts.shared_memory:,}"
    if isinstance(tile, Tile):
        registers = register_estimate(shape, precision, tile)
        if registers > MAX_REGISTERS:
            return f"{name}: needs about {registers} registers a thread, the GPU has {MAX_REGISTERS}"
    return None


def _reads_behind_a_fence(facts: GpuFacts) -> bool:
    """GPUs whose products read shared memory as the copy engine does, so that copies by threads need a fence.

    Triton 3.6 leaves it out in the wide kernel (`verdicts.fenced_operands`); narrow and stream have it in all releases.
    """
    return facts.uses_tma and facts.capability[0] in (9, 10)


def _fills_tensor_memory(tile: Tile | WideTile) -> bool:
    """Tiles that sm_100 compiled to a trap in split fp32; narrow 32, stream 128 and wide 128x128 compile there."""
    return max(tile.cols, tile.last_cols) > 128 if isinstance(tile, WideTile) else tile == Tile("narrow", 64, 4)


def tile_name(tile: AnyTile) -> str:
    """A tile in a few words, for explanations."""
    if isinstance(tile, GraphTile):
        return f"graph of products over blocks of {tile.block_chains:,} chains"
    if isinstance(tile, WideTile):
        loads = "copy engine" if tile.use_tma else "pointers"
        sizes = f"wide {tile.rows}x{tile.cols}x{tile.inner}"
        return f"{sizes} ({tile.warps} warps, {tile.stages} stages, {loads}, last {tile.last_cols})"
    return f"{tile.kernel} {tile.block_chains} chains ({tile.num_warps} warps, {tile.num_stages} stages)"


def candidates(shape: NetShape, precision: str, facts: GpuFacts) -> list[AnyTile]:
    """Tiles worth considering, best first; `refusal` says which of them cannot run.

    narrow 64/4: most programs on a multiprocessor, so that one's products cover another's activations. stream 128/8:
    half the weight traffic of 64 chains. ieee products use ordinary units: large unrolled networks compile for minutes.
    """
    found: list[AnyTile] = []
    if precision != "ieee" or shape.n_layers * narrow_layout(shape).width <= 256:
        found += [Tile("narrow", 64, 4), Tile("narrow", 32, 4)]
    if precision != "ieee":
        found += [Tile("stream", 128, 8, 2), Tile("stream", 64, 4, 2)]
    wide: list[AnyTile] = [*wide_candidates(shape, precision, facts.uses_tma)]
    if facts.uses_tma:
        wide += wide_candidates(shape, precision, use_tma=False)
    return found + wide


def kernel_of(tile: AnyTile) -> str:
    """ "narrow", "stream", "wide" or "graph"."""
    if isinstance(tile, Tile):
        return tile.kernel
    return "wide" if isinstance(tile, WideTile) else "graph"


@dataclass(frozen=True)
class Choice:
    """The tile for a launch, and for each better one before it why it was refused."""

    tile: AnyTile
    refused: tuple[str, ...] = ()
    tuned: bool = False
    forced: bool = False

    @property
    def kernel(self) -> str:
        """ "narrow", "stream", "wide" or "graph"."""
        return kernel_of(self.tile)

    def explain(self) -> str:
        """The choice in one line."""
        how = "measured best on this GPU" if self.tuned else "first that fits"
        how = f"asked for by name, {how}" if self.forced else how
        return f"{tile_name(self.tile)}, {how}" + "".join(f"; not {reason}" for reason in self.refused)


def choose(
    shape: NetShape,
    precision: str,
    facts: GpuFacts,
    tuned: dict[str, Any] | None = None,
    kernel: str = "auto",
) -> Choice:
    """The kernel and tile for a launch: the tuned one if there is one and it fits, else the first candidate that fits.

    The number of chains does not matter: kernels round differently, and a chain's bits must not depend on its company.

    Args:
        shape: the network.
        precision: a device precision, or one asked for of weights of the usual range.
        facts: the GPU.
        tuned: what `read_tuned` returned.
        kernel: one of `kaleido_kernels.shapes.KERNELS` by name, or "auto" for any.

    Raises:
        ValueError: a GPU too old for the precision, or no tile fits: the limit and the need.
    """
    form = usual_precision(precision)
    if form != "ieee" and facts.capability < (8, 0):
        raise ValueError(
            f"precision {precision!r} needs compute capability 8.0, the GPU has {facts.capability[0]}."
            f"{facts.capability[1]}: use engine='cpu' or another GPU"
        )
    measured = (tuned or {}).get(tuned_key(shape, form))
    if measured is not None:
        tile = tile_from_json(measured)
        if kernel in ("auto", kernel_of(tile)) and refusal(shape, form, tile, facts) is None:
            return Choice(tile, tuned=True, forced=kernel != "auto")
    refused: list[str] = []
    # The graph path is taken where a tuned table says so or where it is asked for, never by default.
    by_library: list[AnyTile] = [*graph_candidates(shape, form, facts.graph_block)]
    possible = by_library if kernel == "graph" else candidates(shape, form, facts)
    named = [tile for tile in possible if kernel in ("auto", kernel_of(tile))]
    if kernel != "auto" and not named:
        raise ValueError(f"kernel {kernel!r} does not compute {precision}" + (" this way" if form == "ieee" else ""))
    for tile in named:
        reason = refusal(shape, form, tile, facts)
        if reason is None:
            return Choice(tile, tuple(dict.fromkeys(refused)), forced=kernel != "auto")
        refused.append(reason)
    what = "no tile" if kernel == "auto" else f"no tile of kernel {kernel!r}"
    raise ValueError(f"{what} fits this GPU for {shape.widths} in {precision}: " + "; ".join(dict.fromkeys(refused)))


def force(shape: NetShape, precision: str, facts: GpuFacts, tile: AnyTile) -> Choice:
    """A choice of just this tile, whatever is tuned or comes first.

    Raises:
        ValueError: it cannot run there: the limit and the need.
    """
    reason = refusal(shape, usual_precision(precision), tile, facts)
    if reason is not None:
        raise ValueError(reason)
    return Choice(tile, forced=True)


def tuned_key(shape: NetShape, precision: str) -> str:
    """The key of a tuned table: padded width, depth, activation and device precision."""
    width = next_power_of_two(max(shape.hidden, 1))
    return f"w{width}-d{shape.dim}-l{shape.n_layers}-{shape.activation}-{precision}"


def tile_to_json(tile: AnyTile) -> dict[str, Any]:
    """A tile as plain values."""
    return {"kernel": kernel_of(tile), **asdict(tile)}


def tile_from_json(values: dict[str, Any]) -> AnyTile:
    """The inverse of `tile_to_json`.

    Raises:
        ValueError: values that no tile has.
    """
    try:
        fields = dict(values)
        for name, value in fields.items():
            if type(value) is not {"kernel": str, "use_tma": bool}.get(name, int):  # 64.0 and true are no counts
                raise ValueError(f"not a tile: {values}: {name} is {value!r}")
        if fields.get("kernel") in ("wide", "graph"):
            return WideTile(**fields) if fields.pop("kernel") == "wide" else GraphTile(**fields)
        return Tile(**fields)
    except TypeError as error:
        raise ValueError(f"not a tile: {values}: {error}") from error


def read_tuned(path: Path, device: str | None = None, triton: str | None = None) -> dict[str, Any]:
    """A tuned table: JSON {"device": ..., "triton": ..., "tiles": {key: tile}}; returns the tiles. Not read at import.

    Args:
        path: the file.
        device: name of the GPU that it must be of; None for any.
        triton: version of Triton that it must be of, in its first two numbers; None for any.

    Raises:
        ValueError: not such a file, or one of another GPU or Triton.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        tiles = table["tiles"]
        for values in tiles.values():
            tile_from_json(values)
        for name, wanted in (("device", device), ("triton", triton)):
            found = str(table.get(name, "unknown"))
            same = found == wanted if name == "device" else found.split(".")[:2] == (wanted or "").split(".")[:2]
            if wanted is not None and not same:
                raise ValueError(f"it is of {name} {found}, this is {wanted}")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        text = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} is no tuned table for here: {text}; delete it or measure it again") from error
    return dict(tiles)
