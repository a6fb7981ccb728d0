"""What the kernels must compute, in plain torch, and how the tests run them under Triton's interpreter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kaleido_fast.noise import jitter_noise, start_noise
from kaleido_kernels.launch import LaunchRequest, NetShape, Schedule

HIDDEN = {
    "relu": lambda x, slope: F.relu(x),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    "gelu": lambda x, slope: F.gelu(x),
    "gelu_tanh": lambda x, slope: F.gelu(x, approximate="tanh"),
    "silu": lambda x, slope: F.silu(x),
    "tanh": lambda x, slope: torch.tanh(x),
}
FINAL = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}
# (precision, atol, rtol) after a few steps of the networks of `random_net`; 16-bit modes are compared after one step.
TRIPLES = [("fp32", 3e-6, 1e-5), ("tf32", 2e-3, 0.0), ("fp16", 2e-3, 0.0)]

Layers = list[tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Answer:
    """draws (n, n_draws, D), final (n, D), residual (n,), all fp32."""

    draws: Tensor
    final: Tensor
    residual: Tensor


def random_net(shape: NetShape, seed: int = 0, gain: float = 1.3) -> Layers:
    """Weights that keep a chain moving for some steps: normal with standard deviation gain * sqrt(2 / fan in) / 1.4."""
    generator = torch.Generator().manual_seed(seed)
    layers: Layers = []
    for index, (n_in, n_out) in enumerate(zip(shape.widths[:-1], shape.widths[1:], strict=True)):
        weight = torch.randn(n_out, n_in, generator=generator) * gain / math.sqrt(n_in)
        bias = 0.3 * torch.randn(n_out, generator=generator) if shape.bias[index] else None
        layers.append((weight, bias))
    return layers


def apply_network(x: Tensor, layers: Layers, shape: NetShape, operand: torch.dtype | None) -> Tensor:
    """bound(MLP(x)) in fp64; ``operand`` rounds what is multiplied, as the 16-bit modes do (sums stay exact)."""

    def cut(value: Tensor) -> Tensor:
        return value if operand is None else value.to(torch.float32).to(operand).to(torch.float64)

    h = x.to(torch.float64)
    for index, (weight, bias) in enumerate(layers):
        h = cut(h) @ cut(weight.to(torch.float64)).t()
        h = h if bias is None else h + bias.to(torch.float64)
        if index < shape.n_layers - 1:
            h = HIDDEN[shape.activation](h, shape.negative_slope)
    return FINAL[shape.bound](h).to(torch.float32)


def is_jittered(schedule: Schedule, step: int) -> bool:
    """The contract's rule, written out: not step 0, not the last ``settle`` steps before a draw."""
    ends = [schedule.burn_in + (draw + 1) * schedule.thin for draw in range(schedule.n_draws)]
    end = next(end for end in ends if step < end)
    return schedule.jitter > 0 and schedule.noise != "upstream" and 0 < step < end - schedule.settle


def sample(layers: Layers, shape: NetShape, request: LaunchRequest, operand: torch.dtype | None = None) -> Answer:
    """The launch, step by step."""
    schedule, dim = request.schedule, shape.dim
    chains = request.chain_ids
    if chains is None:
        chains = request.first_chain + torch.arange(request.n_chains)
    x = request.start
    if x is None:
        x = start_noise(request.seed, chains, dim, request.init, shape.low, shape.high)
    draws = torch.full((request.n_chains, schedule.n_draws, dim), float("nan"))
    residual = torch.zeros(request.n_chains)
    for step in range(request.first_step, request.first_step + request.n_run):
        if is_jittered(schedule, step):
            noise = jitter_noise(request.seed, chains, dim, step, schedule.noise, shape.low, shape.high)
            x = (x + schedule.jitter * noise).clamp(shape.low, shape.high)
        y = apply_network(x, layers, shape, operand)
        residual = (y - x).abs().amax(dim=1)
        x = y
        if schedule.noise == "upstream" and schedule.jitter > 0:
            noise = jitter_noise(request.seed, chains, dim, step + 1, "upstream", shape.low, shape.high)
            x = (y + schedule.jitter * noise).clamp(shape.low, shape.high)
        for draw in range(schedule.n_draws):
            if step + 1 == schedule.burn_in + (draw + 1) * schedule.thin:
                draws[:, draw] = x
    return Answer(draws, x, residual)


def assert_close(got: Tensor, want: Tensor, atol: float, rtol: float, what: str) -> None:
    """NaN where NaN is wanted and within the tolerance elsewhere; the message shows the worst element and its place."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    if got.numel() == 0:
        return
    strange = torch.isnan(got) != torch.isnan(want)
    assert not strange.any(), f"{what}: NaN differs at {strange.nonzero()[0].tolist()}"
    error = torch.nan_to_num((got - want).abs() - rtol * torch.nan_to_num(want).abs(), nan=0.0)
    worst = int(error.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape)]
    value = float(error.flatten()[worst])
    assert value <= atol, (
        f"{what}: error {value:.3g} > {atol:.3g} at {place}: {got.flatten()[worst]} vs {want.flatten()[worst]}"
    )
