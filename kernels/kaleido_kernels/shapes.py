"""Networks and the closed lists of names: defined here once. Plain Python: no torch, no Triton."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kaleido_kernels import activations

ACTIVATIONS = tuple(activations.ACTIVATIONS)
"""Hidden activations."""
BOUNDS = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0)}
"""Output bounds and the range that each has."""
INITS = ("uniform", "normal")
"""Start noise."""
NOISES = ("normal", "uniform", "upstream")
"""Jitter noise."""
RESTART = "restart"
"""Noise of a flow, in the place of jitter: it takes the place of the state at the first step of each draw."""
KERNELS = ("narrow", "onchip", "stream", "wide", "graph")
"""Ways to run a network on a GPU."""
MAX_STEPS = 2**31 - 1
"""Steps of a run: they are 32-bit, one word of the noise counter."""
MAX_FLOW_STEPS = 2**20
"""Steps of a draw of a flow: each has an entry in a table."""


@dataclass(frozen=True)
class NetShape:
    """An MLP from R^D to R^D: linear layers with ``activation`` between them and ``bound`` after the last.

    Args:
        widths: (D, H1, ..., D): one more than there are layers.
        activation: one of `ACTIVATIONS`.
        bound: one of `BOUNDS`.
        low, high: range of the data: of the start noise, and what jittered inputs are clamped to.
        bias: for each layer whether it has a bias; empty for all of them.
        negative_slope: of leaky_relu.

    Raises:
        ValueError: a width below 1, first and last width that differ, an unknown name, a range outside the bound's.
    """

    widths: tuple[int, ...]
    activation: str = "relu"
    bound: str = "tanh"
    low: float = -1.0
    high: float = 1.0
    bias: tuple[bool, ...] = field(default=(), kw_only=True)
    negative_slope: float = field(default=0.01, kw_only=True)

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
    def n_parameters(self) -> int:
        """Number of weights and biases."""
        pairs = zip(self.widths[:-1], self.widths[1:], self.bias, strict=True)
        return sum(n_in * n_out + n_out * bias for n_in, n_out, bias in pairs)

    @property
    def flops_per_step(self) -> int:
        """Floating-point operations of the matrix products of one step of one chain: 2 x sum(in x out)."""
        return 2 * sum(n_in * n_out for n_in, n_out in zip(self.widths[:-1], self.widths[1:], strict=True))


def next_power_of_two(value: int, least: int = 16) -> int:
    """Smallest power of two that is at least ``value`` and ``least`` (16: the least side of a product)."""
    return max(least, 1 << (value - 1).bit_length())


NETWORKS: dict[str, NetShape] = {
    "points1d": NetShape((1, *[10] * 9, 1)),
    "points2d": NetShape((2, *[50] * 6, 2), bound="sigmoid", low=0.0),
    "digits": NetShape((64, *[256] * 5, 64)),
    "deep128": NetShape((64, *[128] * 9, 64)),
    "mnist": NetShape((784, *[500] * 10, 784)),
    "cifar": NetShape((3072, *[2000] * 10, 3072)),
}
"""The reference networks."""
