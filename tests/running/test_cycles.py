"""Searching for cycles: laws of the plain functions below freezing, and the periods of known maps."""

from __future__ import annotations

from itertools import islice, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from all_engines import ENGINES, few_on_triton, order_products
from conftest import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from known_maps import MIXED_PERIODS, cycle_map, middles, mixed_map, rotation

from kaleido_fast import KaleidoMLP, ModelSpec, Outcome, SampleRequest, fast_sample
from kaleido_fast.engines.base import Halts
from kaleido_fast.engines.reference import ReferenceEngine
from kaleido_fast.running.cycles import are_back, follow, renewals, renewed
from kaleido_fast.running.freezing import Policy, Window
from kaleido_fast.running.phases import Phase

requests = st.builds(
    SampleRequest,
    n_chains=st.just(1),
    burn_in=st.integers(0, 150),
    n_draws=st.integers(1, 5),
    thin=st.integers(1, 9),
    check_every=st.integers(1, 12),
    max_period=st.sampled_from([1, 2, 7, 64]),
)


def windows_of(request: SampleRequest, inside: bool, cut: int = 0) -> tuple[Policy, list[Window]]:
    """Windows of a run by an engine that checks inside, or not, from ``cut`` on polished if that is not 0."""
    engine: Any = SimpleNamespace(checked=len if inside else None)
    n_steps = request.schedule.n_steps
    phases = [Phase(engine, *span) for span in ([(0, cut), (cut, n_steps)] if cut else [(0, n_steps)])]
    policy = Policy.of(request, phases)
    return policy, list(policy.windows(phases))


@settings(max_examples=150, deadline=None)
@given(request=requests, inside=st.booleans(), share=st.floats(0, 1))
def test_windows_cover_the_run_and_end_wherever_the_host_has_to_look(request, inside, share):
    n_steps = request.schedule.n_steps
    cut = int(share * (n_steps - 1))
    policy, windows = windows_of(request, inside, cut)
    ends = [window.last for window in windows]
    assert windows[0].first == 0 and ends[-1] == n_steps
    assert all(a.last == b.first for a, b in pairwise(windows)) and all(w.first < w.last for w in windows)
    due = {request.schedule.draw_end(draw) for draw in range(request.n_draws)}
    due |= {cut} - {0} | set(range(policy.singly_from, n_steps))
    if not inside:
        due |= set(range(request.check_every, n_steps, request.check_every))
    assert due <= set(ends)
    assert [window.last - policy.singly_from for window in windows if window.single_steps] == list(
        range(1, n_steps - policy.singly_from + 1)
    )


@settings(max_examples=150, deadline=None)
@given(request=requests, share=st.floats(0, 1))
def test_earlier_states_are_renewed_at_the_same_steps_by_engines_of_both_kinds(request, share):
    cut = int(share * (request.schedule.n_steps - 1))
    policy, windows = windows_of(request, False, cut)
    renewing = [window.last for window in windows if window.renews]
    assert renewing == [window.last for window in windows_of(request, True, cut)[1] if window.renews]
    if request.max_period == 1:
        assert renewing == []
    elif policy.singly_from < request.schedule.n_steps:
        assert renewing[-1] == policy.singly_from
    assert all(step > policy.freeze_from and step % request.check_every == 0 for step in renewing[:-1])


def test_renewals_lie_twice_as_far_apart_each_time_up_to_the_longest():
    assert list(islice(renewals(8, 4, 10**6), 6)) == [8, 16, 32, 64, 128, 256]
    assert list(islice(renewals(3, 3, 5), 6)) == [3, 9, 21, 36, 51, 66]


def test_a_chain_is_back_only_if_every_value_is_near():
    state, near, far = torch.zeros(2, 3), torch.tensor([[0.0, 0.09, 0.0]]), torch.tensor([[0.0, 0.11, 0.0]])
    assert are_back(state, torch.cat((near, far)), 0.1).tolist() == [True, False]
    assert are_back(state, None, 0.1).tolist() == [False, False]
    assert are_back(state, renewed(state, torch.tensor([0, 2])), 0.1).tolist() == [True, False]
    assert not are_back(torch.full((1, 3), torch.nan), torch.full((1, 3), torch.nan), 0.1).any()


@pytest.mark.parametrize("period", [2, 3, 7])
def test_a_walk_goes_where_the_steps_go(period):
    model = cycle_map(period)
    request = SampleRequest(n_chains=20, burn_in=50, tol=1e-4)
    device = torch.device("cpu")
    engine = ReferenceEngine(model, request, dim=1, data_range=(-1.0, 1.0), tile_rows=64, device=device)
    ids = torch.arange(20)
    start = engine.advance(ids, None, 0, 10, None, lambda _: None).state  # the map is flat: all are on its points
    orbits = follow(engine, ids, start, 1e-4, 8)
    assert orbits.period.tolist() == [period] * 20 and orbits.chain_steps == 20 * period
    few = ids % 3 == 0
    walk = orbits.walk(few)
    for steps in (1, period - 1, period, 3 * period + 1):
        end = engine.advance(ids, start, 10, 10 + steps, None, lambda _: None)
        assert torch.equal(walk.after(steps), end.state[few]), steps
        assert torch.equal(walk.residual_after(steps), end.residual[few]), steps
    assert follow(engine, ids, start, 1e-4, period - 1).period.tolist() == [0] * 20


@given(st.lists(st.integers(-9, 9), max_size=12))
def test_halts_say_of_every_chain_what_its_sign_says(signed):
    halts = Halts.from_signed(torch.tensor(signed, dtype=torch.int32))
    assert halts.running.tolist() == [i for i, s in enumerate(signed) if s == 0]
    assert halts.arrived.tolist() == [i for i, s in enumerate(signed) if s > 0]
    assert halts.returned.tolist() == [i for i, s in enumerate(signed) if s < 0]
    assert halts.steps.tolist() == [abs(s) for s in signed] and halts.steps_sum == sum(map(abs, signed))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("retire", [False, True])
def test_fixed_points_and_cycles_of_one_map_are_told_exactly(engine, retire):
    needs(engine)
    per_interval = few_on_triton(engine, 20, 2)
    starts = middles().repeat(per_interval)[:, None].float()
    starts += torch.linspace(-0.03, 0.03, len(starts))[:, None]  # intervals are 0.14 wide
    result = fast_sample(
        mixed_map(),
        n_chains=len(starts),
        z0=starts,
        burn_in=120,
        engine=engine,
        retire_cycles=retire,
        max_period=7,
        check_every=3,
    )
    periods = torch.tensor(MIXED_PERIODS * per_interval)
    assert torch.equal(result.period.long(), periods)
    expected = torch.where(periods == 1, Outcome.FIXED_POINT, Outcome.CYCLE)
    assert torch.equal(result.outcome.long(), expected.long())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("period", [2, 3, 7])
def test_known_cycles_have_their_exact_period(engine, period):
    needs(engine)
    result = fast_sample(cycle_map(period), n_chains=few_on_triton(engine, 200), burn_in=150, engine=engine)
    assert set(result.period.tolist()) == {period}
    assert set(result.outcome.tolist()) == {Outcome.CYCLE}


@pytest.mark.parametrize("check_every", [1, 4, 6, 100])
def test_every_period_up_to_the_limit_is_found(check_every):
    """However periods and steps between checks divide each other."""
    needs("cpu")
    options: dict[str, Any] = {"n_chains": 8, "check_every": check_every, "engine": "cpu"}
    for period in (*range(2, 64, 5), 63, 64):
        assert set(fast_sample(cycle_map(period), **options).period.tolist()) == {period}
    assert set(fast_sample(cycle_map(65), **options).period.tolist()) == {0}


@pytest.mark.parametrize("period", [33, 63])
def test_long_odd_periods_are_found_in_polished_runs(period):
    options: dict[str, Any] = {"precision": "fp16", "polish": 100, "engine": "reference", "n_draws": 3, "thin": 2}
    assert set(fast_sample(cycle_map(period), n_chains=8, **options).period.tolist()) == {period}


def test_chains_that_oscillate_to_rest_are_no_cycle():
    """tanh(-0.9 x): after two steps a state is nearly back, and nearer to 0."""
    model = KaleidoMLP(ModelSpec((1, 1), bias=(False,)))
    with torch.no_grad():
        model.linears[0].weight.fill_(-0.9)
    result = fast_sample(model, n_chains=200, burn_in=299, check_every=100)
    assert set(result.outcome.tolist()) == {Outcome.FIXED_POINT}
    assert set(result.period.tolist()) == {1}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_map_with_fixed_points_has_only_fixed_points(engine):
    needs(engine)
    result = fast_sample(rotation(1), n_chains=few_on_triton(engine, 200), engine=engine)
    assert set(result.outcome.tolist()) == {Outcome.FIXED_POINT}
    assert set(result.period.tolist()) == {1}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("period", [2, 3, 7])
def test_retired_cycles_walk_on_as_the_chain_would_have(engine, period, request):
    """The map is flat at its points: after a round a chain is at the same bits."""
    needs(engine)
    order_products(engine, request)
    n = few_on_triton(engine, 100)
    options = {"n_chains": n, "burn_in": 101, "n_draws": 9, "thin": 5, "engine": engine, "max_period": 8}
    walked = fast_sample(cycle_map(period), retire_cycles=True, **options)
    run = fast_sample(cycle_map(period), retire_cycles=False, **options)
    assert int(walked.steps.max()) < 101 and set(run.steps.tolist()) == {146}
    for name in ("draws", "residual", "outcome", "period"):
        assert torch.equal(getattr(walked, name), getattr(run, name)), name
    assert walked.stats.chain_steps < run.stats.chain_steps / 2


def test_periods_beyond_the_limit_are_called_moving():
    result = fast_sample(cycle_map(7), n_chains=20, max_period=5)
    assert set(result.outcome.tolist()) == {Outcome.MOVING}
    assert set(result.period.tolist()) == {0}
