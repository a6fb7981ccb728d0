"""How a request will be run: engine, kernel, tiles, blocks and memory, decided once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kaleido_fast.errors import InputError
from kaleido_fast.model import ModelSpec
from kaleido_fast.names import (
    LOW_PRECISIONS,
)
from kaleido_fast.planning.blocks import (
    HELD_BLOCKS,
    block_bytes,
    chain_bytes,
    check_memory,
    compute_block,
    item_bytes,
    launch_block,
    launch_wave,
    module_tile,
    smaller_block,
    stored_block,
    tile_rows,
)
from kaleido_fast.planning.cpu_tiles import full_tile
from kaleido_fast.planning.facts import DeviceFacts
from kaleido_fast.planning.options import MAX_COUNT
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.scalars import whole_number
from kaleido_kernels.activations import ACTIVATIONS
from kaleido_kernels.choice import Choice, choose, force
from kaleido_kernels.precision import (
    FP32_LARGEST,
    LARGEST_OPERANDS,
    USUAL,
    DevicePrecision,
    WeightsRange,
    device_precision,
)
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.tile import AnyTile
from kaleido_kernels.tuned import tile_to_json

NOT_COMPILED = "numba compiles nothing in this process (NUMBA_DISABLE_JIT): unset it, or use engine='reference'"


@dataclass(frozen=True)
class KernelPlan:
    """How the Triton engine runs a network: all that decides what is packed and launched.

    Args:
        choice: kernel and tile, and why not another.
        precision: how it computes.
        n_programs: programs of a kernel that stays on the GPU through all steps (onchip, wide): one a multiprocessor,
            since its shared memory leaves room for no second one.
        scratch_bytes: memory besides weights and states.
    """

    choice: Choice
    precision: DevicePrecision
    n_programs: int
    scratch_bytes: int

    @property
    def packing(self) -> tuple[AnyTile, DevicePrecision, int]:
        """What decides how weights are packed, however the tile came to be chosen."""
        return self.choice.tile, self.precision, self.n_programs

    def explain(self) -> str:
        """The kernel in words."""
        why_plain = "; plain fp32 products, because of the weights' range" if self.precision == "ieee" else ""
        return self.choice.explain() + why_plain


@dataclass(frozen=True)
class PlannedPhase:
    """Steps ``first`` .. ``last - 1`` of a run, by one packing of the weights.

    Args:
        first, last: half-open range of steps.
        precision: as a request names it.
        kernel: of engine "triton"; None for others.
    """

    first: int
    last: int
    precision: str
    kernel: KernelPlan | None = None


@dataclass(frozen=True)
class SamplePlan:
    """How a request will be run: decided once; all that runs, explains or records the run reads this.

    Args:
        engine: the engine that runs it.
        reason: why that one.
        tile_rows: chains in one tile of the reference; the last one is padded, or smaller where no bit shows it.
        block_chains: chains handed to the engine at once.
        draws_bytes: memory of the draws and per-chain results that are kept.
        working_bytes: memory of the engine besides that, estimated.
        phases: what runs in which steps: one phase, and with ``polish`` a second one in fp32.
        loop_chains: chains in one tile of engine "cpu"; 0 for others.
    """

    engine: str
    reason: str
    tile_rows: int
    block_chains: int
    draws_bytes: int
    working_bytes: int
    phases: tuple[PlannedPhase, ...]
    loop_chains: int = 0

    @property
    def kernel(self) -> str:
        """The engine's kernel and tile in words."""
        if self.engine == "cpu":
            return f"fused loop over tiles of {self.loop_chains} chains"
        kernels = [phase.kernel.explain() for phase in self.phases if phase.kernel is not None]
        return f"; from step {self.phases[-1].first:,} on ".join(kernels) or f"tiles of {self.tile_rows:,} chains"

    @property
    def kernels(self) -> dict[str, dict[str, Any]]:
        """What decides the bits of engine "triton", for records: tile and device precision, by the first step."""
        return {
            f"from step {phase.first}": {
                **tile_to_json(phase.kernel.choice.tile),
                "precision": phase.kernel.precision,
            }
            for phase in self.phases
            if phase.kernel is not None
        }

    def explain(self) -> str:
        """The plan in one line."""
        return (
            f"engine {self.engine} ({self.reason}); {self.kernel}; blocks of {self.block_chains:,} chains; "
            f"{self.draws_bytes / 2**20:,.0f} MiB kept + about {self.working_bytes / 2**20:,.0f} MiB at work"
        )


def make_plan(
    request: SampleRequest,
    spec: ModelSpec | None,
    facts: DeviceFacts,
    dim: int,
    *,
    weights: WeightsRange = USUAL,
    stored: bool = False,
    block_chains: int | None = None,
    why_general: str = "",
) -> SamplePlan:
    """Choose engine, kernels, tiles, blocks and memory for a request on a device.

    With ``stored`` the draws of a block leave the memory once the block is done: a few blocks are held, not the run.

    Args:
        request: what is asked for.
        spec: the network; None for a module that only the reference can run.
        facts: the device.
        dim: D.
        weights: sizes of the network's weights, which some precisions of a GPU do not fit.
        block_chains: chains at work at once; None for as many as are useful, fewer where memory is short.
        why_general: why the model has no ``spec``.

    Raises:
        InputError: the engine cannot run it, or the draws do not fit the device's memory.
    """
    engine, reason, phases = choose_engine(request, spec, facts, weights, why_general)
    width = max(spec.widths) if spec else dim
    rows = tile_rows(width, facts.kind)
    if spec is None:
        rows = request.tile_chains or module_tile(request.n_chains, dim, facts.kind)
    elif request.tile_chains is not None:
        raise InputError("tile_chains is for modules that are no plain MLP: leave it out, no bit depends on it here")
    item = item_bytes(request)
    fused = [phase.kernel for phase in phases if phase.kernel is not None and facts.kind == "cuda"]
    wave = max((launch_wave(kernel.choice.tile.chains, facts.gpu.n_sm) for kernel in fused), default=rows)
    block = launch_block(wave, dim, rows) if fused else compute_block(dim, rows)
    per_chain = chain_bytes(request, dim)
    kept = request.n_chains * per_chain
    if stored:
        block = stored_block(rows, dim * request.n_draws)
        kept = min(request.n_chains, HELD_BLOCKS * block) * per_chain
    scratch = [4 * rows * width * item if phase.kernel is None else phase.kernel.scratch_bytes for phase in phases]
    packed = spec.n_parameters * item if spec else 0
    fixed = kept + sum(scratch) + (1 + len(phases)) * packed  # weights as given, and as packed for each phase
    if block_chains is not None:
        block = whole_number("block_chains", block_chains, 1, MAX_COUNT)
    elif not stored:  # blocks of stored draws are a property of the store, not of this machine
        while block > rows and fixed + block_bytes(request, dim, block) > facts.memory:
            block = smaller_block(block, wave, rows)
    need = fixed + block_bytes(request, dim, block)
    check_memory(need, request, dim, facts)
    loop_chains = full_tile(spec.widths) if spec and engine == "cpu" else 0
    return SamplePlan(engine, reason, rows, block, kept, need - kept, phases, loop_chains)


def choose_engine(
    request: SampleRequest,
    spec: ModelSpec | None,
    facts: DeviceFacts,
    weights: WeightsRange = USUAL,
    why_general: str = "",
) -> tuple[str, str, tuple[PlannedPhase, ...]]:
    """The engine for a request, the reason, and what it runs in which steps. Arguments are those of `make_plan`.

    Raises:
        InputError: an engine asked for by name that cannot run this.
    """
    _refuse_weights(request.precision, weights)
    asked = request.engine if request.kernel == "auto" else "triton"
    plain = _phases(request)
    if spec is None:
        _refuse_for_module(asked, request, why_general)
        return "reference", why_general or "the model is not a plain MLP", plain
    if asked == "reference":
        return asked, "asked for by name", plain
    engine = asked if asked != "auto" else "triton" if facts.kind == "cuda" else "cpu"
    try:
        _refuse_engine(engine, request, spec, facts)
        if engine == "triton":
            plain = tuple(_with_kernel(phase, request, spec, facts, weights) for phase in plain)
    except ValueError as problem:
        if asked == "auto":
            return "reference", f"{engine} cannot run this: {problem}", plain
        what = f"engine {asked!r}" if request.kernel == "auto" else f"kernel {request.kernel!r}"
        raise InputError(f"{what} cannot run this: {problem}") from problem
    reason = "asked for by name" if asked != "auto" else f"the fastest on {facts.name or facts.kind}"
    if engine == "cpu" and request.precision == "bf16" and facts.slow_bf16:
        reason += f"; bf16 by {facts.slow_bf16}, no faster than fp32: this processor multiplies no bf16, or slowly"
    return engine, reason, plain


def plan_kernel(
    spec: NetShape,
    precision: str,
    facts: DeviceFacts,
    weights: WeightsRange = USUAL,
    *,
    kernel: str = "auto",
    tile: AnyTile | None = None,
) -> KernelPlan:
    """The Triton engine's kernel, tile and device precision for a network on a GPU.

    Args:
        spec: the network.
        precision: as a request names it.
        facts: the GPU.
        weights: sizes of the weights.
        kernel: one by name, or "auto".
        tile: one that is to run whatever is tuned or comes first; None to choose.

    Raises:
        ValueError: weights outside of the precision's range, or no tile fits (or ``tile`` does not): why.
    """
    on_gpu = device_precision(precision, weights)
    choice = (
        choose(spec, on_gpu, facts.gpu, facts.tuned, kernel) if tile is None else force(spec, on_gpu, facts.gpu, tile)
    )
    n_programs = facts.gpu.n_sm
    return KernelPlan(choice, on_gpu, n_programs, choice.scratch_bytes(spec, on_gpu, n_programs))


def _phases(request: SampleRequest) -> tuple[PlannedPhase, ...]:
    """Which steps run in which precision: with ``polish`` some before the first draw, and all after it, in fp32."""
    n_steps = request.schedule.n_steps
    if not request.polish:
        return (PlannedPhase(0, n_steps, request.precision),)
    exact = PlannedPhase(request.polish_from, n_steps, "fp32")
    return (PlannedPhase(0, request.polish_from, request.precision), exact) if request.polish_from else (exact,)


def _with_kernel(
    phase: PlannedPhase, request: SampleRequest, spec: ModelSpec, facts: DeviceFacts, weights: WeightsRange
) -> PlannedPhase:
    return replace(phase, kernel=plan_kernel(spec, phase.precision, facts, weights, kernel=request.kernel))


def _refuse_weights(precision: str, weights: WeightsRange) -> None:
    """Refuse a precision that makes infinities of finite weights: `InputError`."""
    most = LARGEST_OPERANDS.get(precision)
    if most is not None and weights.largest > most:
        remedy = "scale the network" if most == FP32_LARGEST else "use precision='fp32'"
        raise InputError(
            f"precision {precision!r}: the largest weight is {weights.largest:.4g}, at most {most:.4g} fits; {remedy}"
        )


def _refuse_for_module(asked: str, request: SampleRequest, why_general: str) -> None:
    """Refuse what a module that is no plain MLP cannot have: `InputError`."""
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


def _refuse_engine(engine: str, request: SampleRequest, spec: ModelSpec, facts: DeviceFacts) -> None:
    """Raise `ValueError` with the reason, and what would help, where ``engine`` cannot run a request on a device."""
    if request.precision == "fp64":
        raise ValueError("it has no fp64: use engine='reference'")
    if engine == "cpu":
        problem = _why_not_cpu(request, spec, facts)
    elif not facts.has_triton:
        problem = "Triton is not installed: it comes with torch's CUDA builds, or pip install triton"
    elif facts.kind == "cpu" and not facts.interpreter:
        problem = "there is no GPU: use engine='cpu' (TRITON_INTERPRET=1 runs it slowly, for tests)"
    else:
        problem = ""
    if problem:
        raise ValueError(problem)


def _why_not_cpu(request: SampleRequest, spec: ModelSpec, facts: DeviceFacts) -> str:
    if facts.kind != "cpu":
        return f"the device is {facts.name or facts.kind}: pass device='cpu'"
    if request.precision not in ("fp32", "bf16"):
        return f"it computes in fp32 or bf16, not {request.precision}: use engine='reference'"
    if not ACTIVATIONS[spec.activation].on_cpu:
        return f"its loops have no {spec.activation}: use engine='reference'"
    return facts.numba_problem if facts.has_numba else "numba is not installed: pip install 'kaleido-fast[cpu]'"
