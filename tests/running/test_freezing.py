"""Freezing: which chains leave the working set, when, and with which bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from all_engines import ENGINES, assert_same, few_on_triton, order_products
from conftest import assert_states_close, needs, random_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from known_maps import contracting, lingering, mixed_map
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kaleido_fast import KaleidoMLP, Outcome, fast_sample


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 60), at=st.integers(0, 200), check_every=st.integers(1, 9), patience=st.integers(1, 3))
def test_freezing_does_not_depend_on_the_batch(engine, n, at, check_every, patience):
    needs(engine)
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
    assert_same(few, many, slice(at, at + n))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", ["lingering", "mixed"])
def test_freezing_does_not_depend_on_order_blocks_or_shards(engine, make, request):
    """Chains that settle at many steps, and chains that go round and are retired for it."""
    needs(engine)
    order_products(engine, request)
    model = lingering() if make == "lingering" else mixed_map()
    n = few_on_triton(engine, 90)
    options = {"burn_in": 60, "n_draws": 2, "thin": 4, "engine": engine, "retire_cycles": True, "max_period": 8}
    whole = fast_sample(model, n_chains=n, **options)
    assert len(whole.steps.unique()) > 2, "the test needs chains that are retired at different steps"
    assert_same(fast_sample(model, n_chains=n, block_chains=7, **options), whole)
    for first, last in ((0, 11), (11, n)):
        assert_same(fast_sample(model, n_chains=last - first, first_chain=first, **options), whole, slice(first, last))
    starts = torch.rand(n, model.spec.dim, generator=torch.Generator().manual_seed(1)) * 2 - 1
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    placed = fast_sample(model, n_chains=n, z0=starts, **options)
    assert_same(fast_sample(model, n_chains=n, z0=starts[order], **options), placed, order)


def by_hand(model: KaleidoMLP, n: int, n_steps: int, tol: float, every: int, patience: int) -> tuple:
    """Which chains freeze when, written out one chain at a time on the reference's full run."""
    from kaleido_fast.planning.request import Trace

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


@pytest.mark.parametrize("engine", ["cpu", "triton"])
@pytest.mark.parametrize(("every", "patience"), [(4, 1), (5, 2)])
def test_every_engine_freezes_the_same_chains(engine, every, patience):
    """Engines differ by the last bits of a residual: chains within 1 % of tol at a check are left out."""
    needs(engine)
    model, n, n_steps, tol = lingering(), few_on_triton(engine, 500, 60), 80, 1e-4
    states, frozen_at = by_hand(model, n, n_steps, tol, every, patience)
    change = (states[:, 1:] - states[:, :-1]).abs().amax(2)
    close = ((change[:, every - 1 :: every] / tol - 1).abs() < 0.01).any(1)
    assert close.float().mean() < 0.2
    result = fast_sample(model, n_chains=n, burn_in=n_steps - 1, engine=engine, check_every=every, patience=patience)
    assert torch.equal(result.steps[~close], frozen_at[~close])
    assert len(frozen_at[~close].unique()) > 4, "the test needs chains that settle at different steps"


@pytest.mark.parametrize("make", ["lingering", "mixed"])
@pytest.mark.parametrize("retire", [False, True])
@pytest.mark.parametrize(("every", "max_period"), [(4, 8), (3, 64), (4, 1)])
def test_chains_checked_inside_a_launch_end_as_those_that_the_host_checks(
    make, retire, every, max_period, monkeypatch, ordered_products
):
    needs("triton")
    from kaleido_fast.engines.triton import TritonEngine

    model = lingering() if make == "lingering" else mixed_map()
    options = {"n_chains": 24, "burn_in": 79, "n_draws": 2, "thin": 3, "engine": "triton", "check_every": every}
    options |= {"retire_cycles": retire, "max_period": max_period}
    launches = []
    launch = TritonEngine._timed_launch

    def counted(self, *arguments):
        launches.append(1)
        launch(self, *arguments)

    monkeypatch.setattr(TritonEngine, "_timed_launch", counted)
    inside, n_inside = fast_sample(model, **options), len(launches)
    monkeypatch.setattr(TritonEngine, "checked", None)
    by_host = fast_sample(model, **options)
    assert_same(inside, by_host)
    assert inside.stats.chain_steps == by_host.stats.chain_steps
    assert n_inside < len(launches) - n_inside


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_states_are_near_where_the_chain_would_have_gone(engine):
    """On a map that contracts by rho a step, a residual below tol leaves at most tol * rho / (1 - rho) to go."""
    needs(engine)
    model, tol, n = contracting(scale=0.4), 1e-4, few_on_triton(engine, 500)
    jacobians = torch.func.vmap(torch.func.jacrev(model))(torch.rand(200, 5) * 2 - 1)
    rho = float(torch.linalg.matrix_norm(jacobians, ord=torch.inf).detach().max())
    assert rho < 1
    with_tol = fast_sample(model, n_chains=n, tol=tol, engine=engine)
    without = fast_sample(model, n_chains=n, tol=None, engine=engine)
    assert with_tol.stats.chain_steps < without.stats.chain_steps / 5
    assert with_tol.stats.work_saved > 0.8
    assert_states_close(with_tol.final, without.final, atol=tol * rho / (1 - rho) + 1e-6, what="frozen states")


def test_draws_after_freezing_equal_the_frozen_state():
    result = fast_sample(contracting(), n_chains=50, burn_in=5, n_draws=60, thin=3)
    for row in range(50):
        first = max(0, -(-(int(result.steps[row]) - 5) // 3) - 1)
        late = result.draws[row, first:]
        assert torch.equal(late, late[:1].expand_as(late))


def test_nan_leaves_the_working_set_alone():
    class Poison(nn.Module):
        def forward(self, x):
            return torch.where(x[:, :1] > 0.9, torch.nan, 0.5 * x)

    result = fast_sample(Poison(), n_chains=400, dim=3, data_range=(-1.0, 1.0))
    bad = result.outcome == Outcome.NON_FINITE
    assert 0 < bad.sum() < 100
    assert set(result.outcome[~bad].tolist()) == {Outcome.FIXED_POINT}
    assert int(result.steps[bad].max()) <= 4
    assert set(result.period[bad].tolist()) == {0}


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_is_reported_and_does_not_spread(engine, request):
    """Sums overflow on some chains, whose values become NaN; their neighbours keep the bits that they have alone."""
    needs(engine)
    order_products(engine, request)
    model = random_mlp(2, 2, 2)
    with torch.no_grad():  # 3e38 (x + y) may overflow in both hidden values, whose difference is then NaN
        model.linears[0].weight.fill_(3e38)
        model.linears[0].bias.zero_()
        model.linears[1].weight.copy_(torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
        model.linears[1].bias.zero_()
    result = fast_sample(model, engine=engine, n_chains=40, burn_in=29)
    bad = result.outcome == Outcome.NON_FINITE
    assert 0 < bad.sum() < 40
    assert set(result.outcome[~bad].tolist()) == {Outcome.FIXED_POINT}
    assert torch.isnan(result.draws[bad]).any(dim=2).all()
    assert int(result.steps[bad].max()) <= 4
    assert result.stats.outcome_shares["non_finite"] == bad.float().mean()
    good = (~bad).nonzero().flatten().tolist()
    for row in good[:: max(1, len(good) // 4)]:
        assert_same(fast_sample(model, engine=engine, n_chains=1, first_chain=row, burn_in=29), result, [row])


def test_an_infinity_that_passes_is_not_lost():
    class Overflow(nn.Module):
        def forward(self, x):
            return torch.where(x.isinf(), 0.1, torch.where(x > 0.9, torch.inf, 0.5 * x))

    options = {"n_chains": 100, "dim": 1, "data_range": (-1.0, 1.0), "check_every": 1}
    result = fast_sample(Overflow(), **options)
    assert set(result.outcome.tolist()) == {Outcome.FIXED_POINT}
    assert_states_close(result.final, fast_sample(Overflow(), tol=None, **options).final, atol=2e-4)


class Waiting(TorchDispatchMode):
    """Notes calls for which the host would wait for a GPU: reading numbers, looking up places of masks."""

    NAMES = frozenset(
        {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "bincount"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        masked = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.NAMES or masked:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("max_period", [1, 64])
def test_the_host_waits_once_a_check(max_period, monkeypatch):
    """What is called on the reference is called on a GPU: four numbers are read at each check and nothing else."""
    from kaleido_fast.running.engine import build_phases
    from kaleido_fast.running.freezing import run_block
    from kaleido_fast.sampling import prepare_run

    reads = 0
    tolist = torch.Tensor.tolist

    def counted(values):
        nonlocal reads
        reads += 1
        return tolist(values)

    options = {"n_chains": 50, "burn_in": 79, "max_period": max_period, "engine": "reference"}
    run = prepare_run(contracting(scale=1.4, seed=6), **options)  # none of its chains is taken for a cycle on its way
    phases = build_phases(run.subject, run.request, run.plan, run.device)
    draws = torch.empty(50, 1, 5)
    run_block(phases, run.request, torch.arange(50), None, draws, lambda _: None)  # looks at each number of rows once
    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    with Waiting() as waiting:
        end = run_block(phases, run.request, torch.arange(50), None, draws, lambda _: None)
    assert len(end.steps.unique()) > 4, "the test needs chains that settle at different steps"
    assert waiting.names == []
    assert 4 < reads <= int(end.steps.max()) // 4


def test_jittered_runs_never_freeze_and_tol_none_runs_every_step():
    for options in ({"jitter": 0.1}, {"tol": None}):
        result = fast_sample(contracting(), n_chains=20, burn_in=49, **options)
        assert set(result.steps.tolist()) == {50}
        assert result.stats.chain_steps == 1000
