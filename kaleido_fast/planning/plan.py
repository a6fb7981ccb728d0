"""What is asked for (`SampleRequest`), how it will be run (`SamplePlan`): pure, no device."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from kaleido_fast.errors import InputError, unknown_name
from kaleido_fast.model import ModelSpec
from kaleido_fast.names import (
    DEFAULT_BURN_IN,
    DEFAULT_CHECK_EVERY,
    DEFAULT_JITTER,
    DEFAULT_MAX_PERIOD,
    DEFAULT_PATIENCE,
    DEFAULT_SETTLE,
    DEFAULT_THIN,
    DEFAULT_TOL,
    ENGINES,
    INITS,
    KERNELS,
    LOW_PRECISIONS,
    NOISES,
    PRECISIONS,
)
from kaleido_fast.planning.cpu_tiles import full_tile
from kaleido_fast.scalars import plain_fields, whole_number
from kaleido_kernels.graph_plan import GraphTile, graph_bytes
from kaleido_kernels.precision import usual_precision
from kaleido_kernels.schedule import MAX_STEPS, Schedule
from kaleido_kernels.tiles import Choice, GpuFacts, choose
from kaleido_kernels.wide_plan import WideTile, scratch_bytes

RECOMMENDABLE = ("burn_in", "thin", "jitter", "settle", "tol")
NOT_COMPILED = "numba compiles nothing in this process (NUMBA_DISABLE_JIT): unset it, or use engine='reference'"
MAX_COUNT = 2**62
MAX_PERIOD = 2**16
STREAMED_VALUES = 2**20  # values of the draws of one block that is written as it is done: 4 MiB in fp32
HELD_BLOCKS = 4  # at work, waiting (2) and being written
MAX_TILE = 2**20


@dataclass(frozen=True)
class Trace:
    """States to record for pictures: ``chains`` (absolute ids) at ``steps`` (0 is the start noise)."""

    chains: tuple[int, ...]
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        plain_fields(self)


@dataclass(frozen=True)
class SampleRequest:
    """What a run computes; two equal requests give the same bits on one engine, precision and kind of device (on a CPU
    engine "reference" also takes the same number of threads).

    Args:
        n_chains: number of chains, at least 1.
        first_chain: absolute id of the first one, 0 .. 2**62.
        burn_in: steps before the draws.
        n_draws: draws kept per chain.
        thin: steps per draw.
        seed: 0 .. 2**64 - 1.
        init: start noise: "uniform" over the data range or "normal" clipped to it.
        noise: jitter noise: "normal", "uniform" or "upstream".
        jitter: scale of the jitter noise in units of half the data range; 0 is off.
        settle: steps without jitter before each draw; not used by "upstream" noise, which comes after every step.
        tol: without jitter, a chain whose residual is below it is frozen (see `kaleido_fast.running.settling`); None
            runs every step. Jittered runs never freeze.
        patience: checks in a row below ``tol`` before a chain is frozen.
        check_every: steps between checks; they fall on multiples of it.
        max_period: longest cycle looked for among chains that do not settle; 1 looks for none.
        retire_cycles: a chain found in a cycle is run no further; its later draws walk the cycle.
        precision: "fp32", "fp64" (reference only), "tf32", "fp16" or "bf16" (rounded operands, fp32 sums).
        polish: with a precision below fp32, steps before the first draw from which on all is run in fp32.
        engine: "auto", "triton", "cpu" or "reference".
        kernel: of the Triton engine: "narrow", "stream", "wide" or "graph"; "auto" lets the plan choose.
        trace: states to record, or None.
        tile_chains: rows that a module which is no plain MLP gets at once: bits may depend on it. None lets the plan
            choose (`module_tile`); `kaleido_fast.sampling.prepare_run` writes its choice here.

    Raises:
        InputError: a value outside of what is said here.
    """

    n_chains: int
    first_chain: int = 0
    burn_in: int = DEFAULT_BURN_IN
    n_draws: int = 1
    thin: int = DEFAULT_THIN
    seed: int = 0
    init: str = "uniform"
    noise: str = "normal"
    jitter: float = DEFAULT_JITTER
    settle: int = DEFAULT_SETTLE
    tol: float | None = DEFAULT_TOL
    patience: int = DEFAULT_PATIENCE
    check_every: int = DEFAULT_CHECK_EVERY
    max_period: int = DEFAULT_MAX_PERIOD
    retire_cycles: bool = False
    precision: str = "fp32"
    polish: int = 0
    engine: str = "auto"
    kernel: str = "auto"
    trace: Trace | None = None
    tile_chains: int | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        _check_count("n_chains", self.n_chains, 1, MAX_COUNT)
        _check_count("first_chain", self.first_chain, 0, MAX_COUNT)
        _check_count("burn_in", self.burn_in, 0, MAX_STEPS)
        _check_count("n_draws", self.n_draws, 1, MAX_STEPS)
        _check_count("thin", self.thin, 1, MAX_STEPS)
        _check_count("settle", self.settle, 0, MAX_STEPS)
        _check_count("patience", self.patience, 1, MAX_STEPS)
        _check_count("check_every", self.check_every, 1, MAX_STEPS)
        _check_count("max_period", self.max_period, 1, MAX_PERIOD)
        _check_count("polish", self.polish, 0, MAX_STEPS)
        _check_count("seed", self.seed, 0, 2**64 - 1)
        _check_name("init", self.init, INITS)
        _check_name("noise", self.noise, NOISES)
        _check_name("precision", self.precision, PRECISIONS)
        _check_name("engine", self.engine, ENGINES)
        _check_name("kernel", self.kernel, KERNELS)
        if self.kernel != "auto" and self.engine not in ("auto", "triton"):
            raise InputError(
                f"kernel {self.kernel!r} with engine {self.engine!r}: kernels are of engine 'triton'; leave one out"
            )
        _check_scale("jitter", self.jitter, positive=False)
        if self.tol is not None:
            _check_scale("tol", self.tol, positive=True)
        try:
            _ = self.schedule
        except ValueError as problem:
            raise InputError(str(problem)) from problem
        if self.polish > self.burn_in + self.thin:
            raise InputError(
                f"polish is {self.polish}, the first draw comes after {self.burn_in + self.thin} steps: "
                "pass at most that"
            )
        if self.polish and self.precision not in LOW_PRECISIONS:
            raise InputError(f"polish with precision {self.precision!r}: it goes with {', '.join(LOW_PRECISIONS)}")
        if self.trace is not None:
            _check_trace(self.trace, self)
        if self.tile_chains is not None:
            _check_count("tile_chains", self.tile_chains, 1, MAX_TILE)

    @property
    def freezes(self) -> bool:
        """Whether chains that have arrived are frozen."""
        return self.tol is not None and self.jitter == 0

    @property
    def polish_from(self) -> int:
        """First step run in fp32 when polishing."""
        return self.burn_in + self.thin - self.polish

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Which steps are jittered and which end in a draw."""
        return Schedule(self.burn_in, self.n_draws, self.thin, self.settle, self.jitter, self.noise)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for records beside the draws."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trace"}
        if self.trace is not None:
            values["trace"] = {"chains": list(self.trace.chains), "steps": list(self.trace.steps)}
        return values


def merge_options(explicit: Mapping[str, Any], recommended: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a request: the recommended ones of a checkpoint, over which every explicit one wins."""
    options = {name: recommended[name] for name in RECOMMENDABLE if name in recommended}
    options.update(explicit)
    return options


INTERPRETED = GpuFacts(has_tma=False, graph_block=64, n_sm=2)
"""What kernels take Triton's interpreter for: a small H200 without its copy engine."""


@dataclass(frozen=True)
class DeviceFacts:
    """What a plan needs to know of a device; made by `kaleido_fast.system.devices`, or by hand in tests.

    Args:
        kind: "cpu" or "cuda".
        name: as the driver or the system calls it.
        memory: bytes free for the run.
        has_triton, has_numba: whether these libraries are installed.
        numba_problem: why numba cannot be used although it is; empty if it can, as far as is known.
        has_bf16: whether a CPU multiplies bf16 (AVX512-BF16).
        gpu: what the kernels need to know of it; of a CPU, of what Triton's interpreter stands for.
        tuned: tiles measured best on this GPU (`kaleido_kernels.tiles.read_tuned`).
        interpreter: whether Triton's interpreter was asked for (TRITON_INTERPRET=1), so that kernels run on a CPU.
    """

    kind: str
    name: str = ""
    memory: int = 2**34
    has_triton: bool = False
    has_numba: bool = False
    numba_problem: str = ""
    has_bf16: bool = False
    gpu: GpuFacts = INTERPRETED
    tuned: dict[str, Any] = field(default_factory=dict)
    interpreter: bool = False


H200 = DeviceFacts("cuda", "an H200", memory=140 * 2**30, has_triton=True, gpu=GpuFacts())
"""The GPU that the kernels were designed for, to show a plan where there is none."""


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


def tile_rows(width: int, kind: str) -> int:
    """Rows of one tile of the reference engine, a power of two.

    On a CPU the activations of a tile stay in the second-level cache (1 MiB of ``width`` fp32 values); a GPU wants
    enough rows to fill it. Fixed by the network's shape alone, so that a chain's bits depend on nothing else.
    """
    if kind == "cuda":
        return 16_384
    rows = 2**20 // (4 * width)
    return max(64, min(4096, 2 ** int(math.log2(max(rows, 1)))))


def module_tile(n_chains: int, dim: int, kind: str) -> int:
    """Rows that a module which is no plain MLP gets at once, where nobody says.

    A part of what is asked for, not of how it is run: libraries round differently for another number of rows. One
    chain is run alone, few together, and from seven times `full_module_tile` on there are always that many. Between,
    the sizes are those with three leading bits (1 .. 8, 10, 12, 14, 16, 20, ...), so that most runs agree and at most
    a fourth of the rows is idle.
    """
    full = full_module_tile(dim, kind)
    rows = -(-n_chains // -(-n_chains // full))
    unit = 2 ** max(0, (rows - 1).bit_length() - 3)
    return min(full, -(-rows // unit) * unit)


def full_module_tile(dim: int, kind: str) -> int:
    """Rows of the largest tiles of a general module, a power of two.

    Its hidden sizes are not known. Measured on a CPU, per row: a convolutional autoencoder of 784 values 120 us in
    tiles of 128 or 256, and 200 in tiles of 1024; residual layers of 256 and a transformer of 64 values as much in
    tiles of 256 as of 512, and twice that in tiles of 4096. A GPU wants more.
    """
    most, values = (16_384, 2**22) if kind == "cuda" else (512, 2**18)
    return max(16, min(most, 2 ** int(math.log2(max(values // dim, 1)))))


def streamed_block(rows: int, values: int) -> int:
    """Chains of a block of a stored run, whole tiles of ``rows``; ``values`` are those of the draws of one chain."""
    return rows * max(1, min(2**15, STREAMED_VALUES // values) // rows)


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
        while block > rows and fixed + _block_bytes(request, dim, block) > facts.memory:
            block = rows * max(1, block // rows // 2)
    need = fixed + _block_bytes(request, dim, block)
    _check_memory(need, request, dim, item, facts)
    return SamplePlan(engine, reason, rows, block, kept, need - kept, kernel)


def _scratch_bytes(choice: Choice, spec: ModelSpec, precision: str, facts: DeviceFacts) -> int:
    """Bytes that a kernel needs besides weights and states."""
    if isinstance(choice.tile, GraphTile):
        return graph_bytes(spec, precision, choice.tile)
    if isinstance(choice.tile, WideTile):
        return facts.gpu.n_sm * scratch_bytes(spec, choice.tile, usual_precision(precision))
    return 0


def _block_bytes(request: SampleRequest, dim: int, block: int) -> int:
    """Bytes of the states and figures of the chains at work, estimated."""
    item = 8 if request.precision == "fp64" else 4
    at_work = min(block, request.n_chains)
    states = 5 if request.freezes else 3  # before, after, between; saved, and being gathered, where chains are frozen
    orbits = 0
    if request.freezes and request.max_period > 1:  # searched for their period in parts of about 64 MiB, held twice
        orbits = 2 * item * min(2**24, at_work * (request.max_period + 1) * dim)
    return at_work * (states * dim * item + 64) + orbits


def _check_memory(need: int, request: SampleRequest, dim: int, item: int, facts: DeviceFacts) -> None:
    if need <= facts.memory:
        return
    per_chain = request.n_draws * dim * item + 13
    fits = max(0, int(facts.memory * 0.9)) // per_chain
    raise InputError(
        f"{request.n_chains:,} chains x {request.n_draws:,} draws x {dim:,} values need {_gib(need)}, "
        f"{_gib(facts.memory)} are free: pass at most about {fits:,} chains at a time "
        "(first_chain continues), or fewer draws"
    )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB"


def _check_count(name: str, value: object, least: int, most: int) -> None:
    whole_number(name, value, least, most)


def _check_name(kind: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise unknown_name(kind, value, known)


def _check_scale(name: str, value: object, *, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{name} is {value!r}: it must be a finite number")
    if value < 0 or (positive and value == 0):
        raise InputError(f"{name} is {value!r}: it must be {'above 0' if positive else '0 or more'}")


def _check_trace(trace: Trace, request: SampleRequest) -> None:
    if not trace.chains or not trace.steps:
        raise InputError("trace without chains or steps: name at least one of each")
    first, last = request.first_chain, request.first_chain + request.n_chains - 1
    for chain in trace.chains:
        _check_count("trace chain", chain, first, last)
    for step in trace.steps:
        _check_count("trace step", step, 0, request.schedule.n_steps)
