"""Is a trained network a kaleidoscope? How it acts at and near its training examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from kaleido_fast.model import KaleidoMLP

EXACT_DIM = 128  # up to here the whole Jacobian and its eigenvalues cost milliseconds
RADIUS_EXAMPLES = 24
STABLE_EXAMPLES = 256
CHECKED_EXAMPLES = 1 << 14
STABLE_STEPS = 300
STABLE_MSE = 0.02  # in squared units of half the data range, as measured on [-1, 1]
STABLE_RESIDUAL = 1e-4  # half the data range
NUDGE = 1e-3  # half the data range: a plain loss of 0 makes examples exact fixed points, where a chain rests although
# they repel (points1d: a spectral radius of 3.5)
POWER_STEPS = 60
POWER_STARTS = 4
UNSTABLE_SHARE = 0.5


@dataclass(frozen=True)
class Diagnostics:
    """How a network acts at training examples.

    Args:
        spectral_radius_median, spectral_radius_max: largest absolute eigenvalue of the Jacobian, over the
            ``n_radius`` examples looked at. Below 1 the network contracts there in the long run: an example that is
            (nearly) a fixed point can attract chains; above 1 it repels them.
        stable_share: share of ``n_stable`` examples x that are stable attractors: after 300 steps from beside x
            (`nudged`) the state is within a mean squared difference of 0.02 of x and moves by less than 1e-4 (units
            of half the data range).
        max_error: largest absolute difference between an example and its reconstruction, in data units.
    """

    spectral_radius_median: float
    spectral_radius_max: float
    stable_share: float
    max_error: float
    n_radius: int
    n_stable: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a model card."""
        return asdict(self)

    def problem(self, jitter: float = 0.0) -> str | None:
        """One line on what is wrong and what helps; None when most examples are stable.

        Args:
            jitter: what the recommended sampling settings use; 0 for none.
        """
        if self.spectral_radius_median < 1 and self.stable_share >= UNSTABLE_SHARE:
            return None
        advice = (
            f"sample with jitter, as the recommended settings do ({jitter:g})"
            if jitter > 0
            else "sample with jitter near the training noise, or train with more noise, more steps or fewer examples"
        )
        return (
            f"only {self.stable_share:.0%} of the training examples are stable fixed points (median spectral radius "
            f"{self.spectral_radius_median:.2f}; below 1 attracts): without jitter most chains end elsewhere; {advice}"
        )


def diagnose(model: KaleidoMLP, data: Tensor) -> Diagnostics:
    """Measure a model at training examples (n, D); of many, evenly spaced ones are looked at."""
    radii = spectral_radii(model, evenly(data, RADIUS_EXAMPLES))
    watched = evenly(data, STABLE_EXAMPLES)
    with torch.no_grad():
        max_error = float((model(data[:CHECKED_EXAMPLES]) - data[:CHECKED_EXAMPLES]).abs().max())
    return Diagnostics(
        spectral_radius_median=float(radii.median()),
        spectral_radius_max=float(radii.max()),
        stable_share=float(stable_examples(model, watched).double().mean()),
        max_error=max_error,
        n_radius=len(radii),
        n_stable=len(watched),
    )


def evenly(data: Tensor, n: int) -> Tensor:
    """``n`` rows spread evenly over ``data``, or all of them."""
    if len(data) <= n:
        return data
    return data[torch.arange(n, device=data.device) * len(data) // n]


def nudged(data: Tensor, low: float, high: float) -> Tensor:
    """Examples (n, D) moved by normal noise of 0.001 half ranges, inside the range: off fixed points that repel."""
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0)).to(data)
    return (data + NUDGE * (high - low) / 2 * noise).clamp(low, high)


def stable_examples(model: KaleidoMLP, data: Tensor) -> Tensor:
    """Which examples (n, D) are stable attractors (see `Diagnostics`): bool (n,)."""
    half = (model.spec.high - model.spec.low) / 2
    with torch.no_grad():
        state = before = nudged(data, model.spec.low, model.spec.high)
        for _ in range(STABLE_STEPS):
            before, state = state, model(state)
    close = ((state - data) / half).square().mean(dim=1) <= STABLE_MSE
    return close & ((state - before).abs().amax(dim=1) < STABLE_RESIDUAL * half)


def spectral_radii(model: Callable[[Tensor], Tensor], data: Tensor) -> Tensor:
    """Spectral radius of the Jacobian at every example (n, D): (n,).

    Exact eigenvalues up to D = 128. Above, `growth_rates`, which needs no D x D matrix.
    """
    if data.shape[1] <= EXACT_DIM:
        jacobians = vmap(jacrev(model))(data).detach()
        return torch.linalg.eigvals(jacobians.double()).abs().amax(dim=1)
    return growth_rates(model, data)


def growth_rates(model: Callable[[Tensor], Tensor], data: Tensor) -> Tensor:
    """Estimate spectral radii (n,) at examples (n, D) by how fast vectors grow under repeated products with J.

    Products are with the transpose, which has the same eigenvalues and needs but one forward pass. J is not symmetric
    and its leading eigenvalues may be a complex pair, under which the length of one vector swings from step to step.
    So the rate is a geometric mean over the last half of `POWER_STEPS` products, and the largest of `POWER_STARTS`
    random starts counts.
    """
    generator = torch.Generator().manual_seed(0)
    points = data.repeat(POWER_STARTS, 1).requires_grad_()
    vectors = torch.randn(points.shape, generator=generator).to(data.device)
    log_growth = torch.zeros(len(points), device=data.device)
    with torch.enable_grad():
        outputs = model(points)
    for step in range(POWER_STEPS):
        (products,) = torch.autograd.grad(outputs, points, vectors, retain_graph=True)
        lengths = products.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        vectors = products / lengths
        if step >= POWER_STEPS // 2:
            log_growth += lengths[:, 0].log()
    rates = (log_growth / (POWER_STEPS - POWER_STEPS // 2)).exp()
    return rates.view(POWER_STARTS, -1).amax(dim=0)
