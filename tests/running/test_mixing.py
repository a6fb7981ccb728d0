"""R-hat and effective sample sizes: equal to ArviZ's, and true to what is known of chains."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_fast.running import mixing
from kaleido_fast.running.mixing import ess_bulk, ess_tail, measure_mixing, split_r_hat

OURS = (split_r_hat, ess_bulk, ess_tail)
TEN_CHAINS = np.sin(np.arange(300.0) ** 2).reshape(10, 30) + np.repeat(np.cos(np.arange(10.0))[:, None], 30, axis=1) / 3
ONE_SLOW = np.cumsum(np.sin(np.arange(200.0) ** 2).reshape(4, 50), axis=1)


def autoregression(rho: float, n_chains: int, n_draws: int, seed: int = 0) -> np.ndarray:
    """Chains (n_chains, n_draws) of x <- rho x + sqrt(1 - rho^2) noise, begun in their stationary law."""
    noise = np.random.default_rng(seed).normal(size=(n_chains, n_draws))
    states = [noise[:, 0]]
    for step in range(1, n_draws):
        states.append(rho * states[-1] + math.sqrt(1 - rho**2) * noise[:, step])
    return np.stack(states, axis=1)


@settings(max_examples=100)
@given(
    n_chains=st.integers(2, 20),
    n_draws=st.integers(4, 70),
    rho=st.sampled_from([-0.9, -0.4, 0.0, 0.5, 0.9, 0.99]),
    form=st.sampled_from(["plain", "rounded", "apart", "heavy tails", "wide and narrow"]),
    seed=st.integers(0, 2**32),
)
def test_our_figures_are_those_of_arviz(n_chains, n_draws, rho, form, seed):
    pytest.importorskip("arviz_stats")
    draws = autoregression(rho, n_chains, n_draws, seed)
    if form == "rounded":
        draws = np.round(2 * draws)
    elif form == "apart":
        draws += np.random.default_rng(seed).normal(size=(n_chains, 1))
    elif form == "heavy tails":
        draws = np.sign(draws) * np.exp(draws**2)
    elif form == "wide and narrow":
        draws[::2] *= 5
    theirs, source = mixing._measures()
    assert source.startswith("arviz-stats ")
    with np.errstate(all="ignore"):
        for measure, reference in zip(OURS, theirs, strict=True):
            got, want = measure(draws), reference(draws)
            if want < 1e6 or got < 1e6:  # else of chains that stand still: their variance is rounding
                np.testing.assert_allclose(got, want, rtol=1e-10, err_msg=f"{measure.__name__} of {form}")


@pytest.mark.parametrize(
    ("draws", "want"),
    [
        (TEN_CHAINS, (1.1074161776910603, 69.66882805830356, 64.516040769543)),
        (ONE_SLOW, (1.851635112099115, 6.442137959249952, 18.3739090491502)),
    ],
    ids=["ten chains", "slow"],
)
def test_figures_that_arviz_has_found(draws, want):
    """By arviz-stats 0.8.0, for where it is not installed."""
    np.testing.assert_allclose([measure(draws) for measure in OURS], want, rtol=1e-9)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.6, -0.4])
def test_effective_draws_of_an_autoregression_are_those_of_theory(rho):
    """(1 - rho) / (1 + rho) of all, which numbers of chains and draws approach."""
    draws = autoregression(rho, 40, 500)
    assert ess_bulk(draws) / draws.size == pytest.approx((1 - rho) / (1 + rho), rel=0.1)
    assert split_r_hat(draws) == pytest.approx(1, abs=0.01)


def test_r_hat_does_not_depend_on_units_and_the_bulk_on_no_rising_scale():
    draws = autoregression(0.7, 7, 41)
    assert split_r_hat(-3 * draws + 11) == pytest.approx(split_r_hat(draws), rel=1e-12)
    assert ess_bulk(np.exp(draws)) == pytest.approx(ess_bulk(draws), rel=1e-12)


def test_r_hat_tells_chains_apart_by_place_by_width_and_by_time():
    draws = autoregression(0.0, 8, 200)
    side = np.where(np.arange(8) < 4, -1.0, 1.0)[:, None]
    assert split_r_hat(draws) < 1.02
    assert split_r_hat(draws + side) > 1.3, "different places"
    assert split_r_hat(draws * np.exp(side)) > 1.1, "one place, different widths: seen by folded values alone"
    assert split_r_hat(draws + np.linspace(-1.5, 1.5, 200)) > 1.2, "all drift together: seen by the halves"


# Of draws (n_chains, n_draws, D).


def independent(n_chains: int, n_draws: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((n_chains, n_draws, dim), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def alone(monkeypatch):
    """As if ArviZ were not installed."""
    monkeypatch.setattr(mixing, "_measures", lambda: (OURS, "kaleido-fast"))


def test_independent_draws_mix_and_copies_do_not(alone):
    good = measure_mixing(independent(64, 32, 5))
    assert good.mixes and good.r_hat < 1.03 and 0.8 < good.ess_share < 1.5, good
    assert (good.n_chains, good.n_draws, good.n_values, good.source) == (64, 32, 6, "kaleido-fast")
    copies = independent(64, 1, 5).expand(64, 32, 5)
    stuck = measure_mixing(copies)
    assert stuck.r_hat == math.inf and not stuck.mixes
    assert stuck.ess_bulk < 100, "about one a chain"
    near = measure_mixing(copies + 0.05 * independent(64, 32, 5, seed=1))
    assert near.r_hat > 5 and near.ess_bulk < 100 and not near.mixes


def test_one_value_that_is_stuck_is_found_among_many(alone):
    draws = 0.3 * independent(64, 20, 100)
    draws[:, :, 71] = independent(64, 1, 1)[:, :, 0]
    assert measure_mixing(draws).r_hat == math.inf


def test_only_the_first_chains_count_and_those_with_nan_do_not(alone):
    draws = independent(200, 12, 3)
    want = measure_mixing(draws)
    draws[64:] = 7.0
    assert measure_mixing(draws) == want
    draws[5, 3, 1], draws[9, 0, 0] = math.nan, math.inf
    assert measure_mixing(draws).n_chains == 62
    assert measure_mixing(draws) == measure_mixing(draws[[c for c in range(64) if c not in (5, 9)]])
    assert measure_mixing(draws * math.nan) is None
    long = measure_mixing(torch.randn(6, 9000, 1))
    assert (long.n_chains, long.n_draws) == (4, 8192)


def test_what_too_few_draws_cannot_tell_is_not_told(alone):
    assert measure_mixing(independent(64, 3, 2)) is None
    few = measure_mixing(independent(64, 1, 2).expand(64, 9, 2))
    assert few.r_hat == math.inf and few.ess_bulk is None and few.ess_tail is None and few.ess_share is None
    assert not few.mixes
    assert measure_mixing(torch.full((64, 20, 3), 0.25)) is None, "all the same"
    one = measure_mixing(independent(1, 40, 2))
    assert one.r_hat is None and one.ess_bulk > 10


def test_a_value_that_moves_in_the_middle_alone_hides_no_other(alone):
    draws = torch.zeros(4, 5, 2)
    draws[:, 2, 0] = torch.arange(4.0)
    assert measure_mixing(draws[:, :, :1]).r_hat is None
    draws[:, :, 1] = torch.arange(4.0)[:, None]
    assert measure_mixing(draws).r_hat == math.inf


def test_figures_are_valid_json(alone):
    facts = measure_mixing(independent(8, 1, 2).expand(8, 12, 2)).to_dict()
    assert json.loads(json.dumps(facts, allow_nan=False))["r_hat"] is None


def test_arviz_is_used_where_it_is_installed():
    pytest.importorskip("arviz_stats")
    draws = independent(64, 32, 5)
    found = measure_mixing(draws)
    assert found.source.startswith("arviz-stats ")
    values = draws.double().numpy()
    assert found.ess_bulk <= min(ess_bulk(values[:, :, j]) for j in range(5)) * (1 + 1e-9)
    assert found.r_hat >= max(split_r_hat(values[:, :, j]) for j in range(5)) * (1 - 1e-9)
