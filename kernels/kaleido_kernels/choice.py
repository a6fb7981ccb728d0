"""Which kernel with which tile, and why not another: plain Python, no torch, no Triton.

A tile is refused before a launch if its shared memory or its registers do not fit; compilation would not complain. The
estimates were fitted to compiled kernels (sm_90); `kaleido_kernels.inspect` shows what a configuration really takes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kaleido_kernels.graph.plan import GRAPH_FORMS, GraphTile, graph_candidates
from kaleido_kernels.narrow.plan import narrow_layout, narrow_shared
from kaleido_kernels.precision import OPERAND_BYTES, operand_parts, usual_precision
from kaleido_kernels.shapes import NetShape, next_power_of_two
from kaleido_kernels.stream.plan import stream_layout, stream_shared
from kaleido_kernels.tile import MAX_REGISTERS, GpuFacts, Tile
from kaleido_kernels.wide.plan import WideTile, shared_bytes, wide_candidates

AnyTile = Tile | WideTile | GraphTile


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
        tuned: what `kaleido_kernels.tuned.read_tuned` returned.
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


def tuned_key(shape: NetShape, precision: str) -> str:
    """The key of a tuned table: padded width, depth, activation and device precision."""
    width = next_power_of_two(max(shape.hidden, 1))
    return f"w{width}-d{shape.dim}-l{shape.n_layers}-{shape.activation}-{precision}"
