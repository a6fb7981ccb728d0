"""What the kernels must compute, in plain torch, and how the tests run them: interpreted, emulated, or on a GPU.

Requests and outputs of the tests lie in main memory; `Kernel.run` and its like take them to `DEVICE` and back.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_states_close as assert_close
from torch import Tensor

from kaleido_fast.noise import flow_noise, jitter_noise, start_noise
from kaleido_kernels.launch import LaunchRequest, Outputs, allocate_outputs
from kaleido_kernels.schedule import Checks, Schedule
from kaleido_kernels.shapes import NetShape
from kaleido_kernels.tile import Tile

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
# Compiled, hidden activations of 16-bit modes use approximate instructions.
COMPILED = DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "0"
FP32 = ("fp32", 3e-6, 1e-5)
TRIPLES = [FP32, ("tf32", 2e-3, 0.0), ("fp16", 4e-3 if COMPILED else 2e-3, 0.0)]
OPERANDS = {"fp32": None, "tf32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
"""To what `sample` rounds operands in each precision."""

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


def kept_share(schedule: Schedule, step: int) -> float:
    """u_{t+1} / u_t of a flow, written out; 0 of a kaleidoscope, whose steps are all whole."""
    last, t = schedule.thin - 1, step % schedule.thin
    if not schedule.restarts or t == last:
        return 0.0
    before, after = (((last - i) * schedule.jitter + i * schedule.noise_to) / last for i in (t, t + 1))
    return after / before


def sample(layers: Layers, shape: NetShape, request: LaunchRequest, operand: torch.dtype | None = None) -> Answer:
    """The launch, step by step."""
    schedule, dim = request.schedule, shape.dim
    rows = request.first_chain + torch.arange(request.n_chains)
    chains = rows if request.chain_ids is None else request.chain_ids

    def fresh(step: int) -> Tensor:
        return flow_noise(request.seed, chains, dim, step, schedule.jitter, shape.low, shape.high)

    x = request.start
    if x is None and schedule.restarts:
        x = fresh(0)
    elif x is None:
        x = start_noise(request.seed, chains, dim, request.init, shape.low, shape.high)
    draws = torch.full((request.n_chains, schedule.n_draws, dim), float("nan"))
    residual = torch.zeros(request.n_chains)
    for step in range(request.first_step, request.first_step + request.n_run):
        if schedule.restarts and step > 0 and step % schedule.thin == 0:
            x = fresh(step)
        elif not schedule.restarts and is_jittered(schedule, step):
            noise = jitter_noise(request.seed, chains, dim, step, schedule.noise, shape.low, shape.high)
            x = (x + schedule.jitter * noise).clamp(shape.low, shape.high)
        y = apply_network(x, layers, shape, operand)
        residual = (y - x).abs().amax(dim=1)
        x = x + (1 - kept_share(schedule, step)) * (y - x) if kept_share(schedule, step) else y
        if schedule.noise == "upstream" and schedule.jitter > 0:
            noise = jitter_noise(request.seed, chains, dim, step + 1, "upstream", shape.low, shape.high)
            x = (y + schedule.jitter * noise).clamp(shape.low, shape.high)
        for draw in range(schedule.n_draws):
            if step + 1 == schedule.burn_in + (draw + 1) * schedule.thin:
                draws[:, draw] = x
    return Answer(draws, x, residual)


def assert_agree(got: Outputs, want: Answer, atol: float, rtol: float, what: str) -> None:
    """Draws, final states and residuals agree; a residual is a difference of two states."""
    assert got.draws is not None
    assert_close(got.draws, want.draws, atol, rtol, f"{what} draws")
    assert_close(got.final, want.final, atol, rtol, f"{what} final")
    assert_close(got.residual, want.residual, 2 * atol, rtol, f"{what} residual")


def on_device(request: LaunchRequest, device: torch.device = DEVICE) -> LaunchRequest:
    """The request with its tensors on a device."""
    moved: dict[str, Any] = {
        name: value.to(device) for name in ("start", "chain_ids") if (value := getattr(request, name)) is not None
    }
    if request.checks is not None:
        assert request.checks.saved is not None
        passed, saved = request.checks.checks_passed.to(device), request.checks.saved.to(device)
        moved["checks"] = replace(request.checks, checks_passed=passed, saved=saved)
    return replace(request, **moved)


def moved_outputs(outputs: Outputs, device: torch.device | str) -> Outputs:
    """Outputs on a device."""
    return Outputs(*(None if tensor is None else tensor.to(device) for tensor in filled(outputs)))  # type: ignore[arg-type]


def filled(outputs: Outputs) -> tuple[Tensor | None, ...]:
    """All tensors of outputs."""
    return outputs.final, outputs.residual, outputs.draws, outputs.calm, outputs.halt


def empty_outputs(request: LaunchRequest, shape: NetShape, *, keep_draws: bool = True) -> Outputs:
    """Outputs on `DEVICE` full of NaN, or of -77 where they are counts: a value that is not written shows."""
    outputs = allocate_outputs(request, shape, DEVICE, keep_draws)
    for tensor in filled(outputs):
        if tensor is not None:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -77)
    return outputs


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


Run = Callable[[Layers, NetShape, LaunchRequest], Outputs]
"""A launch of some kernel on random weights, into new outputs in main memory."""


def halting_request(shape: NetShape) -> LaunchRequest:
    """21 chains over 14 steps in the middle of a run; a value of one of them is NaN."""
    start = torch.rand(21, shape.dim, generator=torch.Generator().manual_seed(1)) * 2 - 1
    start[2, shape.dim - 1] = float("nan")
    return LaunchRequest(21, Schedule(burn_in=39, thin=3), start=start, first_step=3, run_steps=14)


def single_steps(run: Run, layers: Layers, shape: NetShape, request: LaunchRequest) -> dict[int, Outputs]:
    """What launches of one step each make, by the number of steps done."""
    made: dict[int, Outputs] = {}
    state = request.start
    for step in range(request.first_step, request.first_step + request.n_run):
        made[step + 1] = run(layers, shape, replace(request, first_step=step, run_steps=1, start=state))
        state = made[step + 1].final
    return made


def checks_that_halt(steps: dict[int, Outputs], every: int, patience: int) -> Checks:
    """Some chains come to rest before the end, others are found back, some do neither."""
    checked = [step for step in steps if step % every == 0]
    residual = steps[checked[-patience]].residual
    saved = torch.full_like(steps[checked[0]].final, float("inf"))
    for row, check in ((1, 0), (5, 1), (8, 0)):
        saved[row] = steps[checked[check]].final[row]
    calm = (torch.arange(len(residual)) % 2).to(torch.int32)
    return Checks(float(residual.nanquantile(0.5)), patience, every, calm, saved)


def halted_by_hand(steps: dict[int, Outputs], checks: Checks) -> Outputs:
    """The definition of `Checks`, on launches of one step each without any."""
    assert checks.saved is not None
    calm = checks.checks_passed.clone()
    halt = torch.zeros_like(calm)
    final, residual = (torch.full_like(x, float("nan")) for x in (checks.saved, steps[max(steps)].residual))
    for step, one in steps.items():
        live = halt == 0
        final[live], residual[live] = one.final[live], one.residual[live]
        if step % checks.every == 0:
            calm[live] = torch.where(one.residual < checks.tol, calm + 1, 0)[live]
            settled = (calm >= checks.patience) | one.residual.isnan()
            back = (one.final - checks.saved).abs().amax(dim=1) < checks.tol
            halt[live & back] = -step
            halt[live & settled] = step
    return Outputs(final, residual, None, calm, halt)


def assert_halts_as_defined(run: Run, shape: NetShape, every: int, patience: int) -> None:
    """A launch with checks has the bits of the definition."""
    request, layers = halting_request(shape), random_net(shape, gain=1.5)
    steps = single_steps(run, layers, shape, request)
    checks = checks_that_halt(steps, every, patience)
    got, want = run(layers, shape, replace(request, checks=checks)), halted_by_hand(steps, checks)
    assert got.halt is not None and want.halt is not None and got.calm is not None and want.calm is not None
    for reason in (want.halt == 0, want.halt < 0, (want.halt > 0) & ~want.residual.isnan(), want.residual.isnan()):
        assert reason.any(), f"not all ends are among {want.halt.tolist()}"
    assert torch.equal(got.halt, want.halt)
    assert torch.equal(got.calm, want.calm)
    assert_close(got.final, want.final, 0.0, 0.0, "final states")
    assert_close(got.residual, want.residual, 0.0, 0.0, "residuals")


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that the interpreter appends to at every product."""
    from triton.runtime.interpreter import InterpreterBuilder

    products: list[int] = []
    dot = InterpreterBuilder.create_dot

    def counted(self, *operands):
        products.append(1)
        return dot(self, *operands)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    return products


def assert_tiles_are_left_early(run: Run, shape: NetShape, products: list[int]) -> None:
    """Once all its chains have halted a tile takes part in no more products."""
    request = halting_request(shape)
    calm, saved = torch.zeros(21, dtype=torch.int32), torch.full((21, shape.dim), float("inf"))
    counts = []
    for tol in (0.0, 9.0):  # never, and at the first check
        products.clear()
        run(
            random_net(shape),
            shape,
            replace(request, first_step=4, run_steps=12, checks=Checks(tol, 1, 4, calm, saved)),
        )
        counts.append(len(products))
    assert counts[0] == 3 * counts[1], counts


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
        target = (
            empty_outputs(request, shape, keep_draws=keep_draws) if outputs is None else moved_outputs(outputs, DEVICE)
        )
        self.launch(self.pack(layers, shape, precision, DEVICE), on_device(request), tile or self.tile, target)
        return moved_outputs(target, "cpu")

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
        assert_agree(got, want, atol, rtol, f"{shape.widths} {shape.activation} {shape.bound} {precision}")

    def check_split(
        self, shape: NetShape, schedule: Schedule, n_chains: int, cuts: list[int], precision: str = "fp32"
    ) -> None:
        """A run in one launch has the bits of the same run cut into launches at ``cuts``."""
        layers = random_net(shape)
        request = LaunchRequest(n_chains, schedule, seed=5, first_chain=2**33)
        whole = self.run(layers, shape, request, precision)
        parts: Outputs | None = None
        start = None
        for first, last in pairwise([0, *cuts, schedule.n_steps]):
            piece = replace(request, first_step=first, run_steps=last - first, start=start)
            parts = self.run(layers, shape, piece, precision, outputs=parts)
            start = parts.final.clone()
        assert parts is not None and parts.draws is not None and whole.draws is not None
        assert torch.equal(parts.draws, whole.draws), f"draws differ when cut at {cuts}"
        assert torch.equal(parts.final, whole.final), f"final states differ when cut at {cuts}"
        assert torch.equal(parts.residual, whole.residual), f"residuals differ when cut at {cuts}"
