"""How a request will be run: engine, kernel, tiles, blocks and memory, decided once."""

from __future__ import annotations

from dataclasses import dataclass

from kaleido_fast.errors import InputError
from kaleido_fast.model import ModelSpec
from kaleido_fast.names import (
    LOW_PRECISIONS,
)
from kaleido_fast.planning.blocks import HELD_BLOCKS, block_bytes, check_memory, module_tile, streamed_block, tile_rows
from kaleido_fast.planning.cpu_tiles import full_tile
from kaleido_fast.planning.facts import DeviceFacts
from kaleido_fast.planning.request import MAX_COUNT, SampleRequest
from kaleido_fast.scalars import whole_number
from kaleido_kernels.graph_plan import GraphTile, graph_bytes
from kaleido_kernels.precision import usual_precision
from kaleido_kernels.tiles import Choice, choose
from kaleido_kernels.wide_plan import WideTile, scratch_bytes

NOT_COMPILED = "numba compiles nothing in this process (NUMBA_DISABLE_JIT): unset it, or use engine='reference'"


@dataclass(frozen=True)
class SamplePlan:
    """How a request will be run.

    Args:
        engine: the engine that runs it.
        reason: why that one.
        tile_rows: chains in one tile of the reference; the last one is padded, or smaller where no bit shows it.
        block_chains: chains handed to the engine at once.
        draws_bytes: memory of the draws and per-chain results that are kept.
        working_bytes: memory of the engine besides that, estimated.
        kernel: the engine's kernel and tile in words.
    """

    engine: str
    reason: str
    tile_rows: int
    block_chains: int
    draws_bytes: int
    working_bytes: int
    kernel: str

    def explain(self) -> str:
        """The plan in one line."""
        return (
            f"engine {self.engine} ({self.reason}); {self.kernel}; blocks of {self.block_chains:,} chains; "
            f"{self.draws_bytes / 2**20:,.0f} MiB kept + about {self.working_bytes / 2**20:,.0f} MiB at work"
        )


def choose_engine(
    request: SampleRequest, spec: ModelSpec | None, facts: DeviceFacts, why_general: str = ""
) -> tuple[str, str]:
    """The engine for a request and the reason. ``spec`` is None for a module that only the reference can run.

    Args:
        why_general: why the model has no ``spec``.

    Raises:
        InputError: an engine asked for by name that cannot run this.
    """
    asked = request.engine if request.kernel == "auto" else "triton"
    if spec is None:
        if asked not in ("auto", "reference"):
            raise InputError(
                f"engine {asked!r} takes a KaleidoMLP or a plain Sequential, and "
                f"{why_general or 'this is none'}: use engine='reference' for this"
            )
        if request.precision in LOW_PRECISIONS:
            raise InputError(
                f"precision {request.precision!r} rounds the layers of a plain MLP; this module computes in the "
                "type of its weights: convert it before, such as by .bfloat16(), and pass precision 'fp32' or 'fp64'"
            )
        return "reference", why_general or "the model is not a plain MLP"
    able = {name: _why_not(name, request, spec, facts) for name in ("triton", "cpu")}
    if asked in able:
        if able[asked]:
            what = f"engine {asked!r}" if request.kernel == "auto" else f"kernel {request.kernel!r}"
            raise InputError(f"{what} cannot run this: {able[asked]}")
        return asked, "asked for by name"
    if asked == "reference":
        return asked, "asked for by name"
    best = "triton" if facts.kind == "cuda" else "cpu"
    if able[best]:
        return "reference", f"{best} cannot run this: {able[best]}"
    return best, f"the fastest on {facts.name or facts.kind}"


def _why_not(engine: str, request: SampleRequest, spec: ModelSpec, facts: DeviceFacts) -> str:
    """Why ``engine`` cannot run a request on a device, with what would help; empty if it can."""
    if request.precision == "fp64":
        return "it has no fp64: use engine='reference'"
    if engine == "cpu":
        if facts.kind != "cpu":
            return f"the device is {facts.name or facts.kind}: pass device='cpu'"
        if request.precision == "bf16" and not facts.has_bf16:
            return "this processor does not multiply bf16: use engine='reference'"
        if request.precision not in ("fp32", "bf16"):
            return f"it computes in fp32 or bf16, not {request.precision}: use engine='reference'"
        return facts.numba_problem if facts.has_numba else "numba is not installed: pip install 'kaleido-fast[cpu]'"
    if not facts.has_triton:
        return "Triton is not installed: it comes with torch's CUDA builds, or pip install triton"
    if facts.kind == "cpu" and not facts.interpreter:
        return "there is no GPU: use engine='cpu' (TRITON_INTERPRET=1 runs it slowly, for tests)"
    try:
        choose_kernel(request, spec, facts)
    except ValueError as problem:
        return str(problem)
    return ""


def choose_kernel(request: SampleRequest, spec: ModelSpec, facts: DeviceFacts, precision: str | None = None) -> Choice:
    """The Triton engine's kernel and tile for a request; ``precision`` is the device's form of it where known.

    Raises:
        ValueError: none fits; why.
    """
    form = precision or request.precision
    return choose(spec, form, facts.gpu, facts.tuned, request.kernel)


def make_plan(
    request: SampleRequest,
    spec: ModelSpec | None,
    facts: DeviceFacts,
    dim: int,
    *,
    streamed: bool = False,
    block_chains: int | None = None,
    why_general: str = "",
) -> SamplePlan:
    """Choose engine, tiles, blocks and memory for a request on a device.

    With ``streamed`` the draws of a block leave the memory once the block is done: a few blocks are held, not the run.

    Args:
        block_chains: chains at work at once; None for as many as are useful, fewer where memory is short.
        why_general: why the model has no ``spec``.

    Raises:
        InputError: the engine cannot run it, or the draws do not fit the device's memory.
    """
    engine, reason = choose_engine(request, spec, facts, why_general)
    width = max(spec.widths) if spec else dim
    rows = tile_rows(width, facts.kind)
    if spec is None:
        rows = request.tile_chains or module_tile(request.n_chains, dim, facts.kind)
    elif request.tile_chains is not None:
        raise InputError("tile_chains is for modules that are no plain MLP: leave it out, no bit depends on it here")
    item = 8 if request.precision == "fp64" else 4
    block = rows * max(1, min(2**16, 2**24 // dim) // rows)  # states of a block stay below 64 MiB
    per_chain = request.n_draws * dim * item + 4 + 8 + 1
    kept = request.n_chains * per_chain
    if streamed:
        block = streamed_block(rows, dim * request.n_draws)
        kept = min(request.n_chains, HELD_BLOCKS * block) * per_chain
    kernel, scratch = f"tiles of {rows:,} chains", 4 * rows * width * item
    if engine == "triton" and spec is not None:
        choice = choose_kernel(request, spec, facts)
        kernel, scratch = choice.explain(), _scratch_bytes(choice, spec, request.precision, facts)
    elif engine == "cpu" and spec is not None:
        kernel = f"fused loop over tiles of {full_tile(spec.widths)} chains"
    fixed = kept + scratch + 2 * (spec.n_parameters if spec else 0) * item  # weights as given and as packed
    if block_chains is not None:
        block = whole_number("block_chains", block_chains, 1, MAX_COUNT)
    elif not streamed:  # blocks of stored draws are a property of the store, not of this machine
        while block > rows and fixed + block_bytes(request, dim, block) > facts.memory:
            block = rows * max(1, block // rows // 2)
    need = fixed + block_bytes(request, dim, block)
    check_memory(need, request, dim, item, facts)
    return SamplePlan(engine, reason, rows, block, kept, need - kept, kernel)


def _scratch_bytes(choice: Choice, spec: ModelSpec, precision: str, facts: DeviceFacts) -> int:
    """Bytes that a kernel needs besides weights and states."""
    if isinstance(choice.tile, GraphTile):
        return graph_bytes(spec, precision, choice.tile)
    if isinstance(choice.tile, WideTile):
        return facts.gpu.n_sm * scratch_bytes(spec, choice.tile, usual_precision(precision))
    return 0
