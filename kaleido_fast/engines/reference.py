"""The reference engine: the recursion in plain torch. It defines the right answer for every other engine.

`step` and `run` are the whole recursion. What follows holds the weights and cuts the chains into tiles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaleido_fast.engines.base import Advanced, ReportSteps
from kaleido_fast.model import BOUNDS, KaleidoMLP
from kaleido_fast.names import LOW_PRECISIONS
from kaleido_fast.noise import flow_noise, jitter_noise, start_noise
from kaleido_fast.planning.request import SampleRequest
from kaleido_kernels.exact import exact_products
from kaleido_kernels.packing import round_operand

StepMap = Callable[[Tensor], Tensor]
"""The network f: states (n, D) to states (n, D)."""


def step(
    f: StepMap, x: Tensor, chain_ids: Tensor, t: int, request: SampleRequest, data_range: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """One step of the recursion: x <- f(clamp(x + jitter * noise)), and x <- f(x) where step ``t`` has no jitter.

    With "upstream" noise each step is x <- clamp(f(x) + jitter * noise). With the sampler "flow" it is
    x <- f(x) + g_t (x - f(x)), where x is fresh noise at the first step of a draw, and nothing is clamped.

    Args:
        f: the network.
        x: (n, D), states after ``t`` steps.
        chain_ids: (n,) int64; with the seed and the step they select the noise.
        t: steps done before.
        request: seed, noise, jitter and the schedule of steps that have it.
        data_range: (low, high), to which noisy states are clamped.

    Returns:
        The states after ``t + 1`` steps, and what f changed of its input, (n, D) each.
    """
    schedule = request.schedule
    if schedule.is_jittered(t):
        x = add_noise(x, chain_ids, t, request, data_range)
    y = f(x)
    change = y - x
    if schedule.restarts:
        return y - schedule.kept_share(t) * change, change
    if schedule.noise == "upstream" and schedule.jitter > 0:
        y = add_noise(y, chain_ids, t + 1, request, data_range)
    return y, change


def add_noise(x: Tensor, chain_ids: Tensor, t: int, request: SampleRequest, data_range: tuple[float, float]) -> Tensor:
    """Clamp(x + jitter * noise), with the noise that these chains have at step ``t``; of a flow the noise alone."""
    low, high = data_range
    if request.schedule.restarts:
        return flow_noise(request.seed, chain_ids, x.shape[1], t, request.noise_from, low, high).to(x.dtype)
    noise = jitter_noise(request.seed, chain_ids, x.shape[1], t, request.noise, low, high)
    return (x + request.jitter * noise.to(x.dtype)).clamp(low, high)


def first_states(chain_ids: Tensor, dim: int, request: SampleRequest, data_range: tuple[float, float]) -> Tensor:
    """Start noise of the chains, (n, dim) fp32."""
    if request.schedule.restarts:
        return flow_noise(request.seed, chain_ids, dim, 0, request.noise_from, *data_range)
    return start_noise(request.seed, chain_ids, dim, request.init, *data_range)


def run(
    f: StepMap,
    x: Tensor,
    chain_ids: Tensor,
    steps: range,
    request: SampleRequest,
    data_range: tuple[float, float],
    keep: Callable[[int, Tensor], None],
    report: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """These steps of the recursion, from ``x``, the states before them; other arguments are those of `step`.

    Args:
        keep: called with the number of each draw that falls into the range, and its states (n, D).
        report: called after each step.

    Returns:
        The states after the last step, (n, D), and its residual, (n,) fp32.
    """
    schedule = request.schedule
    for t in steps:
        x, change = step(f, x, chain_ids, t, request, data_range)
        draw = schedule.draw_after(t + 1)
        if draw is not None:
            keep(draw, x)
        report()
    return x, residual_of(change)


def residual_of(change: Tensor) -> Tensor:
    """The largest change (n, D) of each chain: (n,) fp32."""
    return change.abs().amax(dim=1).to(torch.float32)


# A BLAS rounds a row's sums differently by its place in the batch unless the widths are whole vectors: measured with 10
# outputs, gone with 16.
_WIDTH_MULTIPLE = 16

# Products of 16 rows and of many have been seen to agree bit for bit, those of 8 not. A test of this costs as much as
# three steps of a whole tile.
_FEWEST_ROWS = 16
_WORTH_STEPS = 8

Layer = tuple[Tensor, Tensor]
"""Weight (out, in) and bias (out,), widths padded by zeros."""


class ReferenceEngine:
    """Plain torch on any device.

    Args:
        model: the network; for any other module see `kaleido_fast.engines.general.ModuleEngine`.
        request: what to compute.
        dim: D.
        data_range: (low, high).
        tile_rows: rows of one tile. A last one may have fewer, where that is seen to change no bit.
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
        self.request, self.dim, self.data_range, self.device = request, dim, data_range, device
        self.tile_rows = tile_rows
        self.dtype = torch.float64 if request.precision == "fp64" else torch.float32
        self.layers = [_packed_layer(layer, request.precision, self.dtype, device) for layer in model.linears]
        self.step_map: StepMap = packed_mlp(model, self.layers, request.precision)
        self._alike: dict[tuple[int, int], bool] = {}

    checked = None  # it comes back at every check

    def with_request(self, request: SampleRequest) -> ReferenceEngine:
        """See `kaleido_fast.engines.base.Engine.with_request`."""
        other = copy.copy(self)
        other.request = request
        return other

    def advance(
        self,
        chain_ids: Tensor,
        state: Tensor | None,
        first_step: int,
        last_step: int,
        draws: Tensor | None,
        report: ReportSteps,
    ) -> Advanced:
        """See `kaleido_fast.engines.base.Engine.advance`."""
        n = len(chain_ids)
        final = torch.empty(n, self.dim, dtype=self.dtype, device=self.device)
        residual = torch.empty(n, dtype=torch.float32, device=self.device)
        with torch.inference_mode(), exact_products(self.device):
            for start in range(0, n, self.tile_rows):
                rows = slice(start, min(start + self.tile_rows, n))
                tile_state = None if state is None else state[rows]
                tile_draws = None if draws is None else draws[rows]
                tile = self._advance_tile(chain_ids[rows], tile_state, first_step, last_step, tile_draws, report)
                final[rows], residual[rows] = tile.state, tile.residual
        return Advanced(final, residual)

    def _advance_tile(
        self,
        chain_ids: Tensor,
        state: Tensor | None,
        first_step: int,
        last_step: int,
        draws: Tensor | None,
        report: ReportSteps,
    ) -> Advanced:
        n = len(chain_ids)
        idle = self._rows_for(n) - n
        chain_ids = F.pad(chain_ids, (0, idle))

        def keep(draw: int, states: Tensor) -> None:
            if draws is not None:
                draws[:, draw] = states[:n]

        x, residual = run(
            self.step_map,
            self.start(chain_ids) if state is None else F.pad(state.to(self.dtype), (0, 0, 0, idle)),
            chain_ids,
            range(first_step, last_step),
            self.request,
            self.data_range,
            keep,
            partial(report, n),
        )
        return Advanced(x[:n], residual[:n])

    def _rows_for(self, n: int) -> int:
        """Rows of a tile of ``n`` chains: so few that their products are seen to have the bits of whole tiles'."""
        rows = max(_FEWEST_ROWS, 2 ** (n - 1).bit_length())
        if 2 * rows > self.tile_rows or self.request.schedule.n_steps < _WORTH_STEPS:
            return self.tile_rows
        key = (rows, torch.get_num_threads())
        if key not in self._alike:
            maps: list[tuple[StepMap, int]] = [
                (partial(F.linear, weight=w, bias=b), w.shape[1]) for w, b in self.layers
            ]
            maps.append((self.step_map, self.dim))
            self._alike[key] = all(self._are_alike(map_, width, rows) for map_, width in maps)
        return rows if self._alike[key] else self.tile_rows

    def _are_alike(self, map_: StepMap, width: int, rows: int) -> bool:
        """Whether the first and the last ``rows`` of a whole tile of this width get the same bits by themselves.

        The order of a library's sums does not depend on the numbers: random ones show it.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (self.tile_rows, width)
        x = torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
        whole = map_(x)
        ends = ((x[:rows], whole[:rows]), (x[-rows:], whole[-rows:]))
        return all(torch.equal(map_(part.clone()), values) for part, values in ends)

    def start(self, chain_ids: Tensor) -> Tensor:
        """Start noise of the chains, (n, D)."""
        return first_states(chain_ids, self.dim, self.request, self.data_range).to(self.dtype)


def _rounded(x: Tensor, precision: str) -> Tensor:
    """An operand of a product, as the kernels round it; fp32 and fp64 are not rounded."""
    return round_operand(x, precision) if precision in LOW_PRECISIONS else x


def packed_mlp(model: KaleidoMLP, layers: Sequence[Layer], precision: str) -> StepMap:
    """One step of a `KaleidoMLP`; 16-bit modes round the operands and sum in fp32.

    Args:
        model: the network.
        layers: its packed layers.
        precision: of the products.
    """
    dim, bound = model.spec.dim, BOUNDS[model.spec.bound]

    def step(x: Tensor) -> Tensor:
        h = F.pad(x, (0, layers[0][0].shape[1] - dim))
        for i, (weight, bias) in enumerate(layers):
            h = F.linear(_rounded(h, precision), weight, bias)
            if i < len(layers) - 1:
                h = model.activate(h)
        return bound(h[:, :dim])

    return step


def _packed_layer(layer: nn.Linear, precision: str, dtype: torch.dtype, device: torch.device) -> Layer:
    n_out, n_in = layer.weight.shape
    weight = torch.zeros(_padded(n_out), _padded(n_in), dtype=dtype, device=device)
    weight[:n_out, :n_in] = _rounded(layer.weight.detach().to(device, dtype), precision)
    bias = torch.zeros(_padded(n_out), dtype=dtype, device=device)
    if layer.bias is not None:
        bias[:n_out] = layer.bias.detach().to(device, dtype)
    return weight, bias


def _padded(width: int) -> int:
    return -(-width // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
