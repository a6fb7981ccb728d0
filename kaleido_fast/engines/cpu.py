"""The CPU engine: tiles of chains that stay in cache through all layers and many steps, in loops compiled by numba."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kaleido_fast.engines.base import Advanced, ReportSteps
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP, ModelSpec
from kaleido_fast.planning.cpu_tiles import steps_per_call, tile_chains, unit_chains
from kaleido_fast.planning.plan import NOT_COMPILED
from kaleido_fast.planning.request import SampleRequest

if TYPE_CHECKING:
    from kaleido_fast.engines import cpu_kernels

MASK32 = 0xFFFFFFFF


class CpuEngine:
    """Loops on all cores that ``torch.get_num_threads()`` allows; needs numba.

    Args:
        model: the network; its weights are copied into the order in which the loops read them.
        request: what to compute, in fp32, or in bf16 where the processor multiplies it (AVX512-BF16).

    Raises:
        InputError: another precision, or numba compiles nothing in this process (NUMBA_DISABLE_JIT).
    """

    def __init__(self, model: KaleidoMLP, request: SampleRequest) -> None:
        # numba takes half a second to import: only a program that samples pays for it.
        from kaleido_fast.engines import cpu_kernels

        self.kernels = cpu_kernels
        if not cpu_kernels.IS_COMPILED:
            raise InputError(f"engine 'cpu' cannot run: {NOT_COMPILED}")
        if request.precision not in ("fp32", "bf16") or (request.precision == "bf16" and not cpu_kernels.HAS_BF16):
            raise InputError(
                f"engine 'cpu' has no {request.precision} on this processor: use precision='fp32' or engine='reference'"
            )
        self.request, self.spec = request, model.spec
        self.layers = pack_layers(model, request.precision, cpu_kernels)
        self.steps = _steps(request, cpu_kernels)
        # Compiles, or loads, the loops: setting up, not sampling.
        self.start(torch.zeros(1, dtype=torch.int64, device="cpu"))

    checked = None  # it comes back at every check

    def with_request(self, request: SampleRequest) -> CpuEngine:
        """See `kaleido_fast.engines.base.Engine.with_request`."""
        other = copy.copy(self)
        other.request, other.steps = request, _steps(request, self.kernels)
        return other

    def start(self, chain_ids: Tensor) -> Tensor:
        """Start noise of the chains, (n, D)."""
        return self.advance(chain_ids, None, 0, 0, None, lambda _: None).state

    def advance(
        self,
        chain_ids: Tensor,
        state: Tensor | None,
        first_step: int,
        last_step: int,
        draws: Tensor | None,
        report: ReportSteps,
    ) -> Advanced:
        """See `kaleido_fast.engines.base.Engine.advance`; ``report`` is called from the calling thread only."""
        n, dim = len(chain_ids), self.spec.dim
        final = np.empty((n, dim), np.float32) if state is None else _copied(state, (n, dim))
        residual = np.zeros(n, np.float32)
        kept, target = _draw_buffer(draws, self.request.n_draws, dim)
        run = _Run(
            self, chain_ids.cpu().contiguous().numpy(), state is None, first_step, last_step, target, final, residual
        )
        run.go(report)
        if draws is not None and kept is not None and kept is not draws:
            draws.copy_(kept)
        return Advanced(torch.from_numpy(final), torch.from_numpy(residual))


class _Run:
    """One call of `CpuEngine.advance`: units of chains that threads take one after the other."""

    def __init__(
        self,
        engine: CpuEngine,
        chain_ids: np.ndarray,
        from_start: bool,
        first_step: int,
        last_step: int,
        draws: np.ndarray,
        final: np.ndarray,
        residual: np.ndarray,
    ) -> None:
        spec, kernels = engine.spec, engine.kernels
        self.engine, self.chain_ids, self.draws, self.final, self.residual = engine, chain_ids, draws, final, residual
        self.first_step, self.last_step = first_step, last_step
        self.start = _start_kind(engine.request, kernels) if from_start else kernels.NONE
        threads = max(1, torch.get_num_threads())
        self.tile = tile_chains(spec.widths, kernels.LANES, len(chain_ids), threads)
        self.n_threads = min(threads, -(-len(chain_ids) // self.tile))
        self.step_flops = spec.flops_per_step
        self.flops = self.step_flops * max(1, last_step - first_step)
        self.taken = 0
        self.taking = threading.Lock()
        self.done: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.stopped = False

    def go(self, report: ReportSteps) -> None:
        """Run all units; the calling thread works too, and alone reports."""
        if self.n_threads == 1:
            for chain_steps in self._work():
                report(chain_steps)
            return
        with ThreadPoolExecutor(self.n_threads - 1, thread_name_prefix="kaleido") as pool:
            others = [pool.submit(self._work_quietly) for _ in range(self.n_threads - 1)]
            try:
                for chain_steps in self._work():
                    report(chain_steps)
                    self._report_others(report)
                for other in others:
                    other.result()
            finally:
                self.stopped = True
        self._report_others(report)

    def _report_others(self, report: ReportSteps) -> None:
        while not self.done.empty():
            report(self.done.get())

    def _work_quietly(self) -> None:
        for chain_steps in self._work():
            self.done.put(chain_steps)

    def _work(self) -> Iterator[int]:
        """Take units until there are none; yields the chain-steps of every call."""
        tile = make_tile(self.engine.spec, self.tile, self.engine.request.precision, self.engine.kernels)
        while not self.stopped:
            rows = self._take()
            if rows is None:
                return
            yield from self._run_unit(rows, tile)

    def _take(self) -> slice | None:
        """The next unit; None when all are taken."""
        with self.taking:
            left = len(self.chain_ids) - self.taken
            if not left:
                return None
            first = self.taken
            self.taken += min(left, unit_chains(left, self.tile, self.n_threads, self.flops))
            return slice(first, self.taken)

    def _run_unit(self, rows: slice, tile: cpu_kernels.Tile) -> Iterator[int]:
        draws = self.draws[rows] if len(self.draws) else self.draws
        final, start, step = self.final[rows], self.start, self.first_step
        call_steps = steps_per_call(self.step_flops, len(final))
        while not self.stopped:
            last = min(step + call_steps, self.last_step)
            self.engine.kernels.advance_rows(
                self.engine.layers,
                self.engine.steps,
                tile,
                self.chain_ids[rows],
                final,
                start,
                step,
                last,
                draws,
                final,
                self.residual[rows],
            )
            yield (last - step) * len(final)
            if last >= self.last_step:
                return
            start, step = self.engine.kernels.NONE, last


def pack_layers(model: KaleidoMLP, precision: str, kernels: Any) -> cpu_kernels.Layers:
    """Copy the weights into blocks of outputs, [input][output] each; block sizes of a layer differ by one at most."""
    pack = _bf16_pairs if precision == "bf16" else _fp32
    weights: list[Tensor] = []
    biases: list[np.ndarray] = []
    table, first_weight, first_bias = [], 0, 0
    for layer in model.linears:
        n_out, n_in = layer.weight.shape
        n_blocks = -(-n_out // kernels.MAX_OUTPUTS)
        table.append((n_in, n_out, n_blocks, first_weight, first_bias))
        weight = pack(layer.weight)
        weights.append(torch.cat([block.T.reshape(-1) for block in torch.tensor_split(weight, n_blocks)]))
        first_weight, first_bias = first_weight + weight.numel(), first_bias + n_out
        biases.append(np.zeros(n_out, np.float32) if layer.bias is None else _fp32(layer.bias).numpy())
    spec = model.spec
    return kernels.Layers(
        weights=torch.cat(weights).numpy(),
        biases=np.concatenate(biases),
        table=np.array(table, np.int64),
        activation=getattr(kernels, spec.activation.upper()),
        slope=np.float32(spec.negative_slope),
        bound=getattr(kernels, spec.bound.upper()),
        low=np.float32(spec.low),
        high=np.float32(spec.high),
        mid=np.float32((spec.low + spec.high) / 2),
        half=np.float32((spec.high - spec.low) / 2),
        span=np.float32(spec.high - spec.low),
    )


def _fp32(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float32)


def _bf16_pairs(weight: Tensor) -> Tensor:
    """(n_out, n_in) -> (n_out, ceil(n_in / 2)) int32, the even input in the low half."""
    rounded = weight.detach().to("cpu", torch.bfloat16)
    if rounded.shape[1] % 2:
        rounded = F.pad(rounded, (0, 1))
    bits = rounded.view(torch.int16).to(torch.int32)
    return (bits[:, ::2] & 0xFFFF) | (bits[:, 1::2] << 16)


def make_tile(spec: ModelSpec, chains: int, precision: str, kernels: Any) -> cpu_kernels.Tile:
    """One thread's buffers for tiles of ``chains`` chains."""
    state, widest, lanes = chains * spec.dim, chains * max(spec.widths), kernels.LANES
    pairs = chains * ((max(spec.widths) + 1) // 2) if precision == "bf16" else 0
    return kernels.Tile(
        chain_ids=np.zeros(chains, np.int64),
        state=_aligned(state),
        moved=_aligned(state),
        hidden=_aligned(widest),
        other=_aligned(widest),
        pairs=_aligned(pairs).view(np.int32),
        words=np.zeros(4 * lanes, np.uint32),
        noise=_aligned(4 * lanes),
        residual=_aligned(chains),
    )


def _steps(request: SampleRequest, kernels: Any) -> cpu_kernels.Steps:
    schedule = request.schedule
    return kernels.Steps(
        burn_in=schedule.burn_in,
        n_draws=schedule.n_draws,
        thin=schedule.thin,
        settle=schedule.settle,
        noise=getattr(kernels, schedule.jitter_kind.upper()),
        jitter=np.float32(schedule.jitter),
        key_low=request.seed & MASK32,
        key_high=request.seed >> 32,
        kept=np.array(schedule.kept_shares, np.float32),
    )


def _start_kind(request: SampleRequest, kernels: Any) -> int:
    """The code of the noise that chains start from."""
    if request.schedule.restarts:
        return int(kernels.RESTART)
    return int(kernels.START_UNIFORM if request.init == "uniform" else kernels.START_NORMAL)


def _aligned(count: int) -> np.ndarray:
    """fp32 zeros on a cache line's boundary: a vector never lies across two lines."""
    raw = np.zeros(4 * count + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + 4 * count].view(np.float32)


def _copied(state: Tensor, shape: tuple[int, int]) -> np.ndarray:
    values = np.empty(shape, np.float32)
    values[:] = state.detach().cpu().numpy()
    return values


def _draw_buffer(draws: Tensor | None, n_draws: int, dim: int) -> tuple[Tensor | None, np.ndarray]:
    """(tensor that takes the draws, the same memory as an array): ``draws`` itself where the loops can write to it."""
    if draws is None:
        return None, np.empty((0, n_draws, dim), np.float32)
    fits = draws.dtype == torch.float32 and draws.is_contiguous() and draws.device.type == "cpu"
    kept = draws if fits else draws.to("cpu", torch.float32).contiguous()
    return kept, kept.detach().numpy()
