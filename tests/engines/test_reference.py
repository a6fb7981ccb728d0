"""The reference engine and `fast_sample`: the exact step, and the laws of chains."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_states_close, random_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kaleido_fast
from kaleido_fast import InputError, Outcome, SampleRequest, SampleResult, SamplingInterruptedError
from kaleido_fast.engines.reference import ReferenceEngine
from kaleido_fast.noise import jitter_noise, start_noise
from kaleido_fast.planning.request import Trace
from kaleido_fast.planning.spacing import are_jittered
from kaleido_kernels.packing import round_operand

MODEL = random_mlp(5, 11, 13, 5)


def fast_sample(model, **options) -> SampleResult:
    """The public function on the reference engine."""
    return kaleido_fast.fast_sample(model, **{"engine": "reference", **options})


def engine_for(request: SampleRequest, tile_rows: int = 16, model=MODEL) -> ReferenceEngine:
    spec = model.spec
    return ReferenceEngine(
        model,
        request,
        dim=spec.dim,
        data_range=(spec.low, spec.high),
        tile_rows=tile_rows,
        device=torch.device("cpu"),
    )


def by_hand(model, request: SampleRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """The published definition, written out in float64 for one request."""
    spec = model.spec
    chains = torch.arange(request.n_chains) + request.first_chain
    model = model.double()
    args = (request.seed, chains, spec.dim)
    x = start_noise(*args, request.init, spec.low, spec.high).double()
    draws, step = [], 0
    for draw in range(request.n_draws):
        count = request.thin + (request.burn_in if draw == 0 else 0)
        for i in range(count):
            clean = step == 0 or i >= count - request.settle
            if request.jitter and request.noise != "upstream" and not clean:
                e = jitter_noise(*args, step, request.noise, spec.low, spec.high).double()
                x = (x + request.jitter * e).clamp(spec.low, spec.high)
            with torch.no_grad():
                y = model(x)
            residual = (y - x).abs().amax(1)
            if request.jitter and request.noise == "upstream":
                e = jitter_noise(*args, step + 1, "upstream", spec.low, spec.high).double()
                y = (y + request.jitter * e).clamp(spec.low, spec.high)
            x, step = y, step + 1
        draws.append(x)
    model.float()
    return torch.stack(draws, 1), residual


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh"])
@pytest.mark.parametrize("bound", ["tanh", "sigmoid"])
def test_one_and_several_steps_follow_the_definition(activation, bound):
    model = random_mlp(5, 7, 5, activation=activation, bound=bound)
    for n_steps in (1, 4):
        request = SampleRequest(n_chains=23, burn_in=n_steps - 1, seed=7)
        result = fast_sample(model, n_chains=23, burn_in=n_steps - 1, seed=7)
        want, residual = by_hand(model, request)
        assert_states_close(result.draws, want, atol=2e-5, what=f"{activation} {bound} {n_steps} steps")
        assert_states_close(result.residual, residual, atol=2e-5, what="residual")


@settings(max_examples=40, deadline=None)
@given(
    burn_in=st.integers(0, 5),
    n_draws=st.integers(1, 4),
    thin=st.integers(1, 4),
    settle=st.integers(0, 4),
    jitter=st.sampled_from([0.0, 0.3]),
    noise=st.sampled_from(["normal", "uniform", "upstream"]),
    init=st.sampled_from(["uniform", "normal"]),
    first_chain=st.sampled_from([0, 2**32 - 3, 2**40 + 1]),
    seed=st.integers(0, 2**64 - 1),
)
def test_schedule_noise_and_draws_follow_the_definition(**options):
    if options["noise"] == "upstream":
        options["settle"] = 0
    if are_jittered(options["n_draws"], options["jitter"], options["noise"]):
        options["thin"] += options["settle"]  # draws without a jittered step between them are refused
    request = SampleRequest(n_chains=3, precision="fp64", **options)
    result = fast_sample(MODEL, n_chains=3, precision="fp64", **({} if options["jitter"] else {"tol": None}), **options)
    want, residual = by_hand(MODEL, request)
    assert_states_close(result.draws, want, atol=1e-12, what=str(options))
    assert_states_close(result.residual, residual, atol=1e-6, what=f"residual of {options}")


def test_published_formula_over_three_steps():
    """A frozen copy of the published update: f, then uniform noise on [high, 2 high - low), then the clamp."""
    chains, eps = torch.arange(50), 0.05
    x = start_noise(11, chains, 5, "uniform", -1.0, 1.0)
    with torch.no_grad():
        for step in range(3):
            u = (jitter_noise(11, chains, 5, step + 1, "uniform", -1.0, 1.0) + 1) / 2
            x = torch.clamp(MODEL(x) + eps * ((1 - -1) * u + 1), min=-1, max=1)
    result = fast_sample(MODEL, n_chains=50, burn_in=2, seed=11, jitter=eps, noise="upstream")
    assert_states_close(result.final, x, atol=2e-6, what="upstream")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(0, 6), st.sampled_from([0.0, 0.5]), st.data())
def test_any_split_into_steps_and_chains_gives_the_same_bits(n, burn_in, jitter, data):
    request = SampleRequest(n_chains=n, burn_in=burn_in, n_draws=2, thin=2, jitter=jitter, seed=5)
    engine = engine_for(request)
    chains, n_steps = torch.arange(n), request.schedule.n_steps
    draws = torch.full((n, 2, 5), torch.nan)
    whole = engine.advance(chains, None, 0, n_steps, draws, lambda _: None)
    cut = data.draw(st.integers(1, n_steps - 1))
    order = torch.tensor(data.draw(st.permutations(range(n))))
    pieces = torch.full((n, 2, 5), torch.nan)
    part = engine.advance(chains[order], None, 0, cut, pieces, lambda _: None)
    last = engine.advance(chains[order], part.state, cut, n_steps, pieces, lambda _: None)
    assert torch.equal(last.state, whole.state[order])
    assert torch.equal(last.residual, whole.residual[order])
    assert torch.equal(pieces, draws[order])


@pytest.mark.parametrize("widths", [(1, 10, 10, 1), (5, 11, 13, 5), (64, 100, 64)])
def test_a_chain_does_not_depend_on_its_neighbours(widths):
    model = random_mlp(*widths)
    many = fast_sample(model, n_chains=3000, burn_in=7, seed=3, jitter=0.2)
    few = fast_sample(model, n_chains=37, first_chain=1234, burn_in=7, seed=3, jitter=0.2)
    assert torch.equal(many.draws[1234 : 1234 + 37], few.draws)
    assert torch.equal(many.residual[1234 : 1234 + 37], few.residual)


def test_states_obey_the_bound_and_draws_chain_first():
    result = fast_sample(MODEL, n_chains=100, burn_in=3, n_draws=4, thin=3, jitter=0.9)
    assert result.draws.shape == (100, 4, 5)
    assert result.draws.abs().max() <= 1
    assert torch.equal(result.final, result.draws[:, -1])
    assert result.stats.n_steps == 15
    assert result.stats.chain_steps == 1500


def test_trace_holds_the_states_on_the_way():
    trace = Trace(chains=(1007, 1000), steps=(0, 3, 8, 5))
    result = fast_sample(MODEL, n_chains=20, first_chain=1000, burn_in=7, jitter=0.2, trace=trace)
    assert result.trace.shape == (2, 4, 5)
    assert torch.equal(result.trace[0, 2], result.final[7])
    start = start_noise(0, torch.tensor([1007, 1000]), 5, "uniform", -1.0, 1.0)
    assert torch.equal(result.trace[:, 0], start)
    # an undisturbed trace: three steps alone are the first three steps of any longer run
    quiet = fast_sample(MODEL, n_chains=20, first_chain=1000, burn_in=2, n_draws=1)
    traced = fast_sample(MODEL, n_chains=20, first_chain=1000, burn_in=9, trace=Trace((1003,), (3,)))
    assert torch.equal(traced.trace[0, 0], quiet.final[3])


def test_z0_replaces_the_start_noise():
    z0 = start_noise(0, torch.arange(9), 5, "uniform", -1.0, 1.0)
    with_z0 = fast_sample(MODEL, n_chains=9, burn_in=4, z0=z0)
    assert torch.equal(with_z0.draws, fast_sample(MODEL, n_chains=9, burn_in=4).draws)
    other = fast_sample(MODEL, n_chains=9, burn_in=0, z0=torch.zeros(9, 5))
    with torch.no_grad():
        assert_states_close(other.final, MODEL(torch.zeros(9, 5)), atol=1e-6)


def test_a_fixed_point_stays_and_is_called_one():
    model = random_mlp(4, 8, 4, scale=0.2)
    result = fast_sample(model, n_chains=50, burn_in=60)
    assert set(result.outcome.tolist()) == {Outcome.FIXED_POINT}
    again = fast_sample(model, n_chains=50, burn_in=0, z0=result.final)
    assert_states_close(again.final, result.final, atol=1e-6)
    assert result.stats.outcome_shares["fixed_point"] == 1


def test_nan_is_reported_and_not_spread():
    class Poison(nn.Module):
        def forward(self, x):
            return torch.where(x[:, :1] > 0.5, torch.nan, 0.5 * x)

    result = fast_sample(Poison(), n_chains=200, burn_in=0, dim=3, data_range=(-1.0, 1.0))
    bad = result.outcome == Outcome.NON_FINITE
    start = start_noise(0, torch.arange(200), 3, "uniform", -1.0, 1.0)
    assert torch.equal(bad, start[:, 0] > 0.5)
    assert torch.isfinite(result.draws[~bad]).all()


@pytest.mark.parametrize(("precision", "atol"), [("fp32", 1e-6), ("tf32", 2e-3), ("fp16", 3e-3), ("bf16", 3e-2)])
def test_precisions_stay_near_fp64_over_one_step(precision, atol):
    model = random_mlp(64, 96, 96, 64, scale=1.0)
    exact = fast_sample(model, n_chains=64, burn_in=0, precision="fp64").draws
    got = fast_sample(model, n_chains=64, burn_in=0, precision=precision).draws
    assert_states_close(got, exact, atol=atol, what=precision)
    if precision != "fp32":
        assert (got.double() - exact).abs().max() > 1e-6, f"{precision} does not round its operands"


def test_round_operand_tf32_is_round_to_nearest_even():
    one = torch.tensor([1.0])
    ulp = 2.0**-10
    cases = torch.tensor([1 + ulp / 4, 1 + ulp / 2, 1 + 3 * ulp / 2, 1 + 3 * ulp / 4, -1 - 3 * ulp / 4])
    want = torch.tensor([1.0, 1.0, 1 + 2 * ulp, 1 + ulp, -1 - ulp])
    assert torch.equal(round_operand(cases, "tf32"), want)
    assert torch.equal(round_operand(one * torch.nan, "tf32").isnan(), torch.tensor([True]))


def test_the_host_program_is_not_disturbed():
    torch.manual_seed(0)
    before, flag = torch.random.get_rng_state(), torch.get_float32_matmul_precision()
    plain = fast_sample(MODEL, n_chains=10, burn_in=3).draws
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            disturbed = fast_sample(MODEL, n_chains=10, burn_in=3).draws
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision(flag)
    assert torch.equal(plain, disturbed)
    assert torch.equal(before, torch.random.get_rng_state())


def test_interrupt_reports_what_is_done():
    def stop(state):
        if state.chain_steps_done > 2000:
            raise KeyboardInterrupt

    model = random_mlp(2, 2000, 2000, 2)
    with pytest.raises(SamplingInterruptedError, match="interrupted: 0 of 4,000"):
        fast_sample(model, n_chains=4000, burn_in=9, callback=stop)


def test_callback_sees_the_run_to_its_end():
    seen = []
    fast_sample(MODEL, n_chains=100, burn_in=9, callback=seen.append)
    assert seen[-1].chain_steps_done == seen[-1].chain_steps == 1000


def test_sequential_gives_the_same_chains_as_its_mlp():
    sequential = nn.Sequential(
        nn.Linear(5, 9), nn.SiLU(), nn.Sequential(nn.Linear(9, 5), nn.Dropout(0.5)), nn.Sigmoid()
    )
    result = fast_sample(sequential, n_chains=40, burn_in=3)
    assert 0 <= float(result.draws.min()) <= float(result.draws.max()) <= 1
    layers = [m for m in sequential.modules() if isinstance(m, nn.Linear)]
    twin = random_mlp(5, 9, 5, activation="silu", bound="sigmoid")
    for mine, theirs in zip(twin.linears, layers, strict=True):
        mine.load_state_dict(theirs.state_dict())
    assert torch.equal(result.draws, fast_sample(twin, n_chains=40, burn_in=3).draws)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_chains": 0}, "n_chains is 0"),
        ({"n_chains": -3}, "n_chains is -3"),
        ({"n_chains": 2.5}, "whole number"),
        ({"burn_in": -1}, "burn_in is -1"),
        ({"n_draws": 0}, "n_draws is 0"),
        ({"thin": 0}, "thin is 0"),
        ({"seed": 2**64}, "seed is"),
        ({"seed": -1}, "seed is -1"),
        ({"first_chain": -1}, "first_chain is -1"),
        ({"jitter": float("nan")}, "jitter is nan"),
        ({"jitter": -0.5}, "jitter is -0.5"),
        ({"tol": 0.0}, "tol is 0.0"),
        ({"tol": float("nan")}, "tol is nan"),
        ({"init": "gauss"}, "unknown init"),
        ({"noise": "upstrem"}, "did you mean 'upstream'"),
        ({"engine": "refrence"}, "did you mean 'reference'"),
        ({"precision": "fp8"}, "unknown precision"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"device": "gpu0"}, "unknown device"),
        ({"z0": torch.zeros(3, 5)}, "z0 has shape"),
        ({"z0": torch.zeros(10, 5, dtype=torch.int64)}, "z0 is torch.int64"),
        ({"z0": torch.full((10, 5), torch.nan)}, "z0 holds NaN"),
        ({"z0": torch.full((10, 5), 2.0)}, "z0 reaches"),
        ({"trace": Trace((0,), (99,))}, "trace step is 99"),
        ({"trace": Trace((10,), (1,))}, "trace chain is 10"),
        ({"n_chains": 10**13}, "GiB are free"),
    ],
)
def test_bad_requests_give_one_clear_line(options, text):
    with pytest.raises(InputError, match=text) as caught:
        fast_sample(MODEL, **{"n_chains": 10, "burn_in": 3, **options})
    assert "\n" not in str(caught.value)


def test_modules_that_cannot_be_taken_over_say_why():
    mixed = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh())
    with pytest.raises(InputError, match=r"mixed \(relu, tanh\)"):
        fast_sample(mixed, n_chains=3)
    with pytest.raises(InputError, match="dim= and data_range="):
        fast_sample(nn.Linear(3, 3), n_chains=3)
    with pytest.raises(InputError, match="a KaleidoMLP or a plain Sequential"):
        fast_sample(nn.Tanh(), n_chains=3, dim=2, data_range=(-1.0, 1.0), engine="cpu")


@pytest.mark.parametrize("step_error", [0.0, 1e-6])
def test_few_chains_are_run_in_few_rows_where_that_changes_no_bit(step_error):
    """With an error that depends on the number of rows, as a library's may, whole tiles are taken."""
    request = SampleRequest(n_chains=3, burn_in=9, jitter=0.2)
    engine, seen = engine_for(request, tile_rows=64), []
    exact = engine.step_map

    def recorded(x):
        seen.append(len(x))
        return exact(x) + step_error * (len(x) < 64)

    engine.step_map = recorded
    few = engine.advance(torch.arange(40, 43), None, 0, 10, None, lambda _: None)
    rows = set(seen[3:])  # after the three looks
    assert rows == ({64} if step_error else {engine._rows_for(3)})
    many = engine_for(request, tile_rows=64).advance(torch.arange(64), None, 0, 10, None, lambda _: None)
    assert torch.equal(few.state, many.state[40:43])
