"""The reference engine: the recursion in plain torch. It defines the right answer for every other engine."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaleido_fast.engines.base import Advanced, Report
from kaleido_fast.model import BOUNDS, KaleidoMLP
from kaleido_fast.noise import jitter_noise, start_noise
from kaleido_fast.plan import SampleRequest
from kaleido_kernels.exact import exact_products

# A BLAS rounds a row's sums differently by its place in the batch unless the widths are whole vectors: measured with 10
# outputs, gone with 16.
_WIDTH_MULTIPLE = 16

StepMap = Callable[[Tensor], Tensor]


class ReferenceEngine:
    """Plain torch on any device.

    Args:
        model: the network; for any other module see `kaleido_fast.engines.general.ModuleEngine`.
        request: what to compute.
        dim: D.
        data_range: (low, high).
        tile_rows: rows of one tile.
        device: where to run.
    """

    def __init__(
        self,
        model: KaleidoMLP,
        request: SampleRequest,
        *,
        dim: int,
        data_range: tuple[float, float],
        tile_rows: int,
        device: torch.device,
    ) -> None:
        self.request, self.dim, self.device = request, dim, device
        self.low, self.high = data_range
        self.tile_rows = tile_rows
        self.dtype = torch.float64 if request.precision == "fp64" else torch.float32
        self.step_map: StepMap = packed_mlp(model, request.precision, self.dtype, device)

    checked = None  # it comes back at every check

    def with_request(self, request: SampleRequest) -> ReferenceEngine:
        """See `kaleido_fast.engines.base.Engine.with_request`."""
        other = copy.copy(self)
        other.request = request
        return other

    def advance(
        self,
        chains: Tensor,
        state: Tensor | None,
        first_step: int,
        last_step: int,
        draws: Tensor | None,
        report: Report,
    ) -> Advanced:
        """See `kaleido_fast.engines.base.Engine.advance`."""
        n = len(chains)
        final = torch.empty(n, self.dim, dtype=self.dtype, device=self.device)
        residual = torch.empty(n, dtype=torch.float32, device=self.device)
        with torch.inference_mode(), exact_products(self.device):
            for start in range(0, n, self.tile_rows):
                rows = slice(start, min(start + self.tile_rows, n))
                tile_state = None if state is None else state[rows]
                tile_draws = None if draws is None else draws[rows]
                tile = self._advance_tile(chains[rows], tile_state, first_step, last_step, tile_draws, report)
                final[rows], residual[rows] = tile.state, tile.residual
        return Advanced(final, residual)

    def _advance_tile(
        self,
        chains: Tensor,
        state: Tensor | None,
        first_step: int,
        last_step: int,
        draws: Tensor | None,
        report: Report,
    ) -> Advanced:
        n = len(chains)
        schedule = self.request.schedule
        chains = F.pad(chains, (0, self.tile_rows - n))
        x = self.start(chains) if state is None else F.pad(state.to(self.dtype), (0, 0, 0, self.tile_rows - n))
        for step in range(first_step, last_step):
            x, change = self._step(x, chains, step)
            draw = schedule.draw_after(step + 1)
            if draws is not None and draw is not None:
                draws[:, draw] = x[:n]
            report(n)
        return Advanced(x[:n], residual_of(change[:n]))

    def start(self, chains: Tensor) -> Tensor:
        """Start noise of the chains, (n, D)."""
        request = self.request
        return start_noise(request.seed, chains, self.dim, request.init, self.low, self.high).to(self.dtype)

    def _step(self, x: Tensor, chains: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """x_t -> (x_{t+1}, what the map changed of its input)."""
        schedule = self.request.schedule
        if schedule.is_jittered(step):
            x = self._add_noise(x, chains, step)
        y = self.step_map(x)
        change = y - x
        if schedule.noise == "upstream" and schedule.jitter > 0:
            y = self._add_noise(y, chains, step + 1)
        return y, change

    def _add_noise(self, x: Tensor, chains: Tensor, step: int) -> Tensor:
        request = self.request
        e = jitter_noise(request.seed, chains, self.dim, step, request.noise, self.low, self.high)
        return (x + request.jitter * e.to(self.dtype)).clamp(self.low, self.high)


def residual_of(change: Tensor) -> Tensor:
    """The largest change (n, D) of each chain: (n,) fp32."""
    return change.abs().amax(dim=1).to(torch.float32)


def round_operand(x: Tensor, precision: str) -> Tensor:
    """Round to the operand type of a precision (fp16, bf16, tf32: 10 mantissa bits), kept in fp32."""
    if precision == "fp16":
        return x.to(torch.float16).to(torch.float32)
    if precision == "bf16":
        return x.to(torch.bfloat16).to(torch.float32)
    if precision == "tf32":
        bits = x.view(torch.int32)
        rounded = (bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF
        return torch.where(torch.isfinite(x), rounded.view(torch.float32), x)
    return x


def packed_mlp(model: KaleidoMLP, precision: str, dtype: torch.dtype, device: torch.device) -> StepMap:
    """One step of a `KaleidoMLP`, widths padded by zeros; 16-bit modes round the operands and sum in fp32."""
    layers = [_packed_layer(layer, precision, dtype, device) for layer in model.linears]
    dim, bound = model.spec.dim, BOUNDS[model.spec.bound]

    def step(x: Tensor) -> Tensor:
        h = F.pad(x, (0, layers[0][0].shape[1] - dim))
        for i, (weight, bias) in enumerate(layers):
            h = F.linear(round_operand(h, precision), weight, bias)
            if i < len(layers) - 1:
                h = model.activate(h)
        return bound(h[:, :dim])

    return step


def _packed_layer(layer: nn.Linear, precision: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    n_out, n_in = layer.weight.shape
    weight = torch.zeros(_padded(n_out), _padded(n_in), dtype=dtype, device=device)
    weight[:n_out, :n_in] = round_operand(layer.weight.detach().to(device, dtype), precision)
    bias = torch.zeros(_padded(n_out), dtype=dtype, device=device)
    if layer.bias is not None:
        bias[:n_out] = layer.bias.detach().to(device, dtype)
    return weight, bias


def _padded(width: int) -> int:
    return -(-width // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
