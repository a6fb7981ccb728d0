"""What a launch must compute, in plain torch with fp64 sums: what the emulator's command compares with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kaleido_kernels.activations import torch_function
from kaleido_kernels.packing import Layers, round_operand
from kaleido_kernels.shapes import NetShape

BOUND = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}


def random_layers(shape: NetShape, seed: int = 0) -> list[tuple[Tensor, Tensor | None]]:
    """Weights that keep activations near 1 through all layers: variance 2 / inputs (He et al. 2015), small biases."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[tuple[Tensor, Tensor | None]] = []
    for n_in, n_out, has_bias in zip(shape.widths[:-1], shape.widths[1:], shape.bias, strict=True):
        weight = torch.randn(n_out, n_in, generator=generator) * math.sqrt(2 / n_in)
        layers.append((weight, 0.1 * torch.randn(n_out, generator=generator) if has_bias else None))
    return layers


def run_reference(layers: Layers, shape: NetShape, form: str, start: Tensor, n_steps: int) -> tuple[Tensor, Tensor]:
    """States after ``n_steps`` steps without jitter, and the last step's residuals.

    Args:
        layers, shape: the network.
        form: device precision, whose operands are rounded; "fp16x3" and "ieee" compute in fp32.
        start: (n, D) fp32.
        n_steps: at least 1.

    Returns:
        (n, D) fp32 and (n,) fp32.
    """
    state, before = start, start
    for _ in range(n_steps):
        state, before = apply_network(layers, shape, form, state), state
    return state, (state - before).abs().amax(dim=1)


def apply_network(layers: Layers, shape: NetShape, form: str, x: Tensor) -> Tensor:
    """bound(MLP(x)) of (n, D) fp32; operands of products are rounded, sums are exact."""

    def cut(value: Tensor) -> Tensor:
        value = value.to(torch.float32)
        return (value if form in ("fp16x3", "ieee") else round_operand(value, form)).to(torch.float64)

    h = x.to(torch.float64)
    for index, (weight, bias) in enumerate(layers):
        h = cut(h) @ cut(weight).t()
        h = h if bias is None else h + bias.to(torch.float64)
        if index < shape.n_layers - 1:
            leaky = shape.activation == "leaky_relu"
            h = F.leaky_relu(h, shape.negative_slope) if leaky else torch_function(shape.activation)(h)
    return BOUND[shape.bound](h).to(torch.float32)
