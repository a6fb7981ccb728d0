"""Freezing, cycles and polishing: which chains leave the working set, when, and with which bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_states_close, needs, random_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from known_maps import cycle_map, staircase
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kaleido_fast import InputError, KaleidoMLP, ModelSpec, Outcome, SampleResult, fast_sample

ENGINES = ["reference", "cpu", "triton"]
FIELDS = ("draws", "steps", "residual", "outcome", "period")


def order_products(engine: str, request: pytest.FixtureRequest) -> None:
    """Tests of bits: the interpreter is to sum each row by itself, as kernels do."""
    if engine == "triton":
        request.getfixturevalue("ordered_products")


def few_on_triton(engine: str, n: int, few: int = 24) -> int:
    """Triton's interpreter takes milliseconds for what a kernel does in microseconds."""
    return few if engine == "triton" else n


def assert_same(got: SampleResult, want: SampleResult, rows: Any = slice(None)) -> None:
    """``got`` has the bits of these rows of ``want``."""
    for name in FIELDS:
        assert torch.equal(getattr(got, name), getattr(want, name)[rows]), name


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


# Fixed points 0 and 8, a cycle of two (1 <-> 3), of three (2 -> 9 -> 5) and of seven (the others), mixed on the line.
MIXED = [0, 3, 9, 1, 6, 2, 7, 10, 8, 5, 11, 12, 13, 4]
MIXED_PERIODS = [1, 2, 3, 2, 7, 3, 7, 7, 1, 3, 7, 7, 7, 7]


def mixed_map() -> KaleidoMLP:
    """Sends the i-th of 14 equal intervals of [-1, 1] to the middle of the interval ``MIXED[i]``."""
    return staircase(middles()[torch.tensor(MIXED)].tolist())


def middles() -> torch.Tensor:
    edges = torch.linspace(-1, 1, len(MIXED) + 1, dtype=torch.float64)
    return (edges[1:] + edges[:-1]) / 2


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


@pytest.mark.parametrize("retire", [False, True])
def test_a_chain_that_comes_to_rest_at_the_last_step_is_a_fixed_point_of_period_one(retire):
    """Between checks nothing is frozen, and still the last residual says that the chain has arrived."""
    result = fast_sample(lingering(), n_chains=200, burn_in=49, check_every=100, retire_cycles=retire)
    rests = result.residual < 1e-4
    assert 20 < rests.sum() < 180
    assert torch.equal(result.outcome == Outcome.FIXED_POINT, rests)
    assert torch.equal(result.period == 1, rests)
    assert set(result.steps.tolist()) == {50}


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


@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        *(("reference", precision) for precision in ("fp16", "bf16", "tf32")),
        *(("triton", precision) for precision in ("fp16", "bf16")),  # the interpreter does not round to tf32
        ("cpu", "bf16"),
    ],
)
def test_polished_fixed_points_are_fp32_fixed_points(engine, precision):
    needs(engine)
    if engine == "cpu":
        from kaleido_fast.engines import cpu_kernels

        if not cpu_kernels.HAS_BF16:
            pytest.skip("this processor does not multiply bf16")
    model = contracting((16, 48, 16), scale=0.6)
    options = {"n_chains": few_on_triton(engine, 64), "burn_in": 119, "engine": engine}
    exact = fast_sample(model, **options)
    raw = fast_sample(model, precision=precision, **options)
    polished = fast_sample(model, precision=precision, polish=60, **options)
    assert (raw.final - exact.final).abs().max() > 1e-4, "the precision makes no difference here"
    assert_states_close(polished.final, exact.final, atol=2e-4, what=precision)
    assert set(polished.outcome.tolist()) == {Outcome.FIXED_POINT}
    assert int(polished.steps.min()) > 60, "frozen in the low precision"


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
