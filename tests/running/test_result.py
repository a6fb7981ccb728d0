"""What a run says at its end: outcomes of chains, and figures of their steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from known_maps import contracting, lingering

from kaleido_fast import Outcome, fast_sample
from kaleido_fast.running import result as result_module


@pytest.mark.parametrize("retire", [False, True])
def test_a_chain_that_comes_to_rest_at_the_last_step_is_a_fixed_point_of_period_one(retire):
    """Between checks nothing is frozen, and still the last residual says that the chain has arrived."""
    result = fast_sample(lingering(), n_chains=200, burn_in=49, check_every=100, retire_cycles=retire)
    rests = result.residual < 1e-4
    assert 20 < rests.sum() < 180
    assert torch.equal(result.outcome == Outcome.FIXED_POINT, rests)
    assert torch.equal(result.period == 1, rests)
    assert set(result.steps.tolist()) == {50}


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


@pytest.mark.parametrize("options", [{"tol": None}, {"jitter": 0.3}, {"n_draws": 3, "thin": 2, "tol": None}], ids=str)
def test_steps_that_are_known_are_not_read(options, monkeypatch):
    """Without frozen chains every chain has run every step: on a GPU reading them would sort, and wait."""
    read: list[torch.Tensor] = []
    quantiles = result_module.quantiles
    monkeypatch.setattr(result_module, "quantiles", lambda values: read.append(values) or quantiles(values))
    result = fast_sample(contracting(), n_chains=50, burn_in=7, **options)
    assert result.stats.steps_quantiles == quantiles(result.steps.float())
    assert len(read) == 1, "the residuals alone"


def test_a_jittered_run_has_no_histogram_of_steps():
    assert fast_sample(contracting(), n_chains=5, jitter=0.3).stats.steps_histogram == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_enough(dtype, bad):
    for at in range(9):
        final = torch.linspace(-3, 3, 36, dtype=dtype).reshape(4, 9)
        final[2, at] = bad
        still = torch.zeros(4)
        outcome, period = result_module.find_outcomes(final, still, torch.ones(4, dtype=torch.int32), 1e-4)
        want = [Outcome.FIXED_POINT, Outcome.FIXED_POINT, Outcome.NON_FINITE, Outcome.FIXED_POINT]
        assert outcome.tolist() == want
        assert period.tolist() == [1, 1, 0, 1]
    largest = torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype)
    outcome, _ = result_module.find_outcomes(-largest, torch.ones(2), torch.zeros(2, dtype=torch.int32), None)
    assert outcome.tolist() == [Outcome.MOVING] * 2
