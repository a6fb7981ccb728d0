"""Whether states are the reference's but for rounding: every chain, every dim and every value is held to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kaleido_fast.errors import InputError

# fp64 and fp32 round sums only: one limit for every value, in data units, at any depth.
LARGEST = {"fp64": 1e-9, "fp32": 2e-4}

# With operands of 11 or 8 bits two right results differ by more the deeper the network: the order of sums decides
# roundings, one rounding decides others, and after some layers they are independent, so that their errors add up as
# squares. Hence errors are counted in UNIT x sqrt(layers x steps) of the states' root mean square. In this unit
# rounding alone, modelled in torch, gave at most (six reference networks with random weights and the bundled digits,
# one and three steps, fp16 and bf16, up to 100,000 chains; worst chain: of 64 dims or more):
#
#                                                    all states   worst dim   worst chain   worst value
#   kernels: sums in another order, or truncated        0.6           1.0          1.4           5.2
#   peers that also round what leaves a layer           0.7           1.0          1.8           5.6
#   ... and products before the bias is added           0.9           1.3          2.6          11.8
#   ... and each of four partial sums of a product      1.1           1.8          3.4          12.8
#
# The root mean square error of N values may reach MEAN + OUTLIER / sqrt(N), that of all states WHOLE in place of MEAN:
# 1.75 for all states, 2.5 for a dim of many chains, 4.0 for a chain of 64 dims, 14.5 for a single value (0.026 for fp16
# on mnist after three steps). A trained network may hold a chain on the border of two basins, which no fixed number
# bounds: peers in bf16 had one of 100,000 chains of points1d wrong by 0.4. Such a peer is refused, and the chain named.
UNIT = {"tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8}
WHOLE, MEAN, OUTLIER = 1.75, 2.5, 12.0


@dataclass(frozen=True)
class Average:
    """The root mean square error of ``values`` states (``what``), in data units."""

    what: str
    values: int
    error: float


@dataclass(frozen=True)
class Deviation:
    """How far states are from the reference's.

    Args:
        step: number of steps.
        chain, dim: place of the largest error.
        error: the largest, in data units.
        scale: root mean square of the reference's states, in data units.
        averages: of all states, of the worst chain, of the worst dim.
    """

    step: int
    chain: int
    dim: int
    error: float
    scale: float
    averages: tuple[Average, ...]

    @property
    def relative(self) -> float:
        """Norm of all errors over the norm of the reference's states."""
        return self.averages[0].error / self.scale if self.scale else self.averages[0].error

    def record(self) -> dict[str, Any]:
        """Plain values: the largest error and its place, and the relative norm."""
        place = {"step": self.step, "chain": self.chain, "dim": self.dim}
        return {"error": self.error, "error_at": place, "relative_error": self.relative}

    def __str__(self) -> str:
        return f"{self.error:.3g} after step {self.step} (chain {self.chain}, dim {self.dim})"


class WrongStatesError(InputError):
    """States differ from the reference's by more than rounding does.

    Args:
        deviation: by how much, and where.
        allowed: what was exceeded, in a few words.
    """

    def __init__(self, deviation: Deviation, allowed: str) -> None:
        super().__init__(f"differs from the reference by {deviation}; {allowed}")
        self.deviation = deviation


def measure_deviation(got: Tensor, want: Tensor, step: int) -> Deviation:
    """How far states ``got`` after ``step`` steps are from the reference's, ``want``; both (n, D).

    Raises:
        InputError: their shapes differ.
    """
    if got.shape != want.shape:
        raise InputError(f"states after step {step} have shape {tuple(got.shape)}, not {tuple(want.shape)}")
    kind = torch.promote_types(want.dtype, torch.float32)
    error = (got.to(want.device, kind) - want.to(kind)).abs_()
    worst = int(error.nan_to_num(torch.inf).argmax())
    chain, dim = divmod(worst, want.shape[1])
    norm = torch.linalg.vector_norm
    chains, dims = norm(error, dim=1), norm(error, dim=0)
    wrong_chain, wrong_dim = (int(norms.nan_to_num(torch.inf).argmax()) for norms in (chains, dims))
    averages = (
        Average("all states", error.numel(), float(norm(chains)) / math.sqrt(error.numel())),
        Average(f"chain {wrong_chain}", len(dims), float(chains[wrong_chain]) / math.sqrt(len(dims))),
        Average(f"dim {wrong_dim}", len(chains), float(dims[wrong_dim]) / math.sqrt(len(chains))),
    )
    # rows first: one fp32 sum over a hundred million values would lose digits
    scale = float(norm(norm(want.to(kind), dim=1))) / math.sqrt(want.numel())
    return Deviation(step, chain, dim, float(error.flatten()[worst]), scale, averages)


def refuse_wrong(deviation: Deviation, precision: str, n_layers: int) -> None:
    """Refuse states that rounding alone does not explain.

    Args:
        deviation: what was measured.
        precision: of the operands of products.
        n_layers: linear layers of the network.

    Raises:
        WrongStatesError: says the largest error, its place, and what was exceeded.
    """
    if precision in LARGEST:
        if not deviation.error <= LARGEST[precision]:  # also when it is NaN
            raise WrongStatesError(deviation, f"{precision} allows {LARGEST[precision]:g}")
        return
    unit = UNIT[precision] * math.sqrt(n_layers * deviation.step) * deviation.scale
    whole, *parts = deviation.averages
    held = [(part, MEAN) for part in (Average("a single value", 1, deviation.error), *parts)]
    for average, mean in [*held, (whole, WHOLE)]:
        limit = unit * (mean + OUTLIER / math.sqrt(average.values))
        if not average.error <= limit:
            what = "" if average.values == 1 else f"{average.what} by {average.error:.3g} in the root mean square; "
            depth = f"{n_layers * deviation.step} layers in {precision}"
            raise WrongStatesError(deviation, f"{what}{depth} allow {limit:.3g}")
