"""When what happens: which steps get noise, how far they go, which end in a draw, after which chains are looked at."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kaleido_kernels.shapes import MAX_FLOW_STEPS, MAX_STEPS, NOISES, RESTART

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Steps of a run: ``n_steps = burn_in + n_draws * thin``; draw i is the state after ``draw_end(i)`` steps.

    Args:
        burn_in: steps before the draws, at least 0.
        n_draws: draws per chain, at least 1.
        thin: steps per draw, at least 1.
        settle: steps without jitter before each draw.
        jitter: scale of the noise in units of half the data range; 0 is off.
        noise: "normal", "uniform" (on the input, then clamped) or "upstream" (the published formula, on the output);
            "restart" is that of a flow, see `Schedule.flow`.
        noise_to: share of noise at the last step of a flow, above 0 and below ``jitter``; 0 elsewhere.

    Raises:
        ValueError: a value outside of this, or more than `MAX_STEPS` steps.
    """

    burn_in: int = 0
    n_draws: int = 1
    thin: int = 1
    settle: int = 2
    jitter: float = 0.0
    noise: str = "normal"
    noise_to: float = 0.0

    @classmethod
    def flow(cls, n_draws: int, steps: int, noise_from: float, noise_to: float) -> Schedule:
        """Steps by parts, ``x <- f(x) + g_t (x - f(x))``: the Euler form of a rectified flow (Liu et al. 2022).

        A draw takes ``steps`` steps from a start of its own: the middle of the data range and ``noise_from`` times
        normal noise in units of half the range, not clamped. `kept_shares` are the g_t.

        In the other fields' terms ``thin`` is ``steps``, and all but the first step of a draw are "settled": the noise
        of scale ``jitter`` comes at the first one, and takes the place of the state.

        Args:
            n_draws: draws per chain, at least 1.
            steps: steps per draw, 1 to `MAX_FLOW_STEPS`.
            noise_from: share of noise at the first step of a draw, above 0 and at most 1.
            noise_to: share of noise at the last step, above 0 and below ``noise_from``.

        Raises:
            ValueError: a value outside of this.
        """
        if not 1 <= steps <= MAX_FLOW_STEPS:
            raise ValueError(f"steps is {steps}: it must lie in 1 .. {MAX_FLOW_STEPS:,}")
        if not 0 < noise_from <= 1:
            raise ValueError(f"noise_from is {noise_from}: it must lie above 0 and at most at 1")
        if not 0 < noise_to < noise_from:
            raise ValueError(f"noise_to is {noise_to}: it must lie above 0 and below noise_from, {noise_from}")
        return cls(0, n_draws, steps, max(0, steps - 1), noise_from, RESTART, noise_to)

    def __post_init__(self) -> None:
        for name, least in (("burn_in", 0), ("n_draws", 1), ("thin", 1), ("settle", 0)):
            if not least <= getattr(self, name) <= MAX_STEPS:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie in {least} .. {MAX_STEPS:,}")
        if self.noise not in (*NOISES, RESTART):
            raise ValueError(f"noise is {self.noise!r}: choose one of {', '.join(NOISES)}")
        if not (math.isfinite(self.jitter) and self.jitter >= 0):
            raise ValueError(f"jitter is {self.jitter}: it must be finite and at least 0")
        if self.n_steps > MAX_STEPS:
            sum_of = "n_draws * steps" if self.restarts else "burn_in + n_draws * thin"
            raise ValueError(f"{sum_of} is {self.n_steps:,} steps: at most {MAX_STEPS:,}")

    @property
    def restarts(self) -> bool:
        """Whether it is a flow, whose draws start anew from noise."""
        return self.noise == RESTART

    @functools.cached_property
    def kept_shares(self) -> tuple[float, ...]:
        """g_t of each step of a draw, (thin,): the share of the way to f(x) that a step leaves; () where it goes all.

        ``g_t = u_{t+1} / u_t``: u, the share of noise, falls linearly from ``jitter`` to ``noise_to`` over the steps,
        and is 0 after the last, which is whole (``h_t = 1 - g_t`` of a rectified flow with a network that tells x).
        """
        if not self.restarts:
            return ()
        last = max(1, self.thin - 1)
        shares = [self.jitter + (self.noise_to - self.jitter) * t / last for t in range(self.thin)]
        return (*(after / before for before, after in itertools.pairwise(shares)), 0.0)

    def kept_share(self, step: int) -> float:
        """g_t of a step of the run."""
        return self.kept_shares[step % self.thin] if self.restarts else 0.0

    @property
    def n_steps(self) -> int:
        """Total number of steps."""
        return self.burn_in + self.n_draws * self.thin

    def draw_end(self, draw: int) -> int:
        """Number of steps after which the state is draw ``draw``."""
        return self.burn_in + (draw + 1) * self.thin

    def draw_at(self, step: int) -> int:
        """The draw that ``step`` works towards."""
        return max(0, (step - self.burn_in) // self.thin)

    def draw_after(self, steps_done: int) -> int | None:
        """The draw that is complete after exactly ``steps_done`` steps, if one is."""
        index, rest = divmod(steps_done - self.burn_in, self.thin)
        return index - 1 if rest == 0 and 1 <= index <= self.n_draws else None

    def draws_done(self, steps_done: int) -> int:
        """Number of draws complete after ``steps_done`` steps."""
        return min(self.n_draws, max(0, (steps_done - self.burn_in) // self.thin))

    def next_draw_end(self, steps_done: int) -> int:
        """Number of steps after which the next draw is complete; the end of the run if there is none."""
        return self.draw_end(min(self.draws_done(steps_done), self.n_draws - 1))

    @property
    def jitter_kind(self) -> str:
        """The kernels' variant: "none" when the jitter is off, else ``noise``."""
        return self.noise if self.jitter > 0 else "none"

    def is_jittered(self, step: int) -> bool:
        """Whether the input of ``step`` gets noise: all but step 0 and the last ``settle`` steps before each draw.

        With "upstream" noise no input does, each output does; of a flow the first step of each draw but the run's first
        one does, whose noise is the start noise.
        """
        if self.jitter == 0 or self.noise == "upstream" or step == 0:
            return False
        return step < self.draw_end(self.draw_at(step)) - self.settle

    @property
    def n_jittered(self) -> int:
        """Number of steps whose input gets noise."""
        if self.jitter == 0 or self.noise == "upstream":
            return 0
        first = max(0, self.burn_in + self.thin - 1 - self.settle)  # step 0 takes the start noise as it is
        return first + (self.n_draws - 1) * max(0, self.thin - self.settle)

    def jittered_steps(self, draw: int) -> int:
        """Steps with noise after the draw before ``draw``, or after the start, and up to ``draw``."""
        first = 0 if draw == 0 else self.draw_end(draw - 1)
        if self.jitter == 0:
            return 0
        if self.noise == "upstream":
            return self.draw_end(draw) - first
        return max(0, self.draw_end(draw) - self.settle - max(1, first))


@dataclass(frozen=True)
class Checks:
    """What chains are looked at for after steps that are multiples of ``every``, the schedule's last step excepted.

    A chain halts, and keeps its state, at the first check at which its residual has been below ``tol`` at ``patience``
    checks in a row, or is NaN, or at which no value is ``tol`` or more away from the chain's saved state.

    Args:
        tol: bound on a residual, and on the distance to a saved state, in data units, at least 0.
        patience: checks in a row with a residual below ``tol`` after which a chain is at rest, at least 1.
        every: steps between checks, at least 1.
        checks_passed: (n_chains,) int32, checks in a row passed before.
        saved: (n_chains, D) fp32 states that chains may come back to, infinite where that is not asked; None asks it
            of none.

    Raises:
        ValueError: a value outside of this.
    """

    tol: float
    patience: int
    every: int
    checks_passed: Tensor
    saved: Tensor | None

    def __post_init__(self) -> None:
        if not self.tol >= 0:
            raise ValueError(f"tol is {self.tol}: it must be at least 0")
        for name in ("patience", "every"):
            if not 1 <= getattr(self, name) <= MAX_STEPS:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie in 1 .. {MAX_STEPS:,}")
