"""What the kernels must compute, in plain torch, and how the tests run them: interpreted, or on a GPU if there is one.

Requests and outputs of the tests lie in main memory; `Kernel.run` and its like take them to `DEVICE` and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kaleido_fast.noise import jitter_noise, start_noise
from kaleido_kernels.launch import LaunchRequest, NetShape, Outputs, Schedule, allocate_outputs
from kaleido_kernels.tiles import Tile

HIDDEN = {
    "relu": lambda x, slope: F.relu(x),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    "gelu": lambda x, slope: F.gelu(x),
    "gelu_tanh": lambda x, slope: F.gelu(x, approximate="tanh"),
    "silu": lambda x, slope: F.silu(x),
    "tanh": lambda x, slope: torch.tanh(x),
}
FINAL = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# (precision, atol, rtol) after a few steps of the networks of `random_net`; 16-bit modes are compared after one step.
# On a GPU hidden activations of 16-bit modes use approximate instructions.
TRIPLES = [("fp32", 3e-6, 1e-5), ("tf32", 2e-3, 0.0), ("fp16", 4e-3 if DEVICE.type == "cuda" else 2e-3, 0.0)]

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


def on_device(request: LaunchRequest, device: torch.device = DEVICE) -> LaunchRequest:
    """The request with its tensors on a device."""
    moved: dict[str, Any] = {
        name: value.to(device) for name in ("start", "chain_ids") if (value := getattr(request, name)) is not None
    }
    return replace(request, **moved)


def moved_outputs(outputs: Outputs, device: torch.device | str) -> Outputs:
    """Outputs on a device."""
    draws = None if outputs.draws is None else outputs.draws.to(device)
    return Outputs(outputs.final.to(device), outputs.residual.to(device), draws)


def empty_outputs(request: LaunchRequest, shape: NetShape, *, keep_draws: bool = True) -> Outputs:
    """Outputs on `DEVICE` full of NaN: a value that is not written shows."""
    outputs = allocate_outputs(request, shape, DEVICE, keep_draws)
    for tensor in (outputs.final, outputs.residual, outputs.draws):
        if tensor is not None:
            tensor.fill_(float("nan"))
    return outputs


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


def use_true_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mend the interpreter for a test: it cuts bf16 instead of rounding, and multiplies bit patterns as integers."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounded_cast(self, source, kind):
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(self, source, kind)
        bits = torch.from_numpy(source.data.copy()).to(torch.bfloat16).view(torch.int16)
        return TensorHandle(bits.numpy().view("uint16"), tl.bfloat16)

    def true_dot(self, a, b, *rest):
        def wide(handle):
            if handle.dtype.scalar != tl.bfloat16:
                return handle
            bits = torch.from_numpy(handle.data.view("int16").copy())
            return TensorHandle(bits.view(torch.bfloat16).to(torch.float32).numpy(), tl.float32)

        return dot(self, wide(a), wide(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded_cast)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", rounded_cast)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", true_dot)


@dataclass(frozen=True)
class Kernel:
    """One of the two kernels with the same calls: its tile, packing and launcher, so that both pass the same tests."""

    tile: Tile
    pack: Callable[..., Any]
    launch: Callable[..., None]

    def run(
        self,
        layers: Layers,
        shape: NetShape,
        request: LaunchRequest,
        precision: str = "fp32",
        *,
        tile: Tile | None = None,
        keep_draws: bool = True,
        outputs: Outputs | None = None,
    ) -> Outputs:
        """A launch into new outputs full of NaN, or into those of an earlier one."""
        filled = (
            empty_outputs(request, shape, keep_draws=keep_draws) if outputs is None else moved_outputs(outputs, DEVICE)
        )
        self.launch(self.pack(layers, shape, precision, DEVICE), on_device(request), tile or self.tile, filled)
        return moved_outputs(filled, "cpu")

    def check(
        self,
        shape: NetShape,
        request: LaunchRequest,
        precision: str = "fp32",
        atol: float = 3e-6,
        rtol: float = 1e-5,
        operand: torch.dtype | None = None,
    ) -> None:
        """The launch agrees with `sample` in draws, final states and residuals."""
        layers = random_net(shape)
        got, want = self.run(layers, shape, request, precision), sample(layers, shape, request, operand)
        assert got.draws is not None
        what = f"{shape.widths} {shape.activation} {shape.bound} {precision}"
        assert_close(got.draws, want.draws, atol, rtol, f"{what} draws")
        assert_close(got.final, want.final, atol, rtol, f"{what} final")
        assert_close(got.residual, want.residual, 2 * atol, rtol, f"{what} residual")

    def check_split(self, shape: NetShape, schedule: Schedule, n_chains: int, cuts: list[int]) -> None:
        """A run in one launch has the bits of the same run cut into launches at ``cuts``."""
        layers = random_net(shape)
        request = LaunchRequest(n_chains, schedule, seed=5, first_chain=2**33)
        whole = self.run(layers, shape, request)
        parts: Outputs | None = None
        start = None
        for first, last in pairwise([0, *cuts, schedule.n_steps]):
            piece = replace(request, first_step=first, run_steps=last - first, start=start)
            parts = self.run(layers, shape, piece, outputs=parts)
            start = parts.final.clone()
        assert parts is not None and parts.draws is not None and whole.draws is not None
        assert torch.equal(parts.draws, whole.draws), f"draws differ when cut at {cuts}"
        assert torch.equal(parts.final, whole.final), f"final states differ when cut at {cuts}"
        assert torch.equal(parts.residual, whole.residual), f"residuals differ when cut at {cuts}"
