"""Runs of a flow: blocks, start states, traces, what is known of chains, and modules that run as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import assert_same, assert_states_close, needs, random_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kaleido_fast import InputError, Outcome, SampleRequest, Trace, fast_sample
from kaleido_fast.running.execution import execute
from kaleido_fast.sampling import prepare_run

ENGINES = ["reference", "cpu"]
MODEL = random_mlp(5, 11, 13, 5, activation="silu")


class Wrapped(nn.Module):
    """The same network, in a form that only the reference can run."""

    def __init__(self) -> None:
        super().__init__()
        self.network = MODEL

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x) * 1.0


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 60),
    first=st.integers(0, 40),
    block=st.integers(1, 70),
    steps=st.sampled_from([1, 2, 5]),
    n_draws=st.integers(1, 3),
)
def test_any_part_and_any_blocks_have_the_same_bits(engine, n, first, block, steps, n_draws):
    needs(engine)
    options = {"sampler": "flow", "steps": steps, "n_draws": n_draws, "seed": 6, "engine": engine}
    whole = fast_sample(MODEL, n_chains=100, **options)
    part = fast_sample(MODEL, n_chains=n, first_chain=first, block_chains=block, **options)
    for name in ("draws", "residual", "steps", "period", "outcome"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[first : first + n]), name


@pytest.mark.parametrize("engine", ENGINES)
def test_more_draws_and_other_draws_leave_a_draw_as_it_is(engine):
    """Draw d is that of any run with as many steps a draw."""
    needs(engine)
    options = {"n_chains": 40, "sampler": "flow", "steps": 3, "engine": engine}
    many = fast_sample(MODEL, n_draws=5, **options).draws
    for n_draws in (1, 2, 4):
        assert torch.equal(fast_sample(MODEL, n_draws=n_draws, **options).draws, many[:, :n_draws])


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_known_of_its_chains(engine):
    needs(engine)
    result = fast_sample(MODEL, n_chains=40, n_draws=2, sampler="flow", steps=4, engine=engine)
    assert set(result.outcome.tolist()) == {Outcome.MOVING} and not result.period.any()
    assert (result.steps == 8).all() and result.stats.n_steps == 8 and result.stats.chain_steps == 40 * 8
    assert not result.stats.steps_histogram and result.stats.work_saved == 0
    assert "flow" in Outcome.MOVING.advice
    request = result.request
    assert (request.burn_in, request.thin, request.jitter, request.settle, request.tol) == (0, 4, 0.0, 0, None)
    assert not request.freezes
    states = fast_sample(MODEL, n_chains=40, n_draws=2, sampler="flow", steps=4, engine=engine, trace=Trace((3,), (7,)))
    with torch.no_grad():
        change = (MODEL(states.trace[0]) - states.trace[0]).abs().amax()
    assert float(result.residual[3]) == pytest.approx(float(change), abs=2e-6)
    assert torch.equal(states.final, result.final)


@pytest.mark.parametrize("engine", ENGINES)
def test_start_states_stand_for_the_start_of_the_first_draw_alone(engine):
    needs(engine)
    options = {"n_chains": 30, "n_draws": 2, "sampler": "flow", "steps": 4, "engine": engine}
    plain = fast_sample(MODEL, **options, trace=Trace(tuple(range(30)), (0,)))
    start = plain.trace[:, 0]
    assert float(start.abs().max()) > 1, "starts reach beyond the data range"
    assert_same(fast_sample(MODEL, z0=start, **options), plain)
    moved = fast_sample(MODEL, z0=start.flip(0), **options)
    assert torch.equal(moved.draws[:, 0], plain.draws[:, 0].flip(0)) and torch.equal(moved.final, plain.final)
    with pytest.raises(InputError, match="z0 holds NaN or infinite values"):
        fast_sample(MODEL, z0=start / 0, **options)
    with pytest.raises(InputError, match="clamp it to"):
        fast_sample(MODEL, n_chains=30, z0=start, engine=engine)


def test_several_devices_give_the_bits_of_one():
    """Threads that take blocks from one list, here all on the CPU."""
    run = prepare_run(MODEL, n_chains=300, n_draws=2, sampler="flow", steps=3, engine="reference", block_chains=64)
    shared = replace(run, others=(torch.device("cpu"), torch.device("cpu")))
    assert_same(execute(shared), execute(run))


@pytest.mark.filterwarnings("ignore::kaleido_fast.GeneralModuleWarning")
@pytest.mark.parametrize("steps", [1, 4])
def test_a_module_that_runs_as_it_is(steps):
    options = {"n_chains": 50, "n_draws": 3, "sampler": "flow", "steps": steps, "seed": 4}
    sizes = {"dim": 5, "data_range": (-1.0, 1.0)}
    got, want = fast_sample(Wrapped(), **options, **sizes), fast_sample(MODEL, engine="reference", **options)
    assert_states_close(got.draws, want.draws, atol=2e-5, what="draws")
    one = {"n_chains": 1, "first_chain": 17, "tile_chains": got.request.tile_chains}
    assert torch.equal(fast_sample(Wrapped(), **options | one, **sizes).draws[0], got.draws[17])
    later = {"trace": Trace((17,), tuple(range(3 * steps + 1))), "tile_chains": got.request.tile_chains}
    traced = fast_sample(Wrapped(), **options, **later, **sizes).trace
    assert torch.equal(traced[0, steps::steps], got.draws[17])


def test_fp64_and_fp32_agree():
    options = {"n_chains": 50, "n_draws": 2, "sampler": "flow", "steps": 4, "engine": "reference"}
    exact = fast_sample(MODEL, precision="fp64", **options)
    assert exact.draws.dtype == torch.float64
    assert_states_close(fast_sample(MODEL, **options).draws, exact.draws, atol=2e-5)


def test_a_request_of_a_flow_says_how_long_it_is():
    with pytest.raises(InputError, match=r"^n_draws \* steps is 1,099,511,627,776 steps: at most 2,147,483,647"):
        SampleRequest(n_chains=1, sampler="flow", steps=2**20, n_draws=2**20)
