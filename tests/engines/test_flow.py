"""The sampler flow: the exact step, and the laws of its draws, on every engine."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_states_close, needs, random_mlp
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleido_fast import fast_sample
from kaleido_fast.engines.reference import ReferenceEngine
from kaleido_fast.model import KaleidoMLP
from kaleido_fast.noise import normals
from kaleido_fast.planning.request import SampleRequest, Trace

ENGINES = ["reference", "cpu"]
MODEL = random_mlp(5, 11, 13, 5, activation="silu")
SHIFTED = random_mlp(6, 9, 6, bound="sigmoid", low=0.125, high=0.875, seed=2)


def build(engine: str, model: KaleidoMLP, request: SampleRequest):
    """The engine for a request, below the plan."""
    if engine == "cpu":
        from kaleido_fast.engines.cpu import CpuEngine

        return CpuEngine(model, request)
    spec, device = model.spec, torch.device("cpu")
    return ReferenceEngine(model, request, dim=spec.dim, data_range=(spec.low, spec.high), tile_rows=16, device=device)


def advance(engine, chains, state, first: int, last: int):
    """(draws, states, residual) of `MODEL`; draws that are not reached stay NaN."""
    request = engine.request
    draws = torch.full((len(chains), request.n_draws, MODEL.spec.dim), torch.nan)
    end = engine.advance(chains, state, first, last, draws, lambda _: None)
    return draws, end.state, end.residual


def by_hand(model: KaleidoMLP, request: SampleRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, written out in fp64: draws and the last residual."""
    spec, chains = model.spec, torch.arange(request.n_chains) + request.first_chain
    mid, half = (spec.low + spec.high) / 2, (spec.high - spec.low) / 2
    n, begin, end = request.steps, request.noise_from, request.noise_to
    shares = [begin + (end - begin) * t / (n - 1) if n > 1 else begin for t in range(n)] + [0.0]
    model, draws = model.double(), []
    for draw in range(request.n_draws):
        x = mid + half * begin * normals(request.seed, chains, spec.dim, draw * n).double()
        for t in range(n):
            with torch.no_grad():
                change = model(x) - x
            x = x + (1 - shares[t + 1] / shares[t]) * change
        draws.append(x)
    model.float()
    return torch.stack(draws, 1), change.abs().amax(1)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=25, deadline=None)
@given(
    steps=st.sampled_from([1, 2, 3, 8, 20]),
    n_draws=st.integers(1, 3),
    shares=st.sampled_from([(0.9, 0.1), (1.0, 0.01), (0.3, 0.2)]),
    first_chain=st.sampled_from([0, 2**32 - 3]),
    seed=st.integers(0, 2**64 - 1),
    model=st.sampled_from([MODEL, SHIFTED]),
)
def test_draws_follow_the_definition(engine, steps, n_draws, shares, first_chain, seed, model):
    needs(engine)
    options = {"n_chains": 37, "n_draws": n_draws, "first_chain": first_chain, "seed": seed, "sampler": "flow"}
    options |= {"steps": steps, "noise_from": shares[0], "noise_to": shares[1]}
    result = fast_sample(model, engine=engine, **options)
    want, residual = by_hand(model, result.request)
    # a step multiplies a difference by at most the network's slope, some 2 for these, less where it goes a part
    assert_states_close(result.draws, want, atol=2e-6 * 2 ** min(steps, 7), what=f"draws of {steps} steps")
    assert_states_close(result.residual, residual, atol=2e-6 * 2 ** min(steps, 7), what="residual")


@pytest.mark.parametrize("engine", ENGINES)
def test_draws_are_outputs_of_the_network_inside_its_bound(engine):
    """A network of large weights, from starts far outside of the range: states between may leave it, no draw does."""
    needs(engine)
    model = random_mlp(6, 9, 6, scale=9.0)
    trace = Trace(chains=tuple(range(50)), steps=tuple(range(21)))
    result = fast_sample(
        model, n_chains=50, n_draws=2, steps=10, sampler="flow", engine=engine, noise_from=1.0, trace=trace
    )
    assert float(result.draws.abs().max()) <= 1.0
    assert float(result.trace.abs().max()) > 1.5, "starts are not clamped"
    assert torch.equal(result.trace[:, 10], result.draws[:, 0]) and torch.equal(result.trace[:, 20], result.draws[:, 1])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_last_step_is_one_of_the_kaleidoscope(engine):
    """h = 1 there: f(x) bit for bit. With one step a draw is f of its start."""
    needs(engine)
    chains = torch.arange(40)
    whole = build(engine, MODEL, SampleRequest(n_chains=40, burn_in=0))
    for steps in (1, 4):
        flow = build(engine, MODEL, SampleRequest(n_chains=40, sampler="flow", steps=steps))
        start = flow.start(chains)
        before = start if steps == 1 else flow.advance(chains, start, 0, steps - 1, None, lambda _: None).state
        got = flow.advance(chains, None, 0, steps, None, lambda _: None)
        want = whole.advance(chains, before, 0, 1, None, lambda _: None)
        assert torch.equal(got.state, want.state), f"{steps} steps"
        assert torch.equal(got.residual, want.residual), f"{steps} steps"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_draw_starts_anew_from_the_noise_of_its_own_steps(engine):
    """Draw d depends on no state before it, and is the first draw of a start made of the noise of step d * steps."""
    needs(engine)
    request = SampleRequest(n_chains=40, n_draws=3, sampler="flow", steps=4, seed=5)
    flow, chains = build(engine, MODEL, request), torch.arange(40)
    draws, _, _ = advance(flow, chains, None, 0, 12)
    lost = torch.full((40, 5), torch.nan)
    for draw in (1, 2):
        alone, _, _ = advance(flow, chains, lost, 4 * draw, 4 * draw + 4)
        assert torch.equal(alone[:, draw], draws[:, draw]), f"draw {draw}"
        start = 0.9 * normals(5, chains, 5, 4 * draw)
        first, _, _ = advance(flow, chains, start, 0, 4)
        assert_states_close(first[:, 0], draws[:, draw], atol=2e-5, what=f"from the start of draw {draw}")
    assert not torch.isclose(draws[:, 0], draws[:, 1]).all(dim=1).any(), "draws differ"


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=25, deadline=None)
@given(first=st.integers(1, 11), steps=st.sampled_from([1, 3, 4, 6]))
def test_any_split_in_time_gives_the_same_bits(engine, first, steps):
    needs(engine)
    request = SampleRequest(n_chains=40, n_draws=12 // steps, sampler="flow", steps=steps)
    flow, chains = build(engine, MODEL, request), torch.arange(40)
    whole = advance(flow, chains, None, 0, 12)
    early, state, _ = advance(flow, chains, None, 0, first)
    late, final, residual = advance(flow, chains, state, first, 12)
    draws = torch.where(early.isnan(), late, early)
    for name, got, want in zip(("draws", "final", "residual"), (draws, final, residual), whole, strict=True):
        assert torch.equal(got, want), f"{name}, split at {first}"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("n", [1, 31, 33, 128, 129, 300])
def test_a_chain_has_the_same_bits_in_any_company(engine, n):
    needs(engine)
    request = SampleRequest(n_chains=400, n_draws=2, sampler="flow", steps=5, seed=2)
    flow = build(engine, MODEL, request)
    whole = advance(flow, torch.arange(400), None, 0, 10)
    chosen = torch.randperm(400, generator=torch.Generator().manual_seed(n))[:n]
    for name, got, want in zip(("draws", "final", "residual"), advance(flow, chosen, None, 0, 10), whole, strict=True):
        assert torch.equal(got, want[chosen]), f"{name} of {n} chains, shuffled"


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_stays_in_its_own_chain_and_draw(engine):
    """A chain that is lost begins its next draw like all others."""
    needs(engine)
    request = SampleRequest(n_chains=40, n_draws=2, sampler="flow", steps=3)
    flow, chains = build(engine, MODEL, request), torch.arange(40)
    state = flow.start(chains)
    clean, _, _ = advance(flow, chains, state, 0, 6)
    state[17, 2] = torch.nan
    draws, _, _ = advance(flow, chains, state, 0, 6)
    others = chains != 17
    assert torch.equal(draws[others], clean[others]), "beside a NaN"
    assert draws[17, 0].isnan().all() and torch.equal(draws[17, 1], clean[17, 1])
