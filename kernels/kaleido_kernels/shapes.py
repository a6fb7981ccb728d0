"""The shape of a network as the kernels see it. Plain Python: no torch, no Triton."""

from __future__ import annotations

import math
from dataclasses import dataclass

ACTIVATIONS = ("relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh")
BOUNDS = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0)}
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")


@dataclass(frozen=True)
class NetShape:
    """An MLP from R^D to R^D: linear layers with ``activation`` between them and ``bound`` after the last.

    Args:
        widths: (D, H1, ..., D): one more than there are layers.
        activation: one of `ACTIVATIONS`.
        bound: one of `BOUNDS`.
        bias: for each layer whether it has a bias; empty for all of them.
        negative_slope: of leaky_relu.
        low, high: range of the data: of the start noise, and what jittered inputs are clamped to.

    Raises:
        ValueError: a width below 1, first and last width that differ, an unknown name, a range outside the bound's.
    """

    widths: tuple[int, ...]
    activation: str = "relu"
    bound: str = "tanh"
    bias: tuple[bool, ...] = ()
    negative_slope: float = 0.01
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or min(self.widths) < 1 or self.widths[0] != self.widths[-1]:
            raise ValueError(
                f"widths are {self.widths}: give (D, hidden..., D), each at least 1, the first equal to the last"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}: the kernels know {', '.join(ACTIVATIONS)}")
        if self.bound not in BOUNDS:
            raise ValueError(f"bound is {self.bound!r}: the kernels know {', '.join(BOUNDS)}")
        if not self.bias:
            object.__setattr__(self, "bias", (True,) * self.n_layers)
        if len(self.bias) != self.n_layers:
            raise ValueError(f"bias has {len(self.bias)} flags for {self.n_layers} layers: give one a layer, or none")
        least, most = BOUNDS[self.bound]
        if not (math.isfinite(self.low) and math.isfinite(self.high) and least <= self.low < self.high <= most):
            raise ValueError(
                f"data range ({self.low}, {self.high}): {self.bound} needs low < high within {least:g} .. {most:g}"
            )

    @property
    def dim(self) -> int:
        """Values per chain, D."""
        return self.widths[0]

    @property
    def n_layers(self) -> int:
        """Number of linear layers."""
        return len(self.widths) - 1

    @property
    def hidden(self) -> int:
        """The widest hidden layer; 0 if there is none."""
        return max(self.widths[1:-1], default=0)

    @property
    def flops_per_step(self) -> int:
        """Floating-point operations of one step of one chain: two per weight."""
        return 2 * sum(a * b for a, b in zip(self.widths[:-1], self.widths[1:], strict=True))


def next_power_of_two(value: int, least: int = 16) -> int:
    """Smallest power of two that is at least ``value`` and ``least`` (16: the least side of a product)."""
    return max(least, 1 << (value - 1).bit_length())
