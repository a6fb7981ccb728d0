"""Freezing, cycles and polishing: which chains leave the working set, when, and with which bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_states_close, random_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kaleido_fast import InputError, KaleidoMLP, ModelSpec, Outcome, fast_sample

ENGINES = ["reference", "cpu"]


def contracting(widths=(5, 16, 5), scale=0.55, seed=3) -> KaleidoMLP:
    return random_mlp(*widths, scale=scale, seed=seed)


def lingering() -> KaleidoMLP:
    """Its chains settle after 20 to 70 steps."""
    return contracting(scale=1.2)


def rotation(period: int, dim: int = 2) -> KaleidoMLP:
    """tanh(gain * R x) with R a turn by 2 pi / period: its attractor is a cycle of that period (2 flips the sign)."""
    angle = 2 * math.pi / period
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    model = KaleidoMLP(ModelSpec((2, 2), bias=(False,)))
    with torch.no_grad():
        model.linears[0].weight.copy_(turn * 2.0)
    return model.eval()


def cycle_map(period: int) -> KaleidoMLP:
    """An MLP that permutes ``period`` attracting points on a line in a cycle: a staircase of steep tanh steps.

    f(x) = tanh(target_0 + sum_i jump_i * step(x - threshold_i)): between thresholds it is flat, so each state lands
    exactly (to rounding) on the next point of the cycle.
    """
    points = torch.linspace(-0.8, 0.8, period, dtype=torch.float64)
    targets = torch.atanh(points.roll(-1))
    thresholds = (points[1:] + points[:-1]) / 2
    steep = 400.0
    model = KaleidoMLP(ModelSpec((1, period - 1, 1), activation="tanh"))
    with torch.no_grad():
        first, last = model.linears
        first.weight.fill_(steep)
        first.bias.copy_(-steep * thresholds)
        jumps = targets.diff()
        last.weight.copy_((jumps / 2)[None])
        last.bias.fill_(float(targets[0] + jumps.sum() / 2))
    return model.eval()


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 60), at=st.integers(0, 200), check_every=st.integers(1, 9), patience=st.integers(1, 3))
def test_freezing_does_not_depend_on_the_batch(engine, n, at, check_every, patience):
    options = {
        "burn_in": 90,
        "n_draws": 3,
        "thin": 5,
        "seed": 4,
        "engine": engine,
        "check_every": check_every,
        "patience": patience,
    }
    many = fast_sample(contracting(), n_chains=300, **options)
    few = fast_sample(contracting(), n_chains=n, first_chain=at, **options)
    rows = slice(at, at + n)
    for name in ("draws", "steps", "residual", "outcome", "period"):
        assert torch.equal(getattr(many, name)[rows], getattr(few, name)), name


def by_hand(model: KaleidoMLP, n: int, n_steps: int, tol: float, every: int, patience: int) -> tuple:
    """Which chains freeze when, written out one chain at a time on the reference's full run."""
    from kaleido_fast.plan import Trace

    steps = tuple(range(n_steps + 1))
    options: dict[str, Any] = {"n_chains": n, "burn_in": n_steps - 1, "tol": None, "engine": "reference"}
    states = fast_sample(model, **options, trace=Trace(tuple(range(n)), steps)).trace
    assert states is not None
    change = (states[:, 1:] - states[:, :-1]).abs().amax(2)
    frozen_at = []
    for row in change:
        calm, at = 0, n_steps
        for step in range(every, n_steps, every):
            calm = calm + 1 if row[step - 1] < tol else 0
            if calm >= patience:
                at = step
                break
        frozen_at.append(at)
    return states, torch.tensor(frozen_at, dtype=torch.int32)


@pytest.mark.parametrize(("every", "patience"), [(1, 1), (1, 3), (4, 1), (5, 2)])
def test_chains_freeze_exactly_when_the_definition_says(every, patience):
    model, n, n_steps = lingering(), 200, 80
    states, frozen_at = by_hand(model, n, n_steps, 1e-4, every, patience)
    options = {"n_chains": n, "burn_in": n_steps - 1, "check_every": every, "patience": patience}
    result = fast_sample(model, **options, engine="reference")
    assert len(frozen_at.unique()) > 4, "the test needs chains that settle at different steps"
    assert torch.equal(result.steps, frozen_at)
    assert torch.equal(result.final, states[torch.arange(n), frozen_at.long()])


def test_every_engine_freezes_the_same_chains():
    """Engines differ by the last bits of a residual: chains within 1 % of tol at a check are left out."""
    model, n, n_steps, tol = lingering(), 500, 80, 1e-4
    states, frozen_at = by_hand(model, n, n_steps, tol, 4, 1)
    change = (states[:, 1:] - states[:, :-1]).abs().amax(2)
    close = ((change[:, 3::4] / tol - 1).abs() < 0.01).any(1)
    assert close.float().mean() < 0.2
    result = fast_sample(model, n_chains=n, burn_in=n_steps - 1, engine="cpu")
    assert torch.equal(result.steps[~close], frozen_at[~close])


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_states_are_near_where_the_chain_would_have_gone(engine):
    """On a map that contracts by rho a step, a residual below tol leaves at most tol * rho / (1 - rho) to go."""
    model, tol = contracting(scale=0.4), 1e-4
    jacobians = torch.func.vmap(torch.func.jacrev(model))(torch.rand(200, 5) * 2 - 1)
    rho = float(torch.linalg.matrix_norm(jacobians, ord=torch.inf).detach().max())
    assert rho < 1
    with_tol = fast_sample(model, n_chains=500, tol=tol, engine=engine)
    without = fast_sample(model, n_chains=500, tol=None, engine=engine)
    assert with_tol.stats.chain_steps < without.stats.chain_steps / 5
    assert with_tol.stats.work_saved > 0.8
    assert_states_close(with_tol.final, without.final, atol=tol * rho / (1 - rho) + 1e-6, what="frozen states")


def test_draws_after_freezing_equal_the_frozen_state():
    result = fast_sample(contracting(), n_chains=50, burn_in=5, n_draws=60, thin=3)
    for row in range(50):
        first = max(0, -(-(int(result.steps[row]) - 5) // 3) - 1)
        late = result.draws[row, first:]
        assert torch.equal(late, late[:1].expand_as(late))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("period", [2, 3, 7])
def test_known_cycles_have_their_exact_period(engine, period):
    result = fast_sample(cycle_map(period), n_chains=200, burn_in=299, engine=engine)
    assert set(result.period.tolist()) == {period}
    assert set(result.outcome.tolist()) == {Outcome.CYCLE}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_map_with_fixed_points_has_only_fixed_points(engine):
    result = fast_sample(rotation(1), n_chains=200, engine=engine)
    assert set(result.outcome.tolist()) == {Outcome.FIXED_POINT}
    assert set(result.period.tolist()) == {1}


@pytest.mark.parametrize("period", [2, 3, 7])
def test_retired_cycles_walk_on_as_the_chain_would_have(period):
    options = {"n_chains": 100, "burn_in": 101, "n_draws": 9, "thin": 5}
    walked = fast_sample(cycle_map(period), retire_cycles=True, **options)
    run = fast_sample(cycle_map(period), retire_cycles=False, **options)
    assert_states_close(walked.draws, run.draws, atol=1e-5, what="draws")
    assert_states_close(walked.residual, run.residual, atol=1e-5, what="residuals")
    assert walked.stats.chain_steps < run.stats.chain_steps / 2
    assert torch.equal(walked.outcome, run.outcome)


def test_periods_beyond_the_limit_are_called_moving():
    result = fast_sample(cycle_map(7), n_chains=20, max_period=5)
    assert set(result.outcome.tolist()) == {Outcome.MOVING}
    assert set(result.period.tolist()) == {0}


def test_nan_leaves_the_working_set_alone():
    class Poison(nn.Module):
        def forward(self, x):
            return torch.where(x[:, :1] > 0.9, torch.nan, 0.5 * x)

    result = fast_sample(Poison(), n_chains=400, dim=3, data_range=(-1.0, 1.0))
    bad = result.outcome == Outcome.NON_FINITE
    assert 0 < bad.sum() < 100
    assert set(result.outcome[~bad].tolist()) == {Outcome.FIXED_POINT}
    assert int(result.steps[bad].max()) <= 4


def test_jittered_runs_never_freeze_and_tol_none_runs_every_step():
    for options in ({"jitter": 0.1}, {"tol": None}):
        result = fast_sample(contracting(), n_chains=20, burn_in=49, **options)
        assert set(result.steps.tolist()) == {50}
        assert result.stats.chain_steps == 1000


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32"])
def test_polished_fixed_points_are_fp32_fixed_points(precision):
    model = contracting((16, 48, 16), scale=0.6)
    options = {"n_chains": 64, "burn_in": 119, "engine": "reference"}
    exact = fast_sample(model, **options)
    raw = fast_sample(model, precision=precision, **options)
    polished = fast_sample(model, precision=precision, polish=60, **options)
    assert (raw.final - exact.final).abs().max() > 1e-4, "the precision makes no difference here"
    assert_states_close(polished.final, exact.final, atol=2e-4, what=precision)
    assert set(polished.outcome.tolist()) == {Outcome.FIXED_POINT}


def test_polish_over_all_steps_is_fp32():
    options = {"n_chains": 30, "burn_in": 9, "engine": "reference"}
    assert torch.equal(
        fast_sample(contracting(), precision="fp16", polish=10, **options).draws,
        fast_sample(contracting(), **options).draws,
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tol": -1.0}, "tol is -1.0"),
        ({"tol": float("nan")}, "tol is nan"),
        ({"tol": 1e-3, "jitter": 0.1}, "a jittered chain never settles"),
        ({"patience": 0}, "patience is 0"),
        ({"check_every": 0}, "check_every is 0"),
        ({"max_period": 0}, "max_period is 0"),
        ({"max_period": 10**6}, "max_period is 1000000"),
        ({"polish": 5}, "polish with precision 'fp32'"),
        ({"polish": 12, "precision": "fp16", "burn_in": 10}, "pass at most that"),
    ],
)
def test_bad_options_are_named(options, text):
    with pytest.raises(InputError, match=text):
        fast_sample(contracting(), n_chains=3, **options)


def test_quantiles_of_steps_are_reported():
    result = fast_sample(contracting(), n_chains=500)
    steps = np.sort(result.steps.numpy())
    assert result.stats.steps_quantiles["50%"] in steps
    assert result.stats.steps_quantiles["100%"] == steps[-1]
    histogram = result.stats.steps_histogram
    settled = steps[np.isin(result.outcome.numpy(), (Outcome.FIXED_POINT, Outcome.CYCLE))]
    assert sum(histogram.values()) == len(settled) > 0
    for bin_, count in histogram.items():
        first, last = map(int, bin_.split("-"))
        assert count == ((settled >= first) & (settled <= last)).sum(), bin_


def test_a_jittered_run_has_no_histogram_of_steps():
    assert fast_sample(contracting(), n_chains=5, jitter=0.3).stats.steps_histogram == {}
