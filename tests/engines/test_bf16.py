"""bf16 on the CPU engine, by each way that a processor may offer: the reference's operands, in any company."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import assert_states_close, random_mlp
from cpu_runs import ACTIVATIONS, BF16_STEP, assert_same_bits, assert_same_run, reference, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaleido_fast import fast_sample
from kaleido_fast.errors import InputError
from kaleido_fast.model import KaleidoMLP, ModelSpec
from kaleido_fast.planning.request import SampleRequest
from kaleido_fast.storing.sample_to import sample_to

pytest.importorskip("numba", reason="the CPU engine needs numba")
from kaleido_fast.engines.cpu import CpuEngine
from kaleido_fast.engines.loops import choice, processor, tiles

WAYS = ["rounded", "pairs", "tiles"]


def choose(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Let bf16 be computed in a way, or skip where the processor has it not."""
    if way == "pairs" and not processor.HAS_PAIRS:
        pytest.skip("this processor has no AVX512-BF16")
    if way == "tiles" and not processor.tiles_are_permitted():
        pytest.skip("this processor has no AMX")
    monkeypatch.setattr(choice, "bf16_loops", lambda: way)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    choose(monkeypatch, request.param)
    return request.param


# Blocks of tiles are of 32 outputs or 16, and steps of 32 inputs; wide layers go in parts of 256 inputs.
WIDTHS = [
    *[(1, 1), (1, 10, 1), (5, 11, 13, 5), (2, 50, 50, 2), (67, 13, 67), (7, 1031, 7), (16, 17, 16), (32, 33, 31, 32)],
    *[(300, 15, 300), (784, 260, 784), (257, 256, 257)],
]


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
def test_a_step_agrees_with_the_rounded_operands_of_the_reference(way, widths, activation):
    model = random_mlp(*widths, activation=activation)
    request = SampleRequest(n_chains=131, burn_in=0, seed=1, precision="bf16")
    assert_same_run(model, request, BF16_STEP)
    chains = torch.arange(131)
    got, want = run(CpuEngine(model, request), chains)[1], run(reference(model, request), chains)[1]
    assert float((got - want).abs().median()) < 1e-6, "most chains meet no such rounding"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    widths=st.lists(st.integers(1, 140), min_size=1, max_size=4),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    chains=st.integers(1, 300),
    subs=st.integers(1, 4),
)
def test_any_shape_agrees_with_the_reference(way, monkeypatch, widths, activation, bias, chains, subs):
    """In tiles of any number of sub-tiles."""
    model = random_mlp(*widths, widths[0], activation=activation, bias=(bias,) * len(widths))
    request = SampleRequest(n_chains=chains, burn_in=0, seed=5, precision="bf16")
    with monkeypatch.context() as patch:
        patch.setattr("kaleido_fast.planning.cpu_tiles.full_tile", lambda widths: 32 * subs)
        assert_same_run(model, request, ("bf16", 2e-2, 0.0))


@pytest.mark.parametrize("widths", [(1, 1), (5, 11, 13, 5), (67, 13, 67)])
def test_a_flow_agrees_with_the_reference(way, widths):
    model = random_mlp(*widths, activation="silu")
    request = SampleRequest(n_chains=131, seed=1, precision="bf16", sampler="flow", steps=2)
    assert_same_run(model, request, ("bf16", 3e-2, 0.0))
    chains = torch.arange(131)
    got, want = run(CpuEngine(model, request), chains)[1], run(reference(model, request), chains)[1]
    assert float((got - want).abs().median()) < 1e-6, "most chains meet no such rounding"


def test_ties_round_to_even(way):
    """One weight of 1: the output is the rounded input, between two neighbours, at ties and beyond."""
    model = KaleidoMLP(ModelSpec((1, 1), bias=(False,)))
    with torch.no_grad():
        model.linears[0].weight.fill_(1.0)
    bits = torch.arange(0x3E80_0000, 0x3E88_0000, 0x1000, dtype=torch.int32)
    x = torch.cat((bits.view(torch.float32), -bits.view(torch.float32), torch.tensor([torch.nan, torch.inf])))[:, None]
    request = SampleRequest(n_chains=len(x), precision="bf16")
    got = CpuEngine(model, request).advance(torch.arange(len(x)), x, 0, 1, None, lambda _: None).state
    assert_states_close(got, torch.tanh(x.to(torch.bfloat16).double()), atol=2e-7, what="rounding")


@pytest.mark.parametrize("n_out", range(1, 70))
def test_every_block_computes_every_output(way, n_out):
    """Whole numbers that bf16 holds: any order of summing is exact, so a slip of one weight shows."""
    model = KaleidoMLP(ModelSpec((3, n_out, 3), low=-0.5, high=0.5))
    generator = torch.Generator().manual_seed(n_out)
    with torch.no_grad():
        for layer in model.linears:
            layer.weight.copy_(torch.randint(-3, 4, layer.weight.shape, generator=generator))
            layer.bias.copy_(torch.randint(-9, 9, layer.bias.shape, generator=generator))
        model.linears[1].weight.mul_(2.0**-14)
        model.linears[1].bias.mul_(2.0**-14)
    state = torch.randint(-9, 9, (45, 3), generator=generator).float()
    got = CpuEngine(model, SampleRequest(n_chains=45, precision="bf16"))
    got = got.advance(torch.arange(45), state, 0, 1, None, lambda _: None).state
    with torch.no_grad():
        want = model.double()(state.double())
    assert_states_close(got, want, atol=2e-7, what=f"{n_out} hidden")


COMPANY = random_mlp(5, 37, 300, 5)


@pytest.mark.parametrize("jitter", [0.0, 0.4])
@pytest.mark.parametrize("n", [1, 32, 33, 129, 600])
def test_a_chain_has_the_same_bits_in_any_company(way, n, jitter):
    request = SampleRequest(n_chains=700, burn_in=5, n_draws=2, jitter=jitter, seed=2, precision="bf16")
    engine = CpuEngine(COMPANY, request)
    whole = run(engine, torch.arange(700))
    chosen = torch.randperm(700, generator=torch.Generator().manual_seed(n))[:n]
    assert_same_bits(run(engine, chosen), [values[chosen] for values in whole], f"{n} chains, shuffled")


@pytest.mark.parametrize("chains", [32, 64, 96, 256])
def test_the_size_of_a_tile_changes_no_bit(way, monkeypatch, chains):
    request = SampleRequest(n_chains=300, burn_in=2, seed=2, precision="bf16")
    whole = run(CpuEngine(COMPANY, request), torch.arange(300))
    monkeypatch.setattr("kaleido_fast.planning.cpu_tiles.full_tile", lambda widths: chains)
    assert_same_bits(run(CpuEngine(COMPANY, request), torch.arange(300)), whole, f"tiles of {chains} chains")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_what_is_not_finite_stays_in_its_own_chain(way, bad, activation):
    """Lanes beside it keep their bits; the chain itself is where the reference has it, padding of blocks or not."""
    model = random_mlp(5, 37, 300, 5, activation=activation)
    request = SampleRequest(n_chains=100, burn_in=0, precision="bf16")
    engine, chains = CpuEngine(model, request), torch.arange(100)
    state = torch.rand(100, 5, generator=torch.Generator().manual_seed(1)) - 0.5
    clean = run(engine, chains, state)
    state[37, 2] = bad
    got, want = run(engine, chains, state), run(reference(model, request), chains, state)
    others = chains != 37
    assert_same_bits([values[others] for values in got], [values[others] for values in clean], f"beside {bad}")
    assert torch.equal(got[1][37].isnan(), want[1][37].isnan()), f"{bad}: {got[1][37]}, not {want[1][37]}"


def test_weights_that_overflow_a_hidden_value_to_infinity_give_what_the_reference_gives(way):
    """A block's padding must not turn infinity into NaN by 0 x inf."""
    model = KaleidoMLP(ModelSpec((1, 3, 1), bias=(False, False)))
    with torch.no_grad():
        model.linears[0].weight.copy_(torch.tensor([[3e38], [1.0], [1.0]]))
        model.linears[1].weight.copy_(torch.tensor([[3e38, 1.0, 1.0]]))
    x = torch.tensor([[4.0], [0.5]])
    request = SampleRequest(n_chains=2, precision="bf16")
    got = CpuEngine(model, request).advance(torch.arange(2), x, 0, 1, None, lambda _: None).state
    assert got.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("engine", ["auto", "cpu", "reference"])
@pytest.mark.parametrize(("precision", "weight"), [("bf16", 3.4e38), ("fp16", 7e4)])
def test_weights_that_round_to_infinity_are_refused(engine, precision, weight):
    model = random_mlp(3, 5, 3)
    with torch.no_grad():
        model.linears[1].weight[2, 1] = weight
    if engine == "cpu" and precision == "fp16":
        pytest.skip("engine cpu has no fp16")
    with pytest.raises(InputError, match=f"precision '{precision}': the largest weight is .* fits; use"):
        fast_sample(model, n_chains=3, burn_in=1, precision=precision, engine=engine)


def test_a_plan_says_once_where_bf16_is_no_faster(monkeypatch):
    model = random_mlp(3, 5, 3)
    choose(monkeypatch, "rounded")
    told = fast_sample(model, n_chains=3, burn_in=1, precision="bf16").plan
    assert told.engine == "cpu" and told.reason.count("no faster than fp32") == 1
    assert "faster than" not in fast_sample(model, n_chains=3, burn_in=1).plan.reason


@pytest.mark.parametrize("other", WAYS)
def test_ways_are_not_mixed_in_a_store(way, other, tmp_path, monkeypatch):
    model, options = random_mlp(6, 9, 6), {"n_chains": 20, "burn_in": 2, "precision": "bf16", "engine": "cpu"}
    path = tmp_path / "a.npy"
    sample_to(path, model, **options)
    choose(monkeypatch, other)
    if other == way:
        sample_to(path, model, **options)
        return
    with pytest.raises(InputError, match=r"arithmetic was .*bf16.*, is now "):
        sample_to(path, model, **options)


def test_a_store_that_does_not_say_how_bf16_was_computed_is_not_continued(way, tmp_path):
    """As earlier versions began them."""
    model, options = random_mlp(6, 9, 6), {"n_chains": 20, "burn_in": 2, "precision": "bf16", "engine": "cpu"}
    path = tmp_path / "a.npy"
    sample_to(path, model, **options)
    record = path.with_suffix(".json")
    content = json.loads(record.read_text())
    assert content.pop("arithmetic")
    record.write_text(json.dumps(content))
    with pytest.raises(InputError, match="did not say by which instructions it computed bf16"):
        sample_to(path, model, **options)


def test_a_refused_permission_means_the_other_way(monkeypatch):
    """Containers and older kernels refuse the tile registers: then nothing must touch them."""

    class Refusing:
        def __init__(self, *args, **options):
            pass

        def syscall(self, *args):
            return -1

    monkeypatch.setattr(processor.ctypes, "CDLL", Refusing)
    monkeypatch.setattr(processor, "HAS_TILES", True)
    assert processor.ask_for_tiles() is False
    monkeypatch.setattr(choice, "tiles_are_permitted", processor.ask_for_tiles)
    assert choice.bf16_loops() != "tiles" and choice.loops_for("bf16").advance is not choice.LOOPS["tiles"].advance


def test_blocks_of_tiles_fit_the_lanes():
    assert tiles.BLOCK == 32 and (not processor.HAS_TILES or processor.LANES == tiles.BLOCK)
